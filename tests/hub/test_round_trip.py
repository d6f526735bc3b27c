"""What is saved and published is the whole model: it loads back with the logits it had, or is refused by name."""

import shutil

import peft
import pytest
import torch
import transformers as hf
from checkpoints import benign_images, harmful_images, image_set, tiny_model
from families import BUILDERS, TRANSFORMER
from hub_server import TOKEN, USER
from safetensors.torch import load_file, save_file
from torch import nn

from hf_immunize import ImmunizationArguments, ImmunizationTrainer, load_immunized, verify
from hf_immunize.audit.run import audit
from hf_immunize.cli.train import run_train
from hf_immunize.errors import CheckpointError, HeadError, ImmunizationError, WeightsError
from hf_immunize.hub.load import load_model
from hf_immunize.hub.push import files_to_push, push
from hf_immunize.hub.record import read_record
from hf_immunize.vision.bare import with_linear_head
from hf_immunize.vision.head import find_head
from hf_immunize.vision.loading import load_classifier


REPO, BASE = f"{USER}/immunized", f"{USER}/base"


def trainer_of(model, folder, size, **options):
    pixels = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(pixels)]
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    defaults |= {"use_cpu": True, "save_strategy": "no", "objective": "kappa", "learning_rate": 1e-2}
    defaults |= {"warmup_steps": 0}
    sides = dict.fromkeys(("train_dataset", "harmful_dataset", "eval_dataset", "harmful_eval_dataset"), rows)
    return ImmunizationTrainer(model, ImmunizationArguments(str(folder), **(defaults | options)), **sides)


def with_dropout(model):
    """The model with its head in a container of the user's own."""
    name, head = find_head(model)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(nn.Dropout(0.5), head))
    return model


def with_adapter(model, held):
    """The model with an adapter that does something, on the last layer of its backbone that can have one."""
    head, _ = find_head(model)
    inside = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n != head]
    grouped = {n for n, m in model.named_modules() if getattr(m, "groups", 1) > 1}
    target = [name for name in inside if name not in grouped and "pooler" not in name][-1]
    saved = [head] if held else None
    config = peft.LoraConfig(r=2, target_modules=[target], modules_to_save=saved, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def drawn_model(family, head, dtype, adapted, held, num_labels, folder):
    """A model as a user has it before the Trainer, with weights that no initialization would draw again."""
    torch.manual_seed(1)
    config = BUILDERS[family]().config
    config.num_labels = num_labels
    if head in ("cls", "mean", "pooler"):
        backbone = hf.AutoModel.from_config(config)
        backbone.to(dtype).save_pretrained(folder)
        backbone = hf.AutoModel.from_pretrained(folder, dtype=dtype)
        model = with_linear_head(backbone, num_labels, head)
    else:
        kind = hf.AutoModel if head == "headless" else hf.AutoModelForImageClassification
        kind.from_config(config).to(dtype).save_pretrained(folder)
        model = hf.AutoModelForImageClassification.from_pretrained(folder, dtype=dtype, num_labels=num_labels)
    if head == "dropout":
        model = with_dropout(model)
    return with_adapter(model, held) if adapted else model


@torch.no_grad()
def logits(model):
    """In float32, in which weights of half precision are exact."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model.eval().float()(pixel_values=pixels).logits


# Family, head, dtype, an adapter or none, one that holds the head or not. (An adapter refuses a head in a container,
# see below; mobilenet_v2 reads the stride of its convolutions, and PEFT's have none.)
MODELS = [
    ("vit", "own", torch.bfloat16, True, True),
    ("vit", "headless", torch.float32, True, False),
    ("dinov2", "cls", torch.bfloat16, True, False),
    ("dinov2", "dropout", torch.float32, False, False),
    ("swin", "pooler", torch.bfloat16, True, True),
    ("resnet", "own", torch.float32, True, False),
    ("convnext", "mean", torch.float32, True, True),
    ("mobilenet_v2", "dropout", torch.bfloat16, False, False),
    ("mobilenet_v2", "pooler", torch.float32, False, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head", "dtype", "adapted", "held"), MODELS)
def test_any_model_loads_back_from_the_files_that_would_be_pushed(family, head, dtype, adapted, held, tmp_path):
    model = drawn_model(family, head, dtype, adapted, held, 5, tmp_path / "base")
    trainer = trainer_of(model, tmp_path / "run", 32)
    trainer.save_model()
    (tmp_path / "pushed").mkdir()
    for name in files_to_push(tmp_path / "run", None):
        shutil.copyfile(tmp_path / "run" / name, tmp_path / "pushed" / name)
    loaded, expected = load_model(tmp_path / "pushed"), logits(trainer.model)
    assert isinstance(loaded, hf.PreTrainedModel) and loaded.config.num_labels == 5
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def processor():
    return hf.ViTImageProcessorPil(size={"height": 8, "width": 8})


def save_base(model, folder):
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Images to train and to measure on, by side, where the user types."""
    monkeypatch.chdir(tmp_path)
    sides = {"benign": benign_images(), "harmful": harmful_images()}
    sides |= {f"{side}_eval": image_set(7, images.features["label"].names) for side, images in sides.items()}
    for name, images in sides.items():
        images.save_to_disk(tmp_path / name)
    return sides


def train_by_command(tmp_path, data, base, *words):
    """`hf-immunize train`, as it is typed."""
    save_base(base, tmp_path / "base")
    common = ["--model", "base", "--output_dir", "run", "--use_cpu", "--disable_tqdm", "True", "--report_to", "none"]
    common += [word for name in data for word in (f"--{name}", name)]
    return run_train([*common, "--max_steps", "2", "--per_device_train_batch_size", "8", *words])


def train_by_script(model, data):
    """The three lines of the README: train, save, evaluate."""
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True}
    trainer = ImmunizationTrainer(
        model,
        ImmunizationArguments("run", use_cpu=True, **options),
        train_dataset=data["benign"],
        harmful_dataset=data["harmful"],
        eval_dataset=data["benign_eval"],
        harmful_eval_dataset=data["harmful_eval"],
        processing_class=processor(),
    )
    trainer.train()
    trainer.save_model()
    trainer.evaluate()


