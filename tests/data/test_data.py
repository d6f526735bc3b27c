"""A labelled dataset is split by class."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.data.sources import split_benign_harmful
from hf_immunize.errors import DataError


def labelled(values, feature=None, column="label"):
    features = None if feature is None else datasets.Features({column: feature, "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict({column: values, "row": list(range(len(values)))}, features=features)


ABC = datasets.ClassLabel(names=["a", "b", "c"])


def test_rows_go_to_the_side_of_their_class():
    benign, harmful = split_benign_harmful(labelled([0, 1, 2, 1], ABC), ["b"])
    assert benign["row"][:] == [0, 2] and harmful["row"][:] == [1, 3]


def test_labels_are_renumbered_and_keep_their_names():
    benign, harmful = split_benign_harmful(labelled([2, 1, 0, 1], ABC), ["a"])
    assert benign["label"][:] == [1, 0, 0] and benign.features["label"].names == ["b", "c"]
    assert harmful["label"][:] == [0] and harmful.features["label"].names == ["a"]


def test_names_keep_their_order_whatever_the_order_asked():
    _, harmful = split_benign_harmful(labelled([0, 1, 2], ABC), ["c", "a"])
    assert harmful.features["label"].names == ["a", "c"]


def test_a_class_can_be_given_by_integer():
    assert split_benign_harmful(labelled([0, 1, 2], ABC), [1])[1]["row"][:] == [1]


def test_a_class_given_twice_counts_once():
    assert split_benign_harmful(labelled([0, 1, 2], ABC), [1, "b"])[1]["row"][:] == [1]


def test_integer_labels_need_no_names():
    benign, harmful = split_benign_harmful(labelled([7, 3, 5, 3]), [3])
    assert benign.features["label"].names == ["5", "7"] and benign["label"][:] == [1, 0]
    assert harmful["row"][:] == [1, 3]


def test_string_labels_are_classes():
    benign, _ = split_benign_harmful(labelled(["gun", "dog", "cat"]), ["gun"])
    assert benign.features["label"].names == ["cat", "dog"] and benign["label"][:] == [1, 0]


def test_a_label_column_of_another_name_can_be_given():
    benign, _ = split_benign_harmful(labelled([0, 1], column="kind"), [1], label_column="kind")
    assert benign.features["kind"].names == ["0"]


def test_every_split_of_a_dict_is_divided_with_the_same_labels():
    data = datasets.DatasetDict(train=labelled([0, 1, 2], ABC), test=labelled([2, 2], ABC))
    benign, harmful = split_benign_harmful(data, ["b"])
    assert isinstance(benign, datasets.DatasetDict) and benign["test"]["label"][:] == [1, 1]
    assert len(harmful["train"]) == 1 and len(harmful["test"]) == 0


def test_integer_classes_of_a_dict_are_those_of_all_its_splits():
    data = datasets.DatasetDict(train=labelled([0, 1]), test=labelled([2]))
    assert split_benign_harmful(data, [1])[0]["test"].features["label"].names == ["0", "2"]


def test_images_are_not_decoded(image_dataset, with_damaged):
    benign, harmful = split_benign_harmful(with_damaged(image_dataset, 0, b"no image"), ["a"])
    assert len(benign) == 4 and len(harmful) == 2


def test_images_stay_with_their_rows(image_dataset):
    _, harmful = split_benign_harmful(image_dataset, ["b"])
    assert [row["image"].getpixel((0, 0)) for row in harmful] == [20, 80]


def test_selected_rows_can_be_split(image_dataset):
    _, harmful = split_benign_harmful(image_dataset.select([5, 4, 0]), ["b", "c"])
    assert [row["image"].getpixel((0, 0)) for row in harmful] == [100, 80]


def test_a_transform_is_not_run_and_stays(image_dataset):
    calls = []

    def transform(rows):
        calls.append(len(rows["image"]))
        return {"pixel_values": rows["image"], "labels": rows["label"]}

    benign, _ = split_benign_harmful(image_dataset.with_transform(transform), ["a"])
    assert calls == []
    assert benign[0]["labels"] == 0 and calls == [1]


@pytest.mark.parametrize("wanted", ["d", 3, "0"])
def test_a_class_that_is_not_there_is_refused(wanted):
    with pytest.raises(
        DataError, match=rf"The class {wanted!r} is not in the data; the classes there are 'a', 'b', 'c'"
    ):
        split_benign_harmful(labelled([0, 1, 2], ABC), [wanted])


def test_a_class_that_is_declared_but_has_no_row_is_refused():
    with pytest.raises(DataError, match=r"'c' is not in the data; the classes there are 'a', 'b'"):
        split_benign_harmful(labelled([0, 1], ABC), ["c"])


@pytest.mark.parametrize("wanted", [[], "abc"])
def test_no_list_of_classes_is_refused(wanted):
    with pytest.raises(DataError, match="a list with at least one class"):
        split_benign_harmful(labelled([0, 1, 2], ABC), wanted)


def test_all_classes_harmful_is_refused():
    with pytest.raises(DataError, match="All 3 classes"):
        split_benign_harmful(labelled([0, 1, 2], ABC), ["a", "b", "c"])


def test_no_label_column_lists_the_columns():
    with pytest.raises(DataError, match="among 'text'"):
        split_benign_harmful(datasets.Dataset.from_dict({"text": ["x"]}), ["a"])


def test_a_row_without_a_valid_label_is_named():
    data = datasets.DatasetDict(train=labelled([0, 1], ABC), test=labelled([-1], ABC))
    with pytest.raises(DataError, match="Row 0 of split 'test' has the label -1"):
        split_benign_harmful(data, ["a"])


def test_another_kind_of_dataset_is_refused(image_dataset):
    with pytest.raises(DataError, match=r"got IterableDataset; load the data without streaming"):
        split_benign_harmful(image_dataset.to_iterable_dataset(), ["a"])


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=20), harmful=st.sets(st.integers(0, 4), min_size=1))
def test_every_row_is_kept_once_with_its_class(labels, harmful):
    harmful &= set(labels)
    if not harmful or harmful >= set(labels):
        return
    found = {}
    for part in split_benign_harmful(labelled(labels), sorted(harmful)):
        names = part.features["label"].names
        found.update({row["row"]: int(names[row["label"]]) for row in part})
    assert found == dict(enumerate(labels))


def kind(given):
    return type(given).__name__


@pytest.mark.parametrize("classes", [None, 3, 1.5, "gun", b"gun", {}, [None], [[]], [1.5], object()], ids=kind)
def test_odd_classes_are_a_named_error(classes):
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "gun", "b"])})
    data = datasets.Dataset.from_dict({"label": [0, 1, 2]}, features=features)
    with pytest.raises(DataError):
        split_benign_harmful(data, classes)
