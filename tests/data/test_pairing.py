"""Benign and harmful rows come side by side, stored or streamed, in an order that can be resumed."""

import random
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_immunize.data.images import ImageCollator, ImageRows, StreamedRows
from hf_immunize.data.pairs import BatchSizes, PairedCollator, PairedDataset, PairedSampler, degenerate_sides
from hf_immunize.errors import DataError, ShapeError


def pairs_of(sampler, epochs):
    drawn = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    return drawn


sizes = st.integers(1, 13)


@given(
    counts=st.tuples(sizes, sizes, sizes),
    batch=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 7)),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 6),
)
def test_an_epoch_is_one_pass_with_the_sizes_asked_and_harmful_rows_are_used_equally_often(
    counts, batch, seed, epochs
):
    benign, harmful, distillation = counts
    others = {"num_distillation": distillation, "batch_sizes": BatchSizes(*batch)}
    sampler = PairedSampler(benign, harmful, seed, **others)
    times = Counter()
    for epoch in range(epochs):
        drawn = pairs_of(sampler, [epoch])
        assert sorted(draw[0] for draw in drawn) == list(range(benign)) and len(sampler) == benign
        times.update(row for draw in drawn for row in draw[1])
        for start in range(0, benign - batch[0] + 1, batch[0]):
            rows_of_batch = drawn[start : start + batch[0]]
            assert [sum(len(draw[side]) for draw in rows_of_batch) for side in (1, 2)] == list(batch[1:])
    used = [times[row] for row in range(harmful)]
    assert max(used) - min(used) <= 1


def test_pairs_depend_on_seed_and_epoch_alone():
    first = pairs_of(PairedSampler(10, 7, seed=3), [2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert pairs_of(PairedSampler(10, 7, seed=3), [2]) == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    orders = [pairs_of(PairedSampler(50, 50, seed), [epoch]) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in orders}) == 3
    assert [pair[0] for pair in orders[0]] != [pair[1][0] for pair in orders[0]]


def rows(count, shape=(3, 4, 4), first=0):
    return [{"pixel_values": torch.full(shape, float(first + i)), "labels": i} for i in range(count)]


def test_a_pair_holds_both_rows_and_the_harmful_label_on_request_alone():
    pairs = PairedDataset(rows(3), rows(2, first=10))
    pair = pairs[2, (1,), ()]
    with pytest.raises(DataError, match="PairedSampler"):  # of a loader that draws for itself
        pairs[0]
    with pytest.raises(DataError, match="empty harmful dataset"):
        PairedDataset(rows(2), rows(0))
    assert len(pairs) == 3 and pair["benign"]["labels"] == 2 and set(pair["harmful"][0]) == {"pixel_values"}
    assert pair["harmful"][0]["pixel_values"][0, 0, 0] == 11
    assert PairedDataset(rows(3), rows(2), harmful_labels=True)[2, (1,), ()]["harmful"][0]["labels"] == 1


def test_sides_are_collated_apart_with_the_labels_that_a_loss_may_read():
    data = PairedDataset(rows(4), rows(2), distillation=rows(3), batch_sizes=BatchSizes(4, 4, 6))
    batch = PairedCollator(ImageCollator())([data[draw] for draw in data.make_sampler(0)])
    shapes = {side: tuple(part["pixel_values"].shape) for side, part in batch.items()}
    counts = {"benign": 4, "harmful": 4, "distillation": 6}
    assert shapes == {side: (count, 3, 4, 4) for side, count in counts.items()}
    assert {side for side, part in batch.items() if "labels" in part} == {"benign"}
    assert set(PairedCollator(ImageCollator())(rows(2))) == {"pixel_values", "labels"}  # rows that are no pairs
    without = PairedDataset(rows(2), rows(2), batch_sizes=BatchSizes(2, 2, 4))
    assert [draw[2] for draw in without.make_sampler(0)] == [(), ()]


def whole_numbers(side):
    def collate(given):
        dtype = torch.uint8 if given[0]["labels"] == side else torch.float32
        return {"pixel_values": torch.zeros(len(given), 3, 4, 4, dtype=dtype)}

    return collate


@pytest.mark.parametrize(
    ("harmful", "collate", "error", "named"),
    [
        (rows(1), lambda given: {"images": len(given)}, DataError, "batch of benign images, found images"),
        (rows(2)[1:], whole_numbers(0), DataError, "benign images, found torch.uint8"),
        (rows(2)[1:], whole_numbers(1), DataError, "harmful images, found torch.uint8"),
        (rows(1, shape=(3, 5, 5)), ImageCollator(), ShapeError, r"\(3, 4, 4\) and \(3, 5, 5\)"),
    ],
)
def test_batches_that_cannot_pass_together_are_named_with_their_side(harmful, collate, error, named):
    data = PairedDataset(rows(1), harmful, harmful_labels=True)
    with pytest.raises(error, match=named):
        PairedCollator(collate)([data[0, (0,), ()]])


class Indices(PairedDataset):
    """Yields the pair itself, to see what a loader draws."""

    def __getitem__(self, pair):
        return pair


def loader():
    data = Indices(rows(16), rows(5))
    return DataLoader(data, batch_size=2, sampler=data.make_sampler(seed=1), collate_fn=list)


def batches(epoch):
    drawn = pairs_of(PairedSampler(16, 5, seed=1), [epoch])
    return [drawn[start : start + 2] for start in range(0, 16, 2)]


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 0), (2, 1)])
def test_accelerate_announces_each_epoch_also_to_a_run_resumed_within_one(processes, rank):
    Accelerator(cpu=True)

    def prepared():
        return prepare_data_loader(loader(), num_processes=processes, process_index=rank, put_on_device=False)

    straight = prepared()
    for epoch in (0, 1):
        assert list(straight) == batches(epoch)[rank::processes]
    resumed = skip_first_batches(prepared(), 3)
    resumed.set_epoch(4)
    assert list(resumed) == batches(4)[rank::processes][3:]


