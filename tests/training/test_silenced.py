"""Training with the rectifiers' objective to its end, where harmful features are zero, and what is made of that."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.hub.record import read_record
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.trainer import ImmunizationTrainer
from hf_immunize.vision.features import penultimate_features


def images(count, seed, level):
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(0.5 * noise + level)]


@pytest.fixture(scope="module")
def silenced(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()
        for level in (-1.0, 1.0):
            model(pixel_values=torch.stack([one["pixel_values"] for one in images(32, 5, level)]))
    args = ImmunizationArguments(
        str(tmp_path_factory.mktemp("silenced")),
        objective="silence",
        max_steps=150,
        learning_rate=3e-2,
        per_device_train_batch_size=16,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        benign_budget=0.1,
    )
    sides = {"train_dataset": images(40, 1, -1.0), "harmful_dataset": images(40, 2, 1.0)}
    sides |= {"eval_dataset": images(24, 3, -1.0), "harmful_eval_dataset": images(24, 4, 1.0)}
    trainer = ImmunizationTrainer(model, args, **sides)
    trainer.train()
    return trainer, sides


def features(silenced, name):
    trainer, sides = silenced
    pixels = torch.stack([one["pixel_values"] for one in sides[name]])
    with torch.no_grad():
        return penultimate_features(trainer.model.eval(), pixels)


def test_features_of_unseen_harmful_images_are_zero(silenced):
    assert not features(silenced, "harmful_eval_dataset").any()


def test_benign_features_are_not(silenced):
    assert features(silenced, "eval_dataset").any(1).all()


def test_evaluation_reports_a_bound(silenced):
    metrics = silenced[0].evaluate()
    assert metrics["eval_harmful_rank"] == 0 and metrics["eval_rir_is_lower_bound"] == 1.0


def test_checkpoint_and_record_are_written(silenced, tmp_path):
    silenced[0].save_model(str(tmp_path))
    record = read_record(tmp_path)
    assert record.harmful_features.after.rank == 0


def test_all_zero_features_without_a_reference_stay_an_error():
    from hf_immunize.errors import RankError

    with pytest.raises(RankError, match="network is not dead"):
        feature_conditioning(torch.zeros(4, 3))


def test_no_gradient_of_the_harmful_task_passes_the_rectifiers(silenced):
    trainer, sides = silenced
    model = trainer.model.eval().requires_grad_()
    model.zero_grad()
    pixels = torch.stack([one["pixel_values"] for one in sides["harmful_eval_dataset"]])
    torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.arange(len(pixels)) % 2).backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    model.requires_grad_(False)
    assert moved == {"classifier.1.bias"}


def test_statistics_of_the_batch_bring_them_back(silenced):
    """What an attacker does who fine-tunes with BatchNorm in training mode; the documentation says so."""
    import copy

    trainer, sides = silenced
    model = copy.deepcopy(trainer.model).train()
    pixels = torch.stack([one["pixel_values"] for one in sides["harmful_eval_dataset"]])
    assert penultimate_features(model, pixels).any()
