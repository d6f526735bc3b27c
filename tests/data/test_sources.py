"""Image data loads from what a newcomer types."""

import datasets
import pytest
from PIL import Image

from hf_immunize.data.columns import find_columns
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_images(folder, **classes):
    for name, shades in classes.items():
        (folder / name).mkdir(parents=True)
        for i, shade in enumerate(shades):
            Image.new("L", (8, 8), shade).save(folder / name / f"image_{i}.png")
    return str(folder)


def test_a_folder_of_classes(tmp_path):
    data = load_image_dataset(write_images(tmp_path / "data", cat=[1, 2], dog=[3]))
    assert data.features["label"].names == ["cat", "dog"] and sorted(data["label"][:]) == [0, 0, 1]


def test_a_folder_of_splits(tmp_path):
    write_images(tmp_path / "data" / "train", cat=[1, 2], dog=[3])
    write_images(tmp_path / "data" / "test", cat=[4], dog=[5])
    source = str(tmp_path / "data")
    assert len(load_image_dataset(source)) == 3 and len(load_image_dataset(source, "test")) == 2


def test_a_folder_val_is_the_split_validation(tmp_path):
    write_images(tmp_path / "data" / "train", cat=[1], dog=[3])
    write_images(tmp_path / "data" / "val", cat=[4], dog=[5])
    assert len(load_image_dataset(str(tmp_path / "data"), "validation")) == 2


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_a_single_class_keeps_its_name(tmp_path, splits):
    for split in splits:
        write_images(tmp_path / "data" / split, gun=[1, 2])
    data = load_image_dataset(str(tmp_path / "data"), splits[-1] or "train")
    assert data.features["label"].names == ["gun"] and data["label"][:] == [0, 0]


def test_images_at_several_depths_are_no_classes_and_the_remedy_says_so(tmp_path):
    write_images(tmp_path / "data", cat=[1, 2], dog=[3])
    write_images(tmp_path / "data" / "dog", puppy=[4])
    data = load_image_dataset(str(tmp_path / "data"))
    with pytest.raises(DataError, match="give each class a subfolder of its own"):
        find_columns(data)


def test_a_flat_folder_has_no_class(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "data" / "one.png")
    assert list(load_image_dataset(str(tmp_path / "data")).features) == ["image"]


def test_words_such_as_test_in_a_class_make_no_split(tmp_path):
    data = load_image_dataset(write_images(tmp_path / "data", crash_test=[1, 2], dog=[3]))
    assert len(data) == 3 and data.features["label"].names == ["crash_test", "dog"]


def test_a_saved_dataset(tmp_path, image_dataset):
    image_dataset.save_to_disk(tmp_path / "saved")
    assert load_image_dataset(str(tmp_path / "saved"))["label"][:] == [0, 1, 2, 0, 1, 2]


def test_saved_splits(tmp_path, image_dataset):
    datasets.DatasetDict(train=image_dataset, test=image_dataset.select([0])).save_to_disk(tmp_path / "saved")
    assert len(load_image_dataset(str(tmp_path / "saved"), "test")) == 1


def test_a_parquet_file(tmp_path, image_dataset):
    image_dataset.to_parquet(tmp_path / "some.parquet")
    data = load_image_dataset(str(tmp_path / "some.parquet"))
    assert data.features == image_dataset.features and data[3]["image"].getpixel((0, 0)) == 60


def test_a_folder_of_parquet(tmp_path, image_dataset):
    folder = tmp_path / "data"
    folder.mkdir()
    image_dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    image_dataset.select([0, 1]).to_parquet(folder / "test-00000-of-00001.parquet")
    assert len(load_image_dataset(str(folder))) == 6 and len(load_image_dataset(str(folder), "test")) == 2


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "data", cat=[1], dog=[3])
    assert len(load_image_dataset("~/data")) == 2


def test_a_missing_split_lists_those_there_are(tmp_path):
    source = write_images(tmp_path / "data", cat=[1], dog=[3])
    with pytest.raises(DataError, match="no split 'test'; choose one of 'train'"):
        load_image_dataset(source, "test")


def test_a_dataset_saved_alone_keeps_its_split(tmp_path, image_dataset):
    datasets.Dataset(image_dataset.data, split="test").save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="choose one of 'test'"):
        load_image_dataset(str(tmp_path / "saved"))


@pytest.mark.parametrize("source", ["/no/such/folder", "./no", "a/b/c", "what is this?"])
def test_no_path_and_no_name_is_refused(source):
    with pytest.raises(DataError, match="neither an existing path nor the name of a dataset on the Hub"):
        load_image_dataset(source)


def test_a_name_that_the_hub_does_not_serve_is_refused():
    with pytest.raises(DataError, match=r"'nobody/nothing' is no existing path.*Hub.*check the spelling"):
        load_image_dataset("nobody/nothing")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="holds no image dataset that can be read"):
        load_image_dataset(str(tmp_path / "data"))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="a parquet file or a folder"):
        load_image_dataset(str(tmp_path / "labels.csv"))
