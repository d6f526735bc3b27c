"""Classes are told by name, and where names do not tell, numbers are taken only where they can be right."""

import datasets
import pytest
from transformers import ViTConfig

from hf_immunize.data.columns import label_outputs, outputs_by_name
from hf_immunize.errors import DataError


def dataset_of(names, labels):
    features = datasets.Features({"label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"label": labels}, features=features)


def model_of(names):
    return ViTConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def outputs(data, config):
    return label_outputs(data, "label", config, "train_dataset")


def test_labels_follow_the_models_names():
    data = dataset_of(["ant", "bee", "cat"], [0, 1, 2])
    assert outputs(data, model_of(["cat", "gun", "bee", "ant"])) == [3, 2, 0]


def test_labels_in_the_models_order_are_left():
    assert outputs(dataset_of(["cat", "gun"], [0, 1]), model_of(["cat", "gun", "bee"])) is None


def test_classes_known_in_part_are_refused_by_name_where_they_occur():
    config = model_of(["cat", "gun"])
    assert outputs(dataset_of(["gun", "cat", "tank"], [0, 1]), config) == [1, 0, -1]
    with pytest.raises(DataError, match="'tank'"):
        outputs(dataset_of(["gun", "cat", "tank"], [0, 2]), config)


@pytest.mark.parametrize("config", [ViTConfig(num_labels=8), model_of([f"pet {i}" for i in range(8)])])
def test_two_classes_are_not_taken_for_the_first_of_eight_outputs(config):
    with pytest.raises(DataError, match="num_labels=2"):
        outputs(dataset_of(["cat", "dog"], [0, 1]), config)


@pytest.mark.parametrize("config", [ViTConfig(num_labels=2), model_of(["eel", "fox"])])
def test_as_many_classes_as_outputs_are_taken_by_number_for_want_of_names(config):
    assert outputs(dataset_of(["ant", "bee"], [0, 1]), config) is None


def test_data_without_names_are_taken_by_number():
    assert outputs([{"label": 1}], model_of(["cat", "gun"])) is None


def test_a_name_that_two_outputs_bear_is_taken_in_the_models_order_alone():
    config = model_of(["crane", "cat", "crane"])
    assert outputs_by_name(["crane", "cat", "crane"], config) == [0, 1, 2]
    assert outputs_by_name(["cat", "crane"], config) == [1, -1]


@pytest.mark.parametrize("field", ["label2id", "id2label"])
def test_a_config_without_its_names_is_read(field):
    config = model_of(["cat", "dog"])
    names = {"label2id": config.label2id, "id2label": config.id2label}
    fields = type("Config", (), names | {field: None, "num_labels": 2})
    assert outputs_by_name(["dog", "cat"], fields) == ([1, 0] if field == "label2id" else None)


@pytest.mark.parametrize("names", [["cat", "dog"], ["dog", "cat"]])
def test_another_order_is_told_where_a_transform_makes_the_labels(names, monkeypatch):
    said = []
    monkeypatch.setattr("hf_immunize.data.columns.logger.warning_once", said.append)
    data = dataset_of(names, [0, 1]).with_transform(lambda rows: {"labels": rows["label"]})
    assert label_outputs(data, "labels", model_of(["cat", "dog"]), "train_dataset") is None
    assert len(said) == (names != ["cat", "dog"])