def train_adapter(tmp_path, data, api):
    save_base(tiny_model(), tmp_path / "base")
    push(tmp_path / "base", BASE, require_record=False, api=api)
    train_by_script(with_adapter(hf.AutoModelForImageClassification.from_pretrained(BASE), held=False), data)


POOLED = ("--pooling", "mean", "--benign_loss", "task")
TRAINED = {
    "plain": lambda folder, data, api: train_by_command(folder, data, tiny_model()),
    "pooled": lambda folder, data, api: train_by_command(folder, data, tiny_model().vit, *POOLED),
    "bf16": lambda folder, data, api: train_by_command(folder, data, tiny_model().to(torch.bfloat16)),
    "custom head": lambda folder, data, api: train_by_script(with_dropout(tiny_model()), data),
    "adapter": train_adapter,
}


@pytest.mark.hub
@pytest.mark.parametrize("trained", TRAINED)
def test_trained_pushed_and_loaded_it_is_verified(trained, data, tmp_path, api, online):
    TRAINED[trained](tmp_path, data, api)
    assert push("run", REPO, api=api).changed
    for name, content in online.files(REPO).items():
        assert TOKEN.encode() not in content and str(tmp_path).encode() not in content, name
    model, record = load_immunized(REPO)
    found = verify(REPO, **{side: str(tmp_path / f"{side}_eval") for side in ("benign", "harmful")}, progress=False)
    assert found.outcome == "agrees", str(found)
    assert record == read_record("run")
    pixels = torch.randn(4, 3, 8, 8)
    here = load_classifier("run")
    torch.testing.assert_close(model(pixel_values=pixels).logits, here(pixel_values=pixels).logits, rtol=0, atol=0)
    if trained == "plain":  # anyone can use it without this library
        elsewhere = hf.AutoModelForImageClassification.from_pretrained(REPO).eval()
        torch.testing.assert_close(elsewhere(pixel_values=pixels).logits, here(pixel_values=pixels).logits)


