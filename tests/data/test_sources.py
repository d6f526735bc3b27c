"""Images load from what a newcomer types, and are divided alike in every form, by part and by class."""

import re

import datasets
import pytest
from PIL import Image

from hf_immunize.data.columns import find_columns
from hf_immunize.data.sources import (
    HeldOut,
    class_keys,
    divide,
    divide_classes,
    load_image_dataset,
    measured,
    split_benign_harmful,
)
from hf_immunize.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_images(folder, **classes):
    for name, shades in classes.items():
        (folder / name).mkdir(parents=True)
        for i, shade in enumerate(shades):
            Image.new("L", (8, 8), shade).save(folder / name / f"image_{i}.png")


# Folders -> the splits that they are.
FOLDERS = {("",): ["train"], ("train", "test"): ["train", "test"], ("training", "val"): ["train", "validation"]}


@pytest.mark.parametrize("folders", list(FOLDERS))
@pytest.mark.parametrize("classes", [("cat", "dog"), ("crash_test", "dog")])
def test_folders_of_classes_below_folders_of_splits(tmp_path, folders, classes, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in folders:
        write_images(tmp_path / "data" / folder, **{name: [1, 2, 3][: 3 - i] for i, name in enumerate(classes)})
    count = sum(range(4 - len(classes), 4))
    for split in FOLDERS[folders]:
        data = load_image_dataset("~/data", split)
        assert data.features["label"].names == list(classes) and len(data) == count


def test_images_at_several_depths_and_in_a_flat_folder_have_no_classes(tmp_path):
    write_images(tmp_path / "deep", cat=[1, 2], dog=[3])
    write_images(tmp_path / "deep/dog", puppy=[4])
    with pytest.raises(DataError, match="each class a subfolder"):
        find_columns(load_image_dataset(str(tmp_path / "deep")))
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat/one.png")
    assert list(load_image_dataset(str(tmp_path / "flat")).features) == ["image"]


@pytest.mark.parametrize("form", ["saved", "saved splits", "one.parquet", "parquet folder"])
def test_stored_data_sets_load_as_they_were(tmp_path, image_dataset, form):
    place, test = tmp_path / form, image_dataset.select([0])
    if form == "saved":
        image_dataset.save_to_disk(place)
    elif form == "saved splits":
        datasets.DatasetDict(train=image_dataset, test=test).save_to_disk(place)
    elif form == "one.parquet":
        image_dataset.to_parquet(place)
    else:
        place.mkdir()
        image_dataset.to_parquet(place / "train-00000-of-00001.parquet")
        test.to_parquet(place / "test-00000-of-00001.parquet")
    data = load_image_dataset(str(place))
    assert data.features == image_dataset.features and data["label"][:] == [0, 1, 2, 0, 1, 2]
    assert data[3]["image"].getpixel((0, 0)) == 60
    if form in ("saved splits", "parquet folder"):
        assert len(load_image_dataset(str(place), "test")) == 1
    else:
        with pytest.raises(DataError, match=r"split 'test'.*found 'train'"):
            load_image_dataset(str(place), "test")
    # One saved alone keeps its split.
    datasets.Dataset(image_dataset.data, split="test").save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="found 'test'"):
        load_image_dataset(str(tmp_path / "saved"))


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "what is this?", "nobody/nothing", "", "a.csv"])
def test_what_is_no_data_set_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=re.escape(repr(source))):
        load_image_dataset(source)


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
    forms += [measured(str(tmp_path / "data"), draw)]
    assert len({tuple(rows(form)) for form in forms}) == 1
    assert set(rows(forms[0])) | set(rows(divide(many, draw).train)) == set(range(40))
    assert len(forms[0]) == 10 and rows(divide(many, HeldOut(0.25, seed=4)).test) != rows(forms[0])


def test_classes_are_split_after_the_images_and_those_to_measure_on_may_come_from_elsewhere(many):
    parts = divide(many, test=many.select([7]))
    assert (len(parts.train), rows(parts.test), parts.held_out) == (40, [7], None) and divide(parts) is parts
    draw = HeldOut(0.25, seed=3)
    benign, harmful = divide_classes(divide(many, draw), ["gun", "3"])
    assert {*rows(benign.test), *rows(harmful.test)} == {*rows(divide(many, draw).test)}
    assert {row % 4 for row in rows(harmful.train)} == {2, 3} and harmful.held_out == draw


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["tench, Tinca tinca", "cat"], ["tench, Tinca tinca", "cat"]),
        (["3"], ["3"]),  # a name before a number
        (["gun", "1", 0], ["gun", 1, 0]),
        (["tench, Tinca"], ["tench, Tinca"]),  # a name of nothing, which the split refuses
    ],
)
def test_classes_are_found_as_they_are_typed_one_in_each_value(many, typed, meant):
    assert class_keys(many, typed) == meant
    data = datasets.Dataset.from_dict({"label": ["tench, Tinca", "gun", "cat"]})
    assert class_keys(data, ["tench, Tinca"]) == ["tench, Tinca"]


