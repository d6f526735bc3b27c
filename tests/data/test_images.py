"""Rows become RGB images, and images become batches."""

import io
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageCollator, ImageRows, to_rgb
from hf_immunize.errors import DataError, ImageDecodeError, ShapeError


def png(size=64):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_are_rgb_images_with_labels(image_dataset):
    row = ImageRows(image_dataset, "train_dataset", "image", "label")[4]
    assert row["image"].mode == "RGB" and row["image"].getpixel((0, 0)) == (80, 80, 80) and row["labels"] == 1


def test_without_a_label_column_rows_have_no_labels(image_dataset):
    assert set(ImageRows(image_dataset, "harmful_dataset", "image")[0]) == {"image"}


def test_a_torch_format_is_set_aside_for_images(image_dataset):
    row = ImageRows(image_dataset.with_format("torch"), "train_dataset", "image", "label")[0]
    assert isinstance(row["image"], Image.Image) and isinstance(row["labels"], int)


def test_other_image_columns_are_not_decoded(image_dataset, with_damaged):
    masks = with_damaged(image_dataset, 0, b"no image").rename_column("image", "mask").remove_columns("label")
    data = datasets.concatenate_datasets([image_dataset, masks], axis=1)
    assert ImageRows(data, "train_dataset", "image", "label")[0]["labels"] == 0


def test_pixel_values_pass_through(image_dataset):
    def transform(rows):
        return {"pixel_values": [torch.ones(3, 4, 4) for _ in rows["image"]], "labels": rows["label"]}

    row = ImageRows(image_dataset.with_transform(transform), "train_dataset", "pixel_values", "labels")[1]
    assert torch.equal(row["pixel_values"], torch.ones(3, 4, 4)) and row["labels"] == 1


def test_stored_pixel_values_become_tensors():
    data = datasets.Dataset.from_dict({"pixel_values": np.ones((2, 3, 4, 4), np.float32), "labels": [0, 1]})
    row = ImageRows(data, "train_dataset", "pixel_values", "labels")[0]
    assert row["pixel_values"].shape == (3, 4, 4) and row["pixel_values"].dtype == torch.float32


def test_labels_of_a_torch_dataset_may_be_tensors():
    rows = ImageRows(
        [{"pixel_values": torch.zeros(3, 4, 4), "labels": torch.tensor(2)}], "d", "pixel_values", "labels"
    )
    assert rows[0]["labels"] == 2 and isinstance(rows[0]["labels"], int)


def test_a_label_out_of_range_is_named_on_access():
    items = [{"pixel_values": torch.zeros(3, 4, 4), "labels": label} for label in (0, 9)]
    rows = ImageRows(items, "train_dataset", "pixel_values", "labels", num_labels=3)
    with pytest.raises(DataError, match="9 in row 1 of train_dataset"):
        rows[1]


DAMAGED = {"no image": b"no image", "nothing": b"", "cut header": png()[:40], "cut data": png()[:200]}
DAMAGED["broken data"] = png()[:60] + bytes(200) + png()[260:]


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_image_is_named_with_its_row(image_dataset, with_damaged, damage):
    rows = ImageRows(with_damaged(image_dataset, 3, DAMAGED[damage]), "harmful_dataset", "image", "label")
    assert rows[2]["labels"] == 2
    with pytest.raises(ImageDecodeError, match="row 3 of harmful_dataset"):
        rows[3]


def test_a_missing_image_is_named_with_its_row(image_dataset, with_damaged):
    rows = ImageRows(with_damaged(image_dataset, 3, None), "harmful_dataset", "image", "label")
    with pytest.raises(ImageDecodeError, match="row 3 of harmful_dataset, found none"):
        rows[3]


def test_an_error_in_a_transform_is_not_taken_for_a_damaged_image(image_dataset):
    def transform(rows):
        raise ValueError("a mistake of one's own")

    with pytest.raises(ValueError, match="of one's own") as caught:
        ImageRows(image_dataset.with_transform(transform), "train_dataset", "pixel_values")[0]
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(dtype):
    shades = np.array([[0, 256, 32768, 65535]], dtype=dtype)
    assert np.asarray(to_rgb(Image.fromarray(shades)))[0, :, 0].tolist() == [0, 1, 128, 255]


