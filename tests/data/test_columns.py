"""Columns and class names are found, and labels are checked, before any image is read."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig

from hf_immunize.data.columns import find_columns, label_outputs, outputs_by_name, validate_labels
from hf_immunize.errors import DataError


CLASSES, IMAGE, INTEGER = datasets.ClassLabel(names=["a", "b"]), datasets.Image(), datasets.Value("int64")


def empty(**columns):
    return datasets.Dataset.from_dict({name: [] for name in columns}, features=datasets.Features(columns))


def labelled(values, feature=None):
    features = None if feature is None else datasets.Features({"label": feature})
    return datasets.Dataset.from_dict({"label": values}, features=features)


SPLIT = empty(img=IMAGE, label=CLASSES)
MADE = labelled([0]).with_transform(lambda rows: {"pixel_values": [torch.zeros(3, 8, 8)], "labels": rows["label"]})


@pytest.mark.parametrize(
    ("data", "options", "found"),
    [
        (empty(photo=IMAGE, kind=CLASSES, label=INTEGER), {}, ("photo", "kind")),
        (empty(img=IMAGE, label=INTEGER), {}, ("img", "label")),
        (empty(img=IMAGE, label=CLASSES, coarse=CLASSES), {}, ("img", "label")),
        (empty(img=IMAGE, fine=CLASSES, coarse=CLASSES), {"label_column": "fine"}, ("img", "fine")),
        (empty(img=IMAGE), {"need_label": False}, ("img", None)),
        ([{"x": Image.new("L", (4, 4)), "label": 0}], {}, ("x", "label")),
        ([{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}], {}, ("pixel_values", "labels")),
        (MADE, {}, ("pixel_values", "labels")),
        # What cannot be found is named.
        (empty(img=IMAGE, fine=CLASSES, coarse=CLASSES), {}, "'fine', 'coarse'"),
        (empty(img=IMAGE), {}, "found none among 'img'"),
        (empty(img=IMAGE, mask=IMAGE, label=CLASSES), {}, "found 2 among 'img', 'mask', 'label'"),
        (SPLIT, {"image_column": "nope"}, "image_column= out of 'img', 'label', found 'nope'"),
        (datasets.DatasetDict(train=SPLIT, test=SPLIT), {}, "'train', 'test'"),
        (datasets.Dataset.from_dict({"label": [0]}).to_iterable_dataset(), {}, "IterableDataset"),
        ("name", {}, "str"),
        ([], {}, "empty"),
        ([(torch.zeros(3, 4, 4), 0)], {}, "tuple"),
    ],
)
def test_columns_are_found_or_what_is_there_is_named(data, options, found):
    if isinstance(found, tuple):
        assert find_columns(data, **options) == found
    else:
        with pytest.raises(DataError, match=found):
            find_columns(data, **options)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (labelled([0, 1, 3]), "3 in row 2"),
        (labelled([0, 3], datasets.ClassLabel(num_classes=8)), "3 in row 1"),
        (labelled([0, 7]).with_format("torch"), "7 in row 1"),
        (labelled([0, -1]), "-1 in row 1"),
        (labelled([None, 1]), "None in row 0"),
        (labelled(["cat"]), "'cat' in row 0"),
    ],
)
def test_a_bad_label_is_named_with_its_row(data, found):
    with pytest.raises(DataError, match=f"{found} of train_dataset"):
        validate_labels(data, "label", 3, "train_dataset")


def test_good_labels_pass_and_no_image_is_read(image_dataset, with_damaged, unreadable):
    unsigned = datasets.Dataset.from_dict({"label": np.arange(3, dtype=np.uint8)})
    for data in (labelled([0, 1, 2]), unsigned, with_damaged(image_dataset, 0, b"no image"), unreadable):
        validate_labels(data, "label", 3, "train_dataset")


def model_of(names):
    return ViTConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


PETS = model_of([f"pet {i}" for i in range(8)])


@pytest.mark.parametrize(
    ("names", "labels", "config", "expected"),
    [
        (["ant", "bee", "cat"], [0, 1, 2], model_of(["cat", "gun", "bee", "ant"]), [3, 2, 0]),
        (["cat", "gun"], [0, 1], model_of(["cat", "gun", "bee"]), None),  # in the model's order
        (["gun", "cat", "tank"], [0, 1], model_of(["cat", "gun"]), [1, 0, -1]),  # no row of the unknown class
        (["gun", "cat", "tank"], [0, 2], model_of(["cat", "gun"]), "'tank'"),
        (["cat", "dog"], [0, 1], PETS, "num_labels=2"),
        (["ant", "bee"], [0, 1], ViTConfig(num_labels=2), None),
        (["ant", "bee"], [0, 1], model_of(["eel", "fox"]), None),
        (None, [0, 1], model_of(["cat", "gun"]), None),  # data without names
    ],
)
def test_labels_follow_the_models_names_and_are_numbers_only_where_they_can_be(names, labels, config, expected):
    data = labelled(labels, datasets.ClassLabel(names=names) if names else None)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            label_outputs(data, "label", config, "train_dataset")
    else:
        assert label_outputs(data, "label", config, "train_dataset") == expected


def test_a_name_of_two_outputs_counts_in_the_models_order_alone():
    config = model_of(["crane", "cat", "crane"])
    assert outputs_by_name(["crane", "cat", "crane"], config) == [0, 1, 2]
    assert outputs_by_name(["cat", "crane"], config) == [1, -1]


@pytest.mark.parametrize("names", [["cat", "dog"], ["dog", "cat"]])
def test_another_order_is_warned_of_where_a_transform_makes_the_labels(names, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_immunize.data.columns.logger.warning_once", warned.append)
    data = labelled([0, 1], datasets.ClassLabel(names=names)).with_transform(lambda rows: {"labels": rows["label"]})
    assert label_outputs(data, "labels", model_of(["cat", "dog"]), "train_dataset") is None
    assert len(warned) == (names != ["cat", "dog"])
