"""Stored activations are those of the trunk, and of nothing else; they are written whole or not at all."""

import pickle

import datasets
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError, DiskSpaceError, NonFiniteError, ShapeError
from hf_immunize.features.cache import TrunkCache, open_or_write
from hf_immunize.features.ranks import ALONE, launched
from hf_immunize.features.trunk import TrunkSplit, split_trunk
from hf_immunize.vision.scope import select_trainable


SHAPE = (3, 32, 32)


@pytest.fixture
def setting(tiny):
    model = tiny("resnet").train()
    return model, split_trunk(model, select_trainable(model, "last_stage"), SHAPE)


@pytest.fixture
def images():
    def make(count=7, seed=1):
        pixels = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
        return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pixels)]

    return make


@pytest.fixture
def cache(setting, images, tmp_path):
    """Make a cache of seven images in batches of three."""

    def make(rows=None, **options):
        given = {"batch_size": 3, "progress": False} | options
        return TrunkCache(*setting, images() if rows is None else rows, tmp_path / "trunk" / "benign", **given)

    return make


@pytest.fixture
def written(monkeypatch):
    """Count how often a trunk is written."""
    calls = []
    write = TrunkCache.write
    monkeypatch.setattr(TrunkCache, "write", lambda self: (calls.append(self), write(self))[1])
    return calls


def activations(rows):
    return torch.stack([rows[i]["pixel_values"] for i in range(len(rows))])


def expected(setting, rows):
    model, split = setting
    model.eval()
    return split.activations(model, torch.stack([row["pixel_values"] for row in rows]))


def shades(dataset):
    """Rows of an image dataset, and a processor for them."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return ImageRows(dataset, "train_dataset", "image", "label"), processor


def test_stored_rows_are_the_trunks_in_a_mapped_file(cache, setting, images):
    made, modes, state = cache(), [module.training for module in setting[0].modules()], torch.get_rng_state()
    (rows,) = open_or_write(made)
    assert modes == [module.training for module in setting[0].modules()]
    assert torch.equal(state, torch.get_rng_state())
    exact = expected(setting, images())
    torch.testing.assert_close(activations(rows), exact, rtol=1e-5, atol=1e-6)
    assert [rows[i]["labels"] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert rows.dataset.cache_files and rows.dataset.features["labels"].dtype == "int64"
    content = pickle.dumps(rows)  # as they travel to worker processes
    assert len(content) < exact.nbytes and torch.equal(activations(pickle.loads(content)), activations(rows))


EMBEDDER = "resnet.embedder.embedder"
# What is changed, in what decides the activations and in the head, which does not.
CHANGES = {
    "weights": lambda model, _: model.get_submodule(f"{EMBEDDER}.convolution").weight.data.mul_(1.5),
    "statistics": lambda model, _: model.get_submodule(f"{EMBEDDER}.normalization").running_var.mul_(2),
    "head": lambda model, _: model.classifier[1].weight.data.add_(1),
    "images": lambda _, options: options["rows"][3].update(pixel_values=options["rows"][3]["pixel_values"] + 1),
    "type": lambda _, options: options.update(dtype="float16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_activations_decides_whether_they_are_found(change, cache, setting, images, written):
    options = {"rows": images()}
    first = activations(open_or_write(cache(**options))[0])
    CHANGES[change](setting[0], options)
    found = activations(open_or_write(cache(**options))[0])
    assert len(written) == (1 if change == "head" else 2)
    if change == "head":
        assert torch.equal(found, first)
    else:
        torch.testing.assert_close(found.float(), expected(setting, options["rows"]), rtol=1e-3, atol=1e-3)


def test_a_stored_dataset_is_known_by_its_rows_and_processor(cache, image_dataset, written):
    rows, processor = shades(image_dataset)
    for _ in range(2):
        open_or_write(cache(rows, processor=processor))
    assert len(written) == 1
    again, _ = shades(image_dataset.select([0, 1, 2, 3, 5, 4]))
    open_or_write(cache(again, processor=processor))
    assert len(written) == 2
    processor.image_mean = [0.4, 0.4, 0.4]
    open_or_write(cache(again, processor=processor))
    assert len(written) == 3


def test_images_changed_behind_the_fingerprint_are_noticed(cache, tmp_path, written):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for number in (10, 200):
        for i, file in enumerate(files):
            Image.new("RGB", (32, 32), (number, 40 * i, 0)).save(file)
        dataset = datasets.Dataset.from_dict({"image": [str(file) for file in files], "label": [0, 1, 2]})
        rows, processor = shades(dataset.cast_column("image", datasets.Image()))
        open_or_write(cache(rows, processor=processor))
    assert len(written) == 2


@pytest.mark.parametrize("lost", ["*.arrow", "trunk.json"])
def test_a_cache_that_lost_a_file_is_computed_anew(lost, cache, setting, images):
    made = cache()
    open_or_write(made)
    next(made.folder.glob(lost)).unlink()
    (rows,) = open_or_write(cache())
    torch.testing.assert_close(activations(rows), expected(setting, images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "named"),
    [(KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, RuntimeError), (OSError(28, "No space"), DiskSpaceError)],
)
def test_interrupted_writing_leaves_nothing(error, named, cache, tmp_path, monkeypatch):
    made, count, compute = cache(), [], TrunkSplit.activations

    def interrupted(*args):
        count.append(1)
        if len(count) == 2:
            raise error
        return compute(*args)

    monkeypatch.setattr(TrunkSplit, "activations", interrupted)
    with pytest.raises(named):
        open_or_write(made)
    assert [path.name for path in (tmp_path / "trunk").iterdir()] in ([".lock"], [])


def test_activations_too_large_for_float16_and_images_of_unequal_size_are_refused(cache, images):
    rows = images()
    rows[4]["pixel_values"] *= 1e9
    with pytest.raises(NonFiniteError, match=r"for row 4 of images.*cache_trunk='float32'"):
        open_or_write(cache(rows, dtype="float16"))
    with pytest.raises(ShapeError):
        open_or_write(cache([*images(2), {"pixel_values": torch.zeros(3, 64, 64), "labels": 0}], batch_size=1))


@pytest.mark.parametrize(
    "extra", [{"bool_masked_pos": torch.ones(1)}, {"labels": torch.ones(1, 3)}], ids=["column", "soft"]
)
def test_what_cannot_be_stored_is_refused(extra, cache):
    with pytest.raises(DataError, match=next(iter(extra))):
        cache(collate=lambda rows: {"pixel_values": torch.stack([row["pixel_values"] for row in rows])} | extra)


# ---- one process by itself; two are in tests/distributed/test_spread_two_ranks.py


@pytest.mark.parametrize("size", [None, "8"], ids=["nothing set", "a scheduler's size alone"])
def test_without_a_launcher_a_process_is_alone(size, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert launched() is ALONE and ALONE.first and ALONE.count == 1


def test_an_error_of_ones_own_stays_what_it_is():
    with pytest.raises(KeyError, match="mine"):
        ALONE.together(lambda: {}["mine"])