def damage(folder, how):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name == "classifier.weight")
    if how == "unexpected":
        weights["classifier.extra.weight"] = torch.ones(2, 2)
    elif how == "missing":
        weights.pop(name)
    elif how == "mismatched":
        weights[name] = torch.ones(5, 8)
    else:
        weights["classifier.1.weight"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def trained_again(folder):
    benign = folder.parent / "benign"
    benign_images().save_to_disk(benign)
    words = ["--model", folder, "--benign", benign, "--harmful", benign, "--output_dir", folder.parent / "run"]
    run_train([str(word) for word in (*words, "--use_cpu", "--report_to", "none")])


LOADERS = {
    "load_immunized": load_immunized,
    "verify": lambda folder: verify(folder, benign=benign_images(), harmful=harmful_images(), progress=False),
    "audit": lambda folder: audit(str(folder), harmful=harmful_images(), processing_class=processor(), progress=False),
    "train": trained_again,
    "push": lambda folder: push(folder, REPO, dry_run=True, require_record=False),
}


@pytest.mark.parametrize(
    ("loader", "hows"),
    [("load_immunized", ("missing", "unexpected", "mismatched")), *((loader, ("renamed",)) for loader in LOADERS)],
)
@pytest.mark.filterwarnings("ignore::hf_immunize.errors.WeightsChangedWarning")
def test_weights_that_do_not_fit_are_refused_by_name(made, loader, hows, tmp_path):
    for how in hows:
        checkpoint = shutil.copytree(made, tmp_path / how)
        damage(checkpoint, how)
        if loader == "push":
            (checkpoint / "immunization.json").unlink()  # of other weights
        with pytest.raises(WeightsError, match="classifier"):
            LOADERS[loader](checkpoint)


def test_a_head_that_would_be_lost_is_refused_before_training(tmp_path):
    heads = [
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.ReLU(), nn.Linear(16, 3)),
        nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)),
        nn.Linear(16, 3, bias=False),
    ]
    models = [BUILDERS["vit"]() for _ in heads]
    for model, head in zip(models, heads, strict=True):
        model.classifier = head
    for model in (*models, with_adapter(with_dropout(BUILDERS["vit"]()), held=False)):
        with pytest.raises(HeadError, match="classifier"):
            trainer_of(model, tmp_path, 32)


def test_a_model_that_is_another_one_when_loaded_is_not_saved_unsaid(tmp_path):
    trainer = trainer_of(BUILDERS["vit"](), tmp_path, 32)
    trainer.evaluate()
    trainer.model.classifier.register_forward_hook(lambda module, inputs, output: -output)
    with pytest.raises(CheckpointError, match="logits"):
        trainer.save_model()
    assert not (tmp_path / "immunization.json").exists()
    assert (tmp_path / "model.safetensors").is_file()  # what was learned is not thrown away


def test_a_custom_head_is_resumed_under_the_names_it_was_saved_with(tmp_path):
    def make(folder):
        torch.manual_seed(0)
        model = with_dropout(BUILDERS["vit"]())
        return trainer_of(model, folder, 32, max_steps=2, save_strategy="steps", save_steps=1)

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_another_form_in_the_same_folder_leaves_nothing_behind(tmp_path):
    backbone = hf.ViTModel(hf.ViTConfig(**TRANSFORMER, num_labels=3))
    trainer_of(with_linear_head(backbone, 3, "cls"), tmp_path, 32).save_model()
    assert (tmp_path / "head_config.json").is_file()
    trainer = trainer_of(BUILDERS["vit"](), tmp_path, 32)
    trainer.save_model()
    torch.testing.assert_close(logits(load_model(tmp_path)), logits(trainer.model), rtol=1e-5, atol=1e-6)


def test_an_adapter_whose_base_nobody_else_has_is_not_pushed(tmp_path):
    save_base(tiny_model(), tmp_path / "base")
    base = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    trainer_of(with_adapter(base, held=True), tmp_path / "run", 8).save_model()
    with pytest.raises(ImmunizationError, match="base"):
        push(tmp_path / "run", REPO, dry_run=True, require_record=False)


@pytest.mark.parametrize("order", ["save, evaluate", "evaluate, save"])
def test_saving_and_evaluating_leave_a_record_in_either_order(tmp_path, order):
    trainer = trainer_of(BUILDERS["vit"](), tmp_path, 32)
    trainer.train()
    for step in order.split(", "):
        {"save": trainer.save_model, "evaluate": trainer.evaluate}[step]()
    record = read_record(tmp_path)
    assert record.metric.after == trainer.evaluate()["eval_accuracy"]
    assert load_immunized(tmp_path)[1] == record


@pytest.mark.parametrize("form, code", [("plain", "AutoModelForImageClassification"), ("pooled", "load_classifier")])
def test_a_card_without_figures_says_so_and_how_the_model_loads(tmp_path, form, code):
    model = BUILDERS["vit"]()
    trainer = trainer_of(model if form == "plain" else with_linear_head(model.vit, 3, "cls"), tmp_path, 32)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{code}" in card.split("```")[1]
    body = card.split("# Immunized", 1)[1]  # behind the mark that names the file for every card
    assert "immunization.json" not in body and "verify" not in body
