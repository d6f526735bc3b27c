"""Images are known again by their content, and training images among them are counted from below."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_immunize.data.identity import count_trained, image_hashes, sketch_of
from hf_immunize.data.images import ImageRows


def sketch(numbers):
    return sketch_of(SimpleNamespace(hashes=np.array(list(numbers), np.uint64)))


def test_images_are_the_same_under_other_names_and_in_other_places(tmp_path, image_dataset):
    for place in ("one", "two/deeper"):
        (tmp_path / place).mkdir(parents=True)
    for index, image in enumerate(image_dataset["image"]):
        image.save(tmp_path / "one" / f"{index}.png")
        image.save(tmp_path / "two/deeper" / f"renamed-{9 - index}.png")
    forms = [image_dataset, image_dataset.shuffle(seed=1), image_dataset.with_transform(lambda batch: batch)]
    for place in ("one", "two/deeper"):
        files = [str(path) for path in (tmp_path / place).iterdir()]
        forms.append(datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image()))
    found = [set(image_hashes(form, "image").tolist()) for form in forms]
    assert all(len(one) == 6 for one in found)
    assert found[0] == found[1] == found[2] and found[3] == found[4]


def test_parts_of_rows_keep_their_hashes(image_dataset):
    listed = [{"image": Image.new("L", (4, 4), shade), "label": 0} for shade in range(6)]
    for data in (image_dataset, listed):
        rows = ImageRows(data, "d", "image")
        assert rows.subset([4, 1]).hashes.tolist() == rows.hashes[[4, 1]].tolist()


def test_rows_made_on_the_fly_are_not_known_again():
    class Made:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("an item was read")

    assert ImageRows(Made(), "d", "image").hashes is None
    assert count_trained(None, sketch(range(5)), None) == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_the_share_that_was_trained_on_shows_in_the_sketch(share):
    draw = np.random.default_rng(0)
    trained = draw.integers(0, 2**63, 5000).astype(np.uint64)
    tested = np.concatenate([trained[: int(2000 * share)], draw.integers(0, 2**63, 2000).astype(np.uint64)])
    found = count_trained(tested, sketch(trained), sketch(draw.integers(0, 2**63, 2000)))
    assert found == pytest.approx(2000 * share * 256 / 5000, rel=0.4) if share else found == 0


def test_what_training_measured_on_is_no_reason_to_refuse():
    draw = np.random.default_rng(0)
    trained, measured = (draw.integers(0, 2**63, size) for size in (3000, 9000))
    measured[:40] = trained[:40]  # images that the data hold twice
    assert count_trained(measured.astype(np.uint64), sketch(trained), sketch(measured)) == 0
    assert count_trained(trained.astype(np.uint64), sketch(trained), sketch(measured)) > 0
