"""Images that several processes share out are those of one."""

import pytest
import torch
from attacked import pictures, rows_of

from hf_immunize.audit.tasks import Images
from hf_immunize.data.images import ImageRows


COUNT = 150


class Pretended:
    """One of two processes, whose other one answers for it what it found itself."""

    def __init__(self, index):
        self.index = index

    def share(self, items):
        return items[:2] if self.index == 0 else items[2:]

    def together(self, work):
        return [work()]


@pytest.fixture
def make():
    pixels, labels = pictures(COUNT + 10, 0)
    rows = ImageRows(rows_of(pixels, labels), "images", "pixel_values")
    return lambda: Images(rows, list(range(10, COUNT + 10)), labels[10:])


@pytest.fixture
def whole(make):
    images = make()
    images.load(None, 10**9, progress=False)
    return images


@pytest.mark.parametrize("memory", [10**9, 0], ids=["held", "decoded"])
def test_shares_joined_are_the_batches_of_one_process(memory, make, whole):
    parts = [make(), make()]
    nbytes = [part.load(None, memory, False, Pretended(index)) for index, part in enumerate(parts)]
    batches = [batch for part in parts for batch in part.batches(None, progress=False)]
    expected = list(whole.batches(None, progress=False))
    assert [len(batch) for batch in batches] == [64, 64, 22]
    assert all(torch.equal(found, wanted) for found, wanted in zip(batches, expected, strict=True))
    assert parts[0].hashes + parts[1].hashes == whole.hashes
    # What is planned by it does not depend on the number of processes.
    assert nbytes == [make().load(None, memory, False)] * 2


def test_images_of_another_process_are_decoded_when_they_are_asked_for(make, whole):
    part = make()
    part.load(None, 10**9, False, Pretended(0))
    chosen = torch.tensor([0, 70, 149])
    assert not part.whole and whole.whole
    assert torch.equal(part.pixels(None, chosen), whole.pixels(None, chosen))
