"""Rows become RGB images, images become batches, and images are known again by their content."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageCollator, ImageRows, count_trained, image_hashes, sketch_of, to_rgb
from hf_immunize.errors import DataError, ImageDecodeError, ShapeError


def test_rows_are_rgb_images_with_labels_where_there_is_a_label_column(image_dataset):
    for data in (image_dataset, image_dataset.with_format("torch")):
        row = ImageRows(data, "train_dataset", "image", "label")[4]
        assert row["image"].mode == "RGB" and row["image"].getpixel((0, 0)) == (80, 80, 80)
        assert row["labels"] == 1 and isinstance(row["labels"], int)
    assert set(ImageRows(image_dataset, "harmful_dataset", "image")[0]) == {"image"}


def test_pixel_values_pass_through_stored_transformed_and_listed(image_dataset):
    def transform(rows):
        return {"pixel_values": [torch.ones(3, 4, 4) for _ in rows["image"]], "labels": rows["label"]}

    stored = datasets.Dataset.from_dict({"pixel_values": np.ones((2, 3, 4, 4), np.float32), "labels": [0, 1]})
    listed = [{"pixel_values": torch.ones(3, 4, 4), "labels": torch.tensor(label)} for label in (0, 1)]
    for data in (image_dataset.with_transform(transform), stored, listed):
        row = ImageRows(data, "train_dataset", "pixel_values", "labels")[1]
        assert torch.equal(row["pixel_values"], torch.ones(3, 4, 4)) and row["pixel_values"].dtype == torch.float32
        assert row["labels"] == 1 and isinstance(row["labels"], int)


NOISE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(NOISE, "PNG")
PNG = NOISE.getvalue()
DAMAGED = {"no image": b"no image", "nothing": b"", "cut header": PNG[:40], "cut data": PNG[:200], "missing": None}
DAMAGED["broken data"] = PNG[:60] + bytes(200) + PNG[260:]


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_or_missing_image_is_named_with_its_row(image_dataset, with_damaged, damage):
    rows = ImageRows(with_damaged(image_dataset, 3, DAMAGED[damage]), "harmful_dataset", "image", "label")
    assert rows[2]["labels"] == 2
    with pytest.raises(ImageDecodeError, match="row 3 of harmful_dataset"):
        rows[3]


def test_an_error_in_a_transform_is_not_taken_for_a_damaged_image(image_dataset):
    def transform(rows):
        raise ValueError("a mistake of one's own")

    with pytest.raises(ValueError, match="of one's own") as caught:
        ImageRows(image_dataset.with_transform(transform), "train_dataset", "pixel_values")[0]
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_whose_range_nothing_tells_is_refused_with_its_row(mode):
    with pytest.raises(ImageDecodeError, match=f"row 0 of train_dataset.*{mode}"):
        ImageRows([{"image": Image.new(mode, (4, 4)), "label": 0}], "train_dataset", "image")[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_white_whatever_lies_beneath(mode):
    red = Image.new("RGB", (2, 1), (200, 0, 0))
    image = red.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    else:
        image.info["transparency"] = colour = {"P": 5, "RGB": (1, 2, 3), "L": 7}[mode]
        image.putpixel((0, 0), colour)
    seen = np.asarray(to_rgb(image))[0].tolist()
    assert seen[0] == [255, 255, 255] and seen[1] == list(red.convert(mode).convert("RGB").getpixel((1, 0)))


def test_images_that_are_not_decoded_are(image_dataset):
    stored = image_dataset.cast_column("image", datasets.Image(decode=False))
    for data in (stored, [stored[index] for index in range(6)], stored.with_transform(lambda batch: batch)):
        row = ImageRows(data, "d", *find_columns(data))[3]
        assert row["image"].getpixel((0, 0)) == (60, 60, 60) and row["labels"] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_pixel_values(dtype):
    items = [{"pixel_values": torch.ones(3, 4, 4)}, {"pixel_values": torch.ones(3, 4, 4).to(dtype)}]
    rows = ImageRows(items, "harmful_dataset", "pixel_values")
    assert rows[0]["pixel_values"].dtype == torch.float32
    with pytest.raises(DataError, match=f"row 1 of harmful_dataset.*{dtype}"):
        rows[1]


# ---- batches


def images(*sizes):
    return [{"image": Image.new("RGB", size), "labels": i} for i, size in enumerate(sizes)]


def test_a_batch_is_what_the_processor_makes():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    rows = images((8, 8), (9, 12))
    batch = ImageCollator(processor)(rows)
    expected = processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["labels"].tolist() == [0, 1]
    assert set(ImageCollator()([{"pixel_values": torch.zeros(3, 4, 4)}])) == {"pixel_values"}


def test_unequal_images_and_images_without_a_processor_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\) and \(3, 12, 9\)"):
        ImageCollator(ViTImageProcessorPil(do_resize=False))(images((8, 8), (9, 12)))
    with pytest.raises(DataError, match="processing_class="):
        ImageCollator()(images((8, 8)))


# ---- known again


def sketch(numbers):
    return sketch_of(SimpleNamespace(hashes=np.array(list(numbers), np.uint64)))


def test_images_are_the_same_under_other_names_and_in_other_places(tmp_path, image_dataset):
    forms = [image_dataset, image_dataset.shuffle(seed=1), image_dataset.with_transform(lambda batch: batch)]
    for place in ("one", "two/deeper"):
        (tmp_path / place).mkdir(parents=True)
        for index, image in enumerate(image_dataset["image"]):
            image.save(tmp_path / place / f"{index if place == 'one' else f'renamed-{9 - index}'}.png")
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


def test_rows_made_on_the_fly_are_not_known_again(unreadable):
    assert ImageRows(unreadable, "d", "image").hashes is None
    assert count_trained(None, sketch(range(5)), None) == 0


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_the_share_that_was_trained_on_shows_in_the_sketch(share):
    draw = np.random.default_rng(0)
    trained = draw.integers(0, 2**63, 5000).astype(np.uint64)
    tested = np.concatenate([trained[: int(2000 * share)], draw.integers(0, 2**63, 2000).astype(np.uint64)])
    found = count_trained(tested, sketch(trained), sketch(draw.integers(0, 2**63, 2000)))
    assert found == pytest.approx(2000 * share * 256 / 5000, rel=0.4) if share else found == 0
    assert count_trained(tested, sketch(trained), sketch(tested)) == 0  # what training itself measured on
