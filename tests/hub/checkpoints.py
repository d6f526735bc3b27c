"""Tiny checkpoints with records that are true of them."""

import datasets
import numpy as np
import torch
import transformers as hf
from PIL import Image

from hf_immunize.hub.collect import describe_side, exact_ratio, intercept_ratio, software_versions
from hf_immunize.hub.load import hash_weights
from hf_immunize.hub.record import (
    AttackRecord,
    AuditRecord,
    BaseModelRecord,
    DataRecord,
    ImmunizationRecord,
    MethodRecord,
    MetricRecord,
    write_record,
)
from hf_immunize.hub.verify import image_rows, measure


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


def make_record(model, reference, processor, benign, harmful):
    sides, pairs, data, metric = {}, {}, {}, None
    for side, images in (("benign", benign), ("harmful", harmful)):
        rows = image_rows(images, side, model)
        now, then = (measure(m, rows, processor, progress=False) for m in (model, reference))
        pairs[side] = now.measurement, then.measurement
        sides[side] = describe_side(*pairs[side])
        data[side] = DataRecord(f"{side} set", size=len(images), checksum=now.measurement.checksum, split="test")
        if side == "benign":
            metric = MetricRecord("accuracy", now.accuracy, then.accuracy)
    attack = AttackRecord("ridge", 0.71, reference_accuracy=0.75, chance=0.5)
    return ImmunizationRecord(
        MethodRecord("kappa", "last_stage", 3, 0, "auto", "auto", True, {"auto_weight_ratio": 0.3}),
        BaseModelRecord("user/vit-small", "main", True),
        benign=data["benign"],
        harmful=data["harmful"],
        metric=metric,
        benign_features=sides["benign"],
        harmful_features=sides["harmful"],
        ratios={"exact": exact_ratio(**sides), "intercept": intercept_ratio(**pairs)},
        audit=AuditRecord("quick", 1, {"head_input": attack}, {"immunized": 0.9}),
        image_processor="ViTImageProcessorPil",
        software=software_versions(),
        license="apache-2.0",
    )


def benign_images():
    return image_set(1, ["cat", "dog"])


def harmful_images():
    return image_set(2, ["gun", "knife"])


def reference_model():
    """The model before "immunization"."""
    model = tiny_model()
    model.vit.layernorm.weight.data[:3] *= 3.0
    return model


def write_checkpoint(folder):
    """A checkpoint, and the record beside it."""
    model, processor = tiny_model(), hf.ViTImageProcessorPil(size={"height": 8, "width": 8})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    record = make_record(model, reference_model(), processor, benign_images(), harmful_images())
    record.weights = hash_weights(folder)
    write_record(folder, record)
    return folder, record
