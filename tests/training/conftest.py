"""Tiny trainers: a ViT, a ResNet or a MobileNetV2 on images of 8 to 32 pixels."""

from functools import partial

import pytest
import torch
import transformers as hf
from families import calibrate

from hf_immunize.training import callbacks, checkpoints, record, spectrum_figure
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.trainer import ImmunizationTrainer


LABELS = {"num_labels": 2}
VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
VIT |= {"image_size": 8, "patch_size": 4, "initializer_range": 0.3}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
MOBILENET = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4}
MODELS = {
    "vit": lambda **options: hf.ViTForImageClassification(hf.ViTConfig(**VIT, **LABELS, **options)),
    "resnet": lambda **options: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET, **LABELS, **options)),
    "mobilenet_v2": lambda **options: hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(**MOBILENET, **LABELS, **options)
    ),
}


@pytest.fixture(scope="session")
def tiny():
    """Build a seeded tiny classifier of two labels."""

    def build(name="vit", **options):
        torch.manual_seed(0)
        model = MODELS[name](**options)
        if name == "vit":
            # Without a bias, normalized features lie in a plane: rounding alone sets the smallest singular value.
            model.vit.layernorm.bias.data.normal_()
        return calibrate(model)

    return build


@pytest.fixture(scope="session")
def images():
    """Make rows of seeded pixel values with labels 0 and 1 in turn."""

    def make(count=16, seed=1, size=8, labels=True):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(count, 3, size, size, generator=generator)
        return [{"pixel_values": image} | ({"labels": i % 2} if labels else {}) for i, image in enumerate(pixels)]

    return make


def arguments_of(output_dir, **options):
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        # The paper's objective with the task's own loss: what most tests are about holds for any method.
        "objective": "kappa",
        "benign_loss": "task",
        # Runs of a few steps would be over before the rate has risen.
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
    }
    return ImmunizationArguments(**(defaults | options))


@pytest.fixture
def arguments(tmp_path):
    """Make arguments for a short quiet run on the CPU into a temporary folder."""
    return partial(arguments_of, tmp_path / "run")


@pytest.fixture(scope="session")
def trainer_in(tiny, images):
    """Make a trainer that writes to a folder; options that are the Trainer's go to it, all others to its arguments."""

    def make(folder, model=None, **options):
        if model is None or isinstance(model, str):
            model = tiny(model or "vit")
        size = 32 if model.config.model_type == "mobilenet_v2" else 8
        given = {
            "train_dataset": images(16, 1, size),
            "harmful_dataset": images(16, 2, size, labels=False),
            "eval_dataset": images(24, 3, size),
            "harmful_eval_dataset": images(24, 4, size, labels=False),
        }
        names = (*given, "processing_class", "data_collator", "compute_metrics", "compute_loss_func", "callbacks")
        names += ("distillation_dataset", "optimizers", "model_init")
        given |= {name: options.pop(name) for name in names if name in options}
        kind = options.pop("kind", ImmunizationTrainer)
        args = options.pop("args", None) or arguments_of(options.pop("output_dir", folder), **options)
        return kind(None if "model_init" in given else model, args, **given)

    return make


@pytest.fixture
def trainer(trainer_in, tmp_path):
    """As `trainer_in`, in the test's own folder."""
    return partial(trainer_in, tmp_path / "run")


@pytest.fixture
def plain(tiny, images, tmp_path):
    """Make a plain Trainer with dropout that evaluates and saves after each step."""

    def make(callback=None, folder=None, model=None, **options):
        defaults = {
            "output_dir": str(folder or tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
        }
        data = {"train_dataset": images(16, 1), "eval_dataset": images(8, 3)}
        names = ("compute_metrics", "train_dataset", "eval_dataset")
        data |= {name: options.pop(name) for name in names if name in options}
        args = hf.TrainingArguments(**(defaults | options))
        each = callback if isinstance(callback, list) else [] if callback is None else [callback]
        return hf.Trainer(model or tiny("vit", hidden_dropout_prob=0.2), args, **data, callbacks=each)

    return make


@pytest.fixture
def warnings(monkeypatch):
    """What loggers of the training modules warn of, once a test asks for it."""
    said = []
    for module in (callbacks, checkpoints, record, spectrum_figure):
        for name in ("warning", "warning_once"):
            monkeypatch.setattr(module.logger, name, said.append)
    return said


@pytest.fixture(scope="session")
def at():
    """Make a callback that does something with state, control and model at an event."""

    def make(event, action):
        def run(self, args, state, control, model=None, **kwargs):
            action(state, control, model)

        return type("At", (hf.TrainerCallback,), {event: run})()

    return make


@pytest.fixture
def gradients(at):
    """A callback that keeps the gradients before each optimizer step, as its ``steps``."""

    def keep(state, control, model):
        callback.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    callback = at("on_pre_optimizer_step", keep)
    callback.steps = []
    return callback