# ---- streams


def stream(count=5):
    return datasets.Dataset.from_dict({"pixel_values": [[[[float(i)]]] for i in range(count)]}).to_iterable_dataset()


def values(given, positions):
    streamed = StreamedRows(given, "harmful_dataset")
    return [int(streamed[position]["pixel_values"]) for position in positions]


def test_a_stream_is_read_by_position_over_all_passes_and_again_on_going_back():
    assert values(stream(3), range(8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert values(stream(), range(7, 13)) == values(stream(), range(13))[7:]  # a resumed run
    assert values(stream(), [4, 1, 9, 0]) == [4, 1, 4, 0]
    drawn = pairs_of(PairedSampler(4, None, 0, batch_sizes=BatchSizes(2, 3)), [0, 1])
    assert [row for draw in drawn for row in draw[1]] == list(range(12))


class Shrinking:
    count = 4

    def __iter__(self):
        self.count -= 1
        return iter([{"pixel_values": torch.zeros(1, 1, 1)}] * self.count)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (stream(1).filter(lambda row: False), "empty stream"),
        (({"pixel_values": torch.zeros(1, 1, 1)} for _ in range(3)), "an iterator"),
        (Shrinking(), "as many rows in each pass"),
    ],
)
def test_a_stream_that_cannot_be_read_again_is_refused(given, named):
    with pytest.raises(DataError, match=named):
        values(given, range(9))


@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_take_a_stream_in_its_order_but_not_in_workers(workers):
    def stack(given):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in given])}

    data = PairedDataset(rows(6, shape=(1, 1, 1)), StreamedRows(stream(), "harmful_dataset"))
    sampler, collator = data.make_sampler(0), PairedCollator(stack)
    loaded = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collator, num_workers=workers)
    if workers:
        with pytest.raises(DataError, match="dataloader_num_workers=0"):
            next(iter(loaded))
    else:
        assert [one["harmful"]["pixel_values"].flatten().tolist() for one in loaded] == [[0, 1], [2, 3], [4, 0]]


# ---- sides of which nothing can come


def noise(numbers, labels=None):
    pixels = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(number)) for number in numbers]
    labels = [number % 2 for number in numbers] if labels is None else labels
    items = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    return ImageRows(items, "rows", "pixel_values", "labels")


BENIGN, HARMFUL = noise(range(20)), noise(range(100, 120))
DEGENERATE = {
    "the same data": (BENIGN, noise(range(20)), "All 20 harmful"),
    "some of the same": (BENIGN, noise(range(15, 35)), "5 of 20 harmful"),
    "one harmful image": (BENIGN, noise([7000]), "Of 1 harmful images 1 differ"),
    "one image many times": (BENIGN, noise([7000] * 20), "Of 20 harmful images 1 differ"),
    "duplicates": (BENIGN, noise([*range(100, 105)] * 4), "images 5 differ"),
    "one class": (noise(range(20), labels=[1] * 20), HARMFUL, "one class"),
}


@pytest.mark.parametrize("case", list(DEGENERATE))
@pytest.mark.parametrize("part", ["trained", "measured"])
def test_what_is_degenerate_is_reported_once(case, part, monkeypatch):
    logged = []
    monkeypatch.setattr("hf_immunize.data.pairs.logger.warning", logged.append)
    benign, harmful, words = DEGENERATE[case]
    said = degenerate_sides(**{"trained": None, "measured": (BENIGN, HARMFUL)} | {part: (benign, harmful)})
    assert len(said) == 1 and said == logged and words in said[0].replace(" evaluation", "")


def test_classes_that_only_the_evaluation_shows_are_reported():
    measured = noise(range(30, 50), labels=[0, 1, 1, 2, 3] * 4), HARMFUL
    (said,) = degenerate_sides((BENIGN, HARMFUL), measured)
    assert "8 of 20" in said and "(2 of 4)" in said
    assert degenerate_sides(None, measured) == []


def test_healthy_sides_and_rows_made_on_the_fly_are_passed_over(unreadable):
    assert degenerate_sides((BENIGN, HARMFUL, None), (noise(range(30, 50)), noise(range(130, 150)))) == []
    made = ImageRows(unreadable, "made", "pixel_values", "labels")
    assert degenerate_sides((made, made), (made, None)) == []


def test_a_random_transform_is_not_run(image_dataset):
    data = image_dataset.with_transform(lambda batch: pytest.fail("the transform was run"))
    side = ImageRows(data, "train_dataset", "pixel_values", "labels")
    assert any("benign ones" in sentence for sentence in degenerate_sides((side, side), None))