def labelled(values, feature=None, column="label"):
    features = None if feature is None else datasets.Features({column: feature, "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict({column: values, "row": list(range(len(values)))}, features=features)


ABC = datasets.ClassLabel(names=["a", "b", "c"])


@pytest.mark.parametrize(
    ("data", "harmful", "sides"),
    [
        # Each side: rows, labels, names of the classes.
        (labelled([0, 1, 2, 1], ABC), ["b"], (([0, 2], [0, 1], "ac"), ([1, 3], [0, 0], "b"))),
        (labelled([0, 1, 2], ABC), ["c", "a"], (([1], [0], "b"), ([0, 2], [0, 1], "ac"))),
        (labelled([0, 1, 2], ABC), [1, "b"], (([0, 2], [0, 1], "ac"), ([1], [0], "b"))),
        (labelled([7, 3, 5, 3]), [3], (([0, 2], [1, 0], "57"), ([1, 3], [0, 0], "3"))),
        (labelled(["g", "d", "c"]), ["g"], (([1, 2], [1, 0], "cd"), ([0], [0], "g"))),
    ],
)
def test_rows_go_to_the_side_of_their_class_with_new_numbers(data, harmful, sides):
    found = split_benign_harmful(data, harmful)
    assert tuple((rows(side), side["label"][:], "".join(side.features["label"].names)) for side in found) == sides


def test_the_splits_of_a_dict_share_their_labels_and_the_column_may_have_another_name():
    benign, _ = split_benign_harmful(labelled([0, 1], column="kind"), [1], label_column="kind")
    assert benign.features["kind"].names == ["0"]
    data = datasets.DatasetDict(train=labelled([0, 1, 2], ABC), test=labelled([2, 2], ABC))
    benign, harmful = split_benign_harmful(data, ["b"])
    assert isinstance(benign, datasets.DatasetDict) and benign["test"]["label"][:] == [1, 1]
    assert len(harmful["train"]) == 1 and len(harmful["test"]) == 0
    numbers = datasets.DatasetDict(train=labelled([0, 1]), test=labelled([2]))
    assert split_benign_harmful(numbers, [1])[0]["test"].features["label"].names == ["0", "2"]


def test_images_stay_with_their_rows_and_are_neither_decoded_nor_transformed(image_dataset, with_damaged):
    for data, classes, shades in ((image_dataset, ["b"], [20, 80]), (image_dataset.select([5, 4, 0]), ["c"], [100])):
        _, harmful = split_benign_harmful(data, classes)
        assert [row["image"].getpixel((0, 0)) for row in harmful] == shades
    benign, harmful = split_benign_harmful(with_damaged(image_dataset, 0, b"no image"), ["a"])
    assert len(benign) == 4 and len(harmful) == 2
    calls = []

    def transform(batch):
        calls.append(len(batch["image"]))
        return {"pixel_values": batch["image"], "labels": batch["label"]}

    benign, _ = split_benign_harmful(image_dataset.with_transform(transform), ["a"])
    assert calls == []
    assert benign[0]["labels"] == 0 and calls == [1]


ODD_CLASSES = [None, 3, "abc", [], [None], [[]]]


@pytest.mark.parametrize(
    ("data", "classes", "named"),
    [
        *((labelled([0, 1, 2], ABC), [wanted], f"'a', 'b', 'c', found {wanted!r}") for wanted in ("d", 3, "0")),
        (labelled([0, 1], ABC), ["c"], "'a', 'b', found 'c'"),  # declared, without a row
        *((labelled([0, 1, 2], ABC), odd, "'a', 'b', 'c', found ") for odd in ODD_CLASSES),
        (labelled([0, 1, 2], ABC), ["a", "b", "c"], "all 3"),
        (datasets.Dataset.from_dict({"text": ["x"]}), ["a"], "'text'"),
        (labelled([0.5, 1.5]), ["a"], "float"),
        (datasets.DatasetDict(train=labelled([0], ABC), test=labelled([-1], ABC)), ["a"], "-1 in row 0.* 'test'"),
        (labelled([0]).to_iterable_dataset(), ["a"], "IterableDataset"),
    ],
)
def test_what_cannot_be_split_is_named(data, classes, named):
    with pytest.raises(DataError, match=named):
        split_benign_harmful(data, classes)
