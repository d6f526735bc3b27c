"""Images of a task are checked before anything runs, and what is odd is said."""

import numpy as np
import pytest
import torch
from attacked import pictures, rows_of
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_immunize.audit.tasks import load_task, overlaps
from hf_immunize.errors import DataError


def dataset(labels, names, shade=0):
    images = [Image.fromarray(np.full((4, 4, 3), shade + 3 * i, np.uint8)) for i in range(len(labels))]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def processor(images):
    return {"pixel_values": [np.asarray(image, dtype=np.float32).transpose(2, 0, 1) for image in images]}


def test_classes_are_matched_by_name_where_the_numbers_differ():
    task = load_task("harmful", (dataset([0, 1, 1], ["a", "b"]), dataset([1, 0], ["b", "a"])), [])
    assert task.test.labels.tolist() == [0, 1]


def test_test_classes_without_training_images_are_left_out_with_a_sentence():
    said = []
    task = load_task("harmful", (dataset([0, 1], ["a", "b", "c"]), dataset([0, 2, 2], ["a", "b", "c"])), said)
    assert len(task.test) == 1
    assert any("'c'" in sentence and "2 test images" in sentence for sentence in said)


def test_no_shared_class_of_the_benign_task_leaves_utility():
    task = load_task("benign", (dataset([0, 1], ["a", "b"]), dataset([0], ["c"])), [], required=False)
    assert "too" in task.problem
    assert len(task.utility) == 1


def test_a_test_split_is_used_and_data_without_one_are_divided_and_this_is_known():
    task = load_task("harmful", dataset([0, 1] * 10, ["a", "b"]), [])
    assert (len(task.train), len(task.test)) == (14, 6)
    assert (task.held_out.fraction, task.held_out.seed) == (0.3, 42)
    data = DatasetDict({"train": dataset([0, 1], ["a", "b"]), "test": dataset([1], ["a", "b"])})
    given = load_task("harmful", data, [])
    assert len(given.test) == 1 and given.held_out is None


def test_of_streams_a_stated_sample_is_drawn_over_all_of_them():
    sides = [dataset([0, 1] * 30, ["b", "a"]), dataset([1, 0] * 5, ["a", "b"])]
    given = tuple(side.to_iterable_dataset() for side in sides)
    tasks = [load_task("benign", given, [], max_images=20, seed=seed) for seed in (0, 0, 1)]
    for task in tasks:
        for images in (task.train, task.test):
            images.load(processor, 2**20, progress=False)
    assert [(len(task.train), len(task.test), len(task.utility)) for task in tasks] == [(20, 10, 10)] * 3
    assert tasks[0].train.hashes == tasks[1].train.hashes != tasks[2].train.hashes
    shades = [task.train._held[:, 0, 0, 0] / 3 for task in tasks]
    assert len(set(shades[0].tolist())) == 20 and all(int(each.max()) > 45 and int(each.min()) < 15 for each in shades)
    assert shades[0].long().remainder(2).tolist() == tasks[0].train.labels.tolist() and tasks[0].label_names == [
        "a",
        "b",
    ]
    with pytest.raises(DataError, match="max_images"):
        load_task("benign", given, [])


def test_labels_that_are_names_without_numbers_are_a_task():
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": name} for name in ("dog", "cat", "dog")]
    task = load_task("benign", (rows, [*rows, {**rows[0], "labels": "eel"}]), [])
    assert [task.label_names[number] for number in task.utility.labels] == ["dog", "cat", "dog", "eel"]


UNLABELED = [*rows_of(*pictures(2, 0)), {"pixel_values": torch.zeros(3, 8, 8), "labels": None}]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (([], [1]), "at least one image"),
        (7, "found int"),
        ((UNLABELED, rows_of(*pictures(4, 1))), "Row 2 of the harmful training data"),
        ((dataset([0, 0], ["a"]), dataset([0], ["a"])), "at least two classes"),
        ((dataset([0, 1], ["a", "b"]), dataset([0], ["c"])), "in its test data too"),
    ],
)
def test_what_is_no_task_is_one_sentence(source, found):
    with pytest.raises(DataError, match=found):
        load_task("harmful", source, [])


def loaded(name, source):
    task = load_task(name, source, [])
    for images in (task.train, task.test):
        images.load(processor, 2**30, progress=False)
    return task


def test_overlaps_of_tasks_and_of_training_and_test_images_are_found_by_image():
    names = ["a", "b"]
    harmful = loaded("harmful", (dataset([0, 1, 0], names), dataset([0, 1], names)))
    benign = loaded("benign", (dataset([1, 0], names, shade=6), dataset([0, 1], names, shade=200)))
    own, shared = overlaps([harmful, benign])
    assert "2 harmful test images are training images" in own and "1 images are both harmful and benign" in shared


def test_images_that_do_not_fit_are_read_again_and_the_same():
    held, streamed = (load_task("harmful", (dataset([0, 1] * 3, ["a", "b"]),) * 2, []).train for _ in range(2))
    held.load(processor, 2**30, progress=False)
    assert streamed.load(processor, 10, progress=False) == 0
    parts = [torch.cat(list(images.batches(processor, 4, progress=False))) for images in (held, streamed)]
    assert torch.equal(*parts)
