"""Sides of which nothing can come are told; others are not."""

import numpy as np
import pytest
import torch

from hf_immunize.data.images import ImageRows
from hf_immunize.data.pairs import degenerate_sides


def rows(numbers, scale=1.0, labels=None):
    pixels = [scale * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(number)) for number in numbers]
    labels = [number % 2 for number in numbers] if labels is None else labels
    items = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    return ImageRows(items, "rows", "pixel_values", "labels")


BENIGN, HARMFUL = rows(range(20)), rows(range(100, 120))
FLAT = ImageRows([{"pixel_values": torch.full((3, 4, 4), i / 20)} for i in range(20)], "flat", "pixel_values")
CASES = {
    "the same data": (BENIGN, rows(range(20)), "All 20 harmful"),
    "some of the same": (BENIGN, rows(range(15, 35)), "5 of 20 harmful"),
    "one harmful image": (BENIGN, rows([7000]), "harmful images are one single image"),
    "one image many times": (BENIGN, rows([7000] * 20), "20 times"),
    "duplicates": (BENIGN, rows([*range(100, 105)] * 4), "only 5 differ"),
    "one colour each": (BENIGN, FLAT, "are of one colour"),
    "one class": (rows(range(20), labels=[1] * 20), HARMFUL, "one class"),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("part", ["trained", "measured"])
def test_each_is_told_once(case, part, monkeypatch):
    logged = []
    monkeypatch.setattr("hf_immunize.data.pairs.logger.warning", logged.append)
    benign, harmful, words = CASES[case]
    sides = {"trained": None, "measured": (BENIGN, HARMFUL)} | {part: (benign, harmful)}
    said = degenerate_sides(**sides)
    assert len(said) == 1 and said == logged
    assert words in said[0].replace(" evaluation", "")


def test_healthy_sides_are_passed_over():
    assert degenerate_sides((BENIGN, HARMFUL, None), (rows(range(30, 50)), rows(range(130, 150)))) == []


def test_rows_made_on_the_fly_are_not_read():
    class Made(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            raise AssertionError("an item was read")

    made = ImageRows(Made(), "made", "pixel_values", "labels")
    assert degenerate_sides((made, made), (made, None)) == []


def test_a_random_transform_is_not_run(image_dataset):
    def transform(batch):
        raise AssertionError("the transform was run")

    data = image_dataset.with_transform(transform)
    side = ImageRows(data, "train_dataset", "pixel_values", "labels")
    assert any("benign ones" in sentence for sentence in degenerate_sides((side, side), None))


def test_pixels_in_half_precision_are_looked_at():
    items = [{"pixel_values": (index + torch.arange(12.0).reshape(3, 2, 2)).bfloat16()} for index in range(4)]
    assert degenerate_sides((ImageRows(items, "half", "pixel_values"), None), None) == []
    assert np.unique(ImageRows(items, "half", "pixel_values").hashes).size == 4
