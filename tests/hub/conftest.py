"""A Hub on loopback, and a tiny immunized checkpoint with its record."""

import os
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi
from PIL import Image

from hf_immunize.hub.collect import describe_side, exact_ratio, software_versions
from hf_immunize.hub.hashes import hash_weights
from hf_immunize.hub.measure import image_rows, measure
from hf_immunize.hub.parts import AttackRecord, AuditRecord, BaseModelRecord, DataRecord, MethodRecord, MetricRecord
from hf_immunize.hub.record import ImmunizationRecord, write_record


sys.path.insert(0, str(Path(__file__).parent))
from server import TOKEN, USER, Hub


REPO = f"{USER}/immunized"


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """The client in this process, turned to the loopback Hub; waiting costs no time."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def api(online):
    return HfApi(endpoint=online.url, token=TOKEN)


@pytest.fixture
def environment(hub, tmp_path):
    """For a process of its own: the client asks the loopback Hub, and a home with a telling name."""
    home = tmp_path / "home-of-alice"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    package = str(Path(__file__).parents[2])
    return kept | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [kept.get("PYTHONPATH")])]),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HOME": str(home),
        "USER": "alice",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = hf.ViTConfig(
        **sizes,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    model = hf.ViTForImageClassification(config).eval()
    model.vit.layernorm.bias.data.normal_()
    return model


def image_set(seed, names, count=24):
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    labels = [index % len(names) for index in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture
def benign():
    return image_set(1, ["cat", "dog"])


@pytest.fixture
def harmful():
    return image_set(2, ["gun", "knife"])


@pytest.fixture
def reference():
    """The model before "immunization"."""
    model = tiny_model()
    model.vit.layernorm.weight.data[:3] *= 3.0
    return model


@pytest.fixture
def checkpoint(tmp_path, benign, harmful, reference):
    """A checkpoint with a record that is true of it."""
    folder = tmp_path / "checkpoint"
    model, processor = tiny_model(), hf.ViTImageProcessorPil(size={"height": 8, "width": 8})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    record = make_record(model, reference, processor, benign, harmful)
    record.weights = hash_weights(folder)
    write_record(folder, record)
    return folder


def make_record(model, reference, processor, benign, harmful):
    sides, data, metric = {}, {}, None
    for side, images in (("benign", benign), ("harmful", harmful)):
        rows = image_rows(images, side, model)
        now, then = (measure(m, rows, processor, progress=False) for m in (model, reference))
        sides[side] = describe_side(now.measurement, then.measurement)
        data[side] = DataRecord(f"{side} set", size=len(images), checksum=now.measurement.checksum, split="test")
        if side == "benign":
            metric = MetricRecord("accuracy", now.accuracy, then.accuracy)
    attack = AttackRecord("ridge", 0.71, reference_accuracy=0.75, chance=0.5)
    return ImmunizationRecord(
        MethodRecord("kappa", "last_stage", 3, 0, "auto", "auto", 0.3, False, True),
        BaseModelRecord("user/vit-small", "main", True),
        benign=data["benign"],
        harmful=data["harmful"],
        metric=metric,
        benign_features=sides["benign"],
        harmful_features=sides["harmful"],
        ratios={"exact": exact_ratio(sides["benign"], sides["harmful"])},
        audit=AuditRecord("quick", 1, {"head_input": attack}, {"immunized": 0.9}),
        image_processor="ViTImageProcessorPil",
        software=software_versions(),
        license="apache-2.0",
    )


@pytest.fixture
def record(checkpoint):
    return ImmunizationRecord.from_json((checkpoint / "immunization.json").read_text())