HALF = np.array([[0.0, 0.25, 0.5, 1.0]])
SHADES = [0, 63, 127, 255]


@pytest.mark.parametrize(
    ("pixels", "shades"),
    [
        (HALF.astype(np.float32), SHADES),
        ((HALF * 255).astype(np.float32), SHADES),
        ((HALF * 255).astype(np.int32), SHADES),
        ((HALF * 255).astype(np.uint16), SHADES),
        ((HALF * 4095).astype(np.uint16), SHADES),
        ((HALF * 4095).astype(np.int32), SHADES),
        ((HALF * 65535).astype(np.int32), SHADES),
        ((HALF * 65535).astype(np.float32), SHADES),
        (np.zeros((1, 4), np.float32), [0, 0, 0, 0]),
    ],
)
def test_the_range_is_the_least_that_holds_the_brightest_pixel(pixels, shades):
    assert np.asarray(to_rgb(Image.fromarray(pixels)))[0, :, 0].tolist() == shades


@pytest.mark.parametrize("worst", [-1.0, 65536.0, float("nan"), float("inf")])
def test_a_range_that_cannot_be_known_is_refused_with_its_row(worst, image_dataset):
    image = Image.fromarray(np.array([[0.5, worst]], dtype=np.float32))
    rows = ImageRows([{"image": image, "label": 0}], "train_dataset", "image")
    with pytest.raises(ImageDecodeError, match=r"row 0 of train_dataset.*0 to 65535"):
        rows[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_white_whatever_lies_beneath(mode):
    red = Image.new("RGB", (2, 1), (200, 0, 0))
    if mode in ("RGBA", "LA"):
        image = red.convert(mode)
        image.putalpha(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    else:
        image = red.convert(mode)
        image.putpixel((0, 0), {"P": 5, "RGB": (1, 2, 3), "L": 7}[mode])
        image.info["transparency"] = {"P": 5, "RGB": (1, 2, 3), "L": 7}[mode]
    seen = np.asarray(to_rgb(image))[0].tolist()
    assert seen[0] == [255, 255, 255] and seen[1] == list(red.convert(mode).convert("RGB").getpixel((1, 0)))


def test_images_that_are_not_decoded_are(image_dataset):
    stored = image_dataset.cast_column("image", datasets.Image(decode=False))
    listed = [stored[index] for index in range(6)]
    for data in (stored, listed, stored.with_transform(lambda batch: batch)):
        image, label = find_columns(data)
        row = ImageRows(data, "d", image, label)[3]
        assert row["image"].getpixel((0, 0)) == (60, 60, 60) and row["labels"] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_pixel_values(dtype):
    items = [{"pixel_values": torch.ones(3, 4, 4)}, {"pixel_values": torch.ones(3, 4, 4).to(dtype)}]
    rows = ImageRows(items, "harmful_dataset", "pixel_values")
    assert rows[0]["pixel_values"].dtype == torch.float32
    with pytest.raises(DataError, match=f"row 1 of harmful_dataset.*{dtype}"):
        rows[1]


def test_a_palette_with_transparency_converts_without_warning():
    image = Image.new("P", (4, 4))
    image.info["transparency"] = b"\x00\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(image).mode == "RGB"


def images(*sizes):
    return [{"image": Image.new("RGB", size), "labels": i} for i, size in enumerate(sizes)]


def test_images_are_processed_into_a_batch():
    collate = ImageCollator(ViTImageProcessorPil(size={"height": 16, "width": 16}))
    batch = collate(images((8, 8), (9, 12)))
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1]


def test_the_batch_is_what_the_processor_makes():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    rows = images((8, 8), (8, 8))
    expected = processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ImageCollator(processor)(rows)["pixel_values"], expected)


def test_rows_without_labels_give_a_batch_without():
    assert set(ImageCollator()([{"pixel_values": torch.zeros(3, 4, 4)}])) == {"pixel_values"}


def test_unequal_images_are_refused_with_both_shapes():
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\) and \(3, 12, 9\)"):
        ImageCollator(ViTImageProcessorPil(do_resize=False))(images((8, 8), (9, 12)))


def test_images_without_processor_are_refused():
    with pytest.raises(DataError, match="processing_class="):
        ImageCollator()(images((8, 8)))
