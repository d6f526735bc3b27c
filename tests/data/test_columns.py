"""Columns are found and labels are checked, before any image is read."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_immunize.data.columns import find_columns, validate_labels
from hf_immunize.errors import DataError


def dataset_of(**columns):
    """Make an empty dataset with columns of these features."""
    return datasets.Dataset.from_dict({name: [] for name in columns}, features=datasets.Features(columns))


CLASSES = datasets.ClassLabel(names=["a", "b"])
INTEGER = datasets.Value("int64")


def test_the_image_and_the_class_column_are_found_by_type():
    assert find_columns(dataset_of(photo=datasets.Image(), kind=CLASSES, label=INTEGER)) == ("photo", "kind")


@pytest.mark.parametrize("name", ["label", "labels"])
def test_integer_labels_are_found_by_name(name):
    assert find_columns(dataset_of(img=datasets.Image(), **{name: INTEGER})) == ("img", name)


def test_of_several_class_columns_the_one_named_label_is_taken():
    assert find_columns(dataset_of(img=datasets.Image(), label=CLASSES, coarse=CLASSES))[1] == "label"


def test_several_class_columns_are_refused():
    data = dataset_of(img=datasets.Image(), fine_label=CLASSES, coarse_label=CLASSES)
    with pytest.raises(DataError, match=r"several: 'fine_label', 'coarse_label'.*label_column="):
        find_columns(data)
    assert find_columns(data, label_column="fine_label") == ("img", "fine_label")


def test_missing_labels_matter_only_where_needed():
    data = dataset_of(img=datasets.Image())
    assert find_columns(data, need_label=False) == ("img", None)
    with pytest.raises(DataError, match="found none among 'img'"):
        find_columns(data)


def test_two_image_columns_are_refused():
    data = dataset_of(img=datasets.Image(), mask=datasets.Image(), label=CLASSES)
    with pytest.raises(DataError, match=r"2 image columns among 'img', 'mask', 'label'"):
        find_columns(data)
    assert find_columns(data, image_column="img") == ("img", "label")


def test_no_image_column_lists_what_there_is():
    with pytest.raises(DataError, match=r"no image column.*'text', 'label'"):
        find_columns(dataset_of(text=datasets.Value("string"), label=CLASSES))


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_a_column_that_is_not_there_is_refused(option):
    with pytest.raises(DataError, match=rf"{option}='nope' is not in the dataset; its columns are 'img', 'label'"):
        find_columns(dataset_of(img=datasets.Image(), label=CLASSES), **{option: "nope"})


def test_a_transform_is_taken_by_what_it_yields(image_dataset):
    data = image_dataset.with_transform(lambda rows: {"pixel_values": rows["image"], "labels": rows["label"]})
    assert find_columns(data) == ("pixel_values", "labels")


def test_a_torch_dataset_of_images_is_taken_by_its_items():
    assert find_columns([{"x": Image.new("L", (4, 4)), "label": 0}]) == ("x", "label")


def test_splits_are_refused(image_dataset):
    with pytest.raises(DataError, match="choose one of 'train', 'test'"):
        find_columns(datasets.DatasetDict(train=image_dataset, test=image_dataset))


def test_several_datasets_by_name_are_refused(image_dataset):
    with pytest.raises(DataError, match="a dictionary with 'a', 'b'; give one of its values"):
        find_columns({"a": image_dataset, "b": image_dataset})


def test_a_streamed_dataset_is_refused(image_dataset):
    with pytest.raises(DataError, match="got IterableDataset; load the data without streaming"):
        find_columns(image_dataset.to_iterable_dataset())


def test_an_empty_torch_dataset_is_refused():
    with pytest.raises(DataError, match="empty"):
        find_columns([])


def test_items_that_are_no_dictionaries_are_refused():
    with pytest.raises(DataError, match="a tuple"):
        find_columns([(torch.zeros(3, 4, 4), 0)])


def labelled(values, feature=None):
    features = None if feature is None else datasets.Features({"label": feature})
    return datasets.Dataset.from_dict({"label": values}, features=features)


@pytest.mark.parametrize(
    "values, message",
    [
        ([0, 1, 3], r"Row 2 of train_dataset has the label 3.*num_labels=4"),
        ([0, 3, 7], r"Row 1 of train_dataset has the label 3.*num_labels=8"),
        ([0, -1], r"Row 1 of train_dataset has the label -1.*drop"),
        ([None, 1], r"Row 0 of train_dataset has the label None.*drop"),
        (["cat"], r"Row 0 of train_dataset has the label 'cat'.*class_encode_column"),
        ([0.5], r"Row 0 of train_dataset has the label 0.5.*integers"),
        ([True], r"Row 0 of train_dataset has the label True.*integers"),
    ],
)
def test_a_bad_label_is_named_with_its_row(values, message):
    with pytest.raises(DataError, match=message):
        validate_labels(labelled(values), "label", 3, "train_dataset")


def test_good_labels_pass():
    validate_labels(labelled([0, 1, 2]), "label", 3, "train_dataset")


def test_the_remedy_fits_all_classes_that_have_names():
    data = labelled([0, 3], datasets.ClassLabel(num_classes=8))
    with pytest.raises(DataError, match="num_labels=8"):
        validate_labels(data, "label", 3, "train_dataset")


def test_labels_are_checked_whatever_the_format():
    with pytest.raises(DataError, match="Row 1"):
        validate_labels(labelled([0, 7]).with_format("torch"), "label", 3, "train_dataset")


def test_images_are_not_read_to_check_labels(image_dataset, with_damaged):
    validate_labels(with_damaged(image_dataset, 0, b"no image"), "label", 3, "train_dataset")


def test_items_made_on_the_fly_are_not_read():
    class Refusing(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("an item was read")

    validate_labels(Refusing(), "labels", 3, "train_dataset")


def test_labels_may_be_numpy_integers():
    data = datasets.Dataset.from_dict({"label": np.arange(3, dtype=np.uint8)})
    validate_labels(data, "label", 3, "train_dataset")
