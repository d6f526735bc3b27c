"""Features come back from disk as they were, whole or not at all."""

import pytest
import torch
from attacked import tiny_vit

from hf_immunize.audit.journal import FeatureStore
from hf_immunize.features.extract import Extraction, Layer


VIEWS = [(Layer("block", False, (2, 4)), "pooled"), (Layer("block", False, (2, 4)), "flattened")]
IMAGES = [b"one", b"two"]


class Passes:
    """Counts the passes over the images, and what each was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, views):
        self.asked.append([layer.label(view) for layer, view in views])
        sizes = {"pooled": 4, "flattened": 8}
        made = {layer.label(view): torch.full((2, sizes[view]), 0.1) for layer, view in views}
        return Extraction(torch.ones(2, 3), torch.zeros(2, 2), made)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


@pytest.fixture
def passes():
    return Passes()


def test_a_second_run_makes_no_pass_and_finds_the_same(folder, passes):
    first, second = (FeatureStore(folder, 2**20, []).through(tiny_vit(), IMAGES, VIEWS, passes) for _ in range(2))
    assert len(passes.asked) == 1
    assert torch.equal(first.features, second.features) and torch.equal(first.logits, second.logits)
    assert all(torch.equal(first.views[label], second.views[label]) for label in first.views)


@pytest.mark.parametrize(("seed", "images"), [(1, IMAGES), (0, [b"two", b"one"])])
def test_features_of_other_weights_or_images_are_not_taken(folder, passes, seed, images):
    FeatureStore(folder, 2**20, []).through(tiny_vit(), IMAGES, VIEWS, passes)
    FeatureStore(folder, 2**20, []).through(tiny_vit(seed), images, VIEWS, passes)
    assert len(passes.asked) == 2


def test_features_of_another_configuration_are_not_taken(folder, passes):
    FeatureStore(folder, 2**20, []).through(tiny_vit(), IMAGES, [], passes)
    other = tiny_vit()
    other.config.hidden_act = "relu"
    FeatureStore(folder, 2**20, []).through(other, IMAGES, [], passes)
    assert len(passes.asked) == 2


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_half_written_file_is_extracted_again(folder, passes, damage):
    FeatureStore(folder, 2**20, []).through(tiny_vit(), IMAGES, VIEWS, passes)
    for file in folder.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    FeatureStore(folder, 2**20, []).through(tiny_vit(), IMAGES, VIEWS, passes)
    FeatureStore(folder, 2**20, []).through(tiny_vit(), IMAGES, VIEWS, passes)
    assert len(passes.asked) == 2


def test_what_is_above_the_limit_is_extracted_again_and_nothing_else(folder, passes):
    # 2 rows of 3, 2 and 4 numbers fit, those of 8 do not.
    for _ in range(2):
        FeatureStore(folder, 90, []).through(tiny_vit(), IMAGES, VIEWS, passes)
    assert passes.asked[1] == ["block (flattened)"]


def test_without_a_limit_to_fill_nothing_is_written(folder, passes):
    FeatureStore(folder, 0, []).through(tiny_vit(), IMAGES, VIEWS, passes)
    assert not folder.exists()


def test_its_size_is_what_lies_on_disk(folder, passes):
    store = FeatureStore(folder, 2**20, [])
    store.through(tiny_vit(), IMAGES, VIEWS, passes)
    assert store.size == sum(file.stat().st_size for file in folder.iterdir()) > 0


def test_what_was_cut_off_while_writing_is_cleared_away(folder):
    (folder / "_unfinished-x").mkdir(parents=True)
    FeatureStore(folder, 2**20, [])
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_sentence_and_no_end(tmp_path, passes):
    (tmp_path / "features").write_text("a file")
    warnings = []
    found = FeatureStore(tmp_path / "features", 2**20, warnings).through(tiny_vit(), IMAGES, VIEWS, passes)
    assert len(found.views) == 2
    assert ["could not be kept" in sentence for sentence in warnings] == [True]
