"""The same data, fraction and seed are divided alike, whatever form they are given in."""

import datasets
import pytest

from hf_immunize.data.sources import HeldOut, choose, class_keys, divide, divide_classes, measured
from hf_immunize.errors import DataError


def rows(dataset):
    return dataset["row"][:]


@pytest.fixture
def many():
    names = ["cat", "tench, Tinca tinca", "gun", "3"]
    features = datasets.Features({"row": datasets.Value("int64"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"row": range(40), "label": [i % 4 for i in range(40)]}, features=features)


@pytest.mark.parametrize("given", [("validation", "test"), ("test", "validation"), ("test",), ("validation",)])
def test_images_are_measured_on_the_validation_split_else_the_test_split(many, tmp_path, given):
    sizes = {"validation": 5, "test": 7}
    data = datasets.DatasetDict({"train": many} | {split: many.select(range(sizes[split])) for split in given})
    data.save_to_disk(tmp_path / "data")
    wanted = sizes["validation" if "validation" in given else "test"]
    forms = (divide(data), divide(str(tmp_path / "data")))
    found = [(parts.test, parts.held_out) for parts in forms] + [(measured(str(tmp_path / "data")), None)]
    assert [(len(test), draw) for test, draw in found] == [(wanted, None)] * 3


def test_what_is_held_out_is_the_same_in_every_form(many, tmp_path):
    many.save_to_disk(tmp_path / "data")
    draw = HeldOut(0.25, seed=3)
    forms = [divide(source, draw).test for source in (many, datasets.DatasetDict(train=many), tmp_path / "data")]
    forms += [measured(str(tmp_path / "data"), draw), measured(str(tmp_path / "data"), draw, "train")]
    assert len({tuple(rows(form)) for form in forms}) == 1
    assert set(rows(forms[0])) | set(rows(divide(many, draw).train)) == set(range(40))
    assert len(forms[0]) == 10 and rows(divide(many, HeldOut(0.25, seed=4)).test) != rows(forms[0])


def test_classes_are_parted_after_the_images(many):
    draw = HeldOut(0.25, seed=3)
    benign, harmful = divide_classes(divide(many, draw), ["gun", "3"])
    assert {*rows(benign.test), *rows(harmful.test)} == {*rows(divide(many, draw).test)}
    assert {row % 4 for row in rows(harmful.train)} == {2, 3} and harmful.held_out == draw


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["tench, Tinca tinca"], ["tench, Tinca tinca"]),
        (["gun,tench, Tinca tinca, cat"], ["gun", "tench, Tinca tinca", "cat"]),
        (["3"], ["3"]),  # a name before a number
        (["gun, 1", 0], ["gun", 1, 0]),
        (["tench, Tinca"], ["tench", "Tinca"]),  # names of nothing, which the split refuses
    ],
)
def test_classes_are_told_as_they_are_typed(many, typed, meant):
    assert class_keys(many, typed) == meant


def test_names_with_commas_may_be_stored_as_text():
    data = datasets.Dataset.from_dict({"label": ["tench, Tinca", "gun"]})
    assert class_keys(data, ["tench, Tinca,gun"]) == ["tench, Tinca", "gun"]


def test_a_limit_draws_the_same_rows_as_a_shuffle_of_the_data_set(many):
    assert choose(40, 10, seed=5) == rows(many.shuffle(seed=5).select(range(10)))
    assert choose(4, 10, seed=5) == [0, 1, 2, 3]


@pytest.mark.parametrize("source", [7, datasets.DatasetDict(), datasets.Dataset.from_dict({"row": [1]})])
def test_what_cannot_be_divided_is_one_sentence(source):
    with pytest.raises(DataError, match="Expected"):
        divide(source)
