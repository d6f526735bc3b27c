"""A run that was stopped and resumed is the run that was not stopped, bit for bit."""

import shutil

import pytest
import torch
import transformers as hf

from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.trainer import ImmunizationTrainer


def build(name):
    torch.manual_seed(0)
    if name == "vit":
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        config = hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2, hidden_dropout_prob=0.2)
        model = hf.ViTForImageClassification(config)
        # Without a bias, normalized features lie in a plane; the rank then grows in training, and RIR is undetermined.
        model.vit.layernorm.bias.data.normal_()
        return model
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, num_labels=2))


def rows(count, seed):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]


def trainer(name, folder, **options):
    settings = {"max_steps": 5} | options
    args = ImmunizationArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **settings,
    )
    sets = {"distillation_dataset": rows(7, 5)} if "benign_budget" in options else {}
    sets |= {"train_dataset": rows(17, 1), "harmful_dataset": rows(9, 2), "eval_dataset": rows(20, 3)}
    return ImmunizationTrainer(build(name), args, **sets, harmful_eval_dataset=rows(20, 4))


PAPER = {"objective": "kappa", "benign_loss": "task"}
RUNS = [
    ("vit", PAPER),
    ("resnet", PAPER),
    ("resnet", PAPER | {"freeze_batchnorm": False}),
    # The defaults, with directions and starting weights, and a set beside.
    ("vit", {"benign_budget": 0.1, "harmful_batch_size": 3}),
    ("resnet", {"benign_loss": "both", "objective": "kappa", "gradient_accumulation_steps": 2, "max_steps": 5}),
]


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory):
    """A run of five steps, four to an epoch, that nothing stopped."""
    name, options = request.param
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(name, folder, **options)
    run.train()
    return name, options, folder, run, run.evaluate()


def copy(folder, to, last):
    """The folder as it was when the run stopped after a step."""
    for step in range(1, last + 1):
        shutil.copytree(folder / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def same(model, other):
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("last", "by_path"), [(2, True), (4, False)])
def test_a_resumed_run_is_the_whole_one(whole, last, by_path, tmp_path):
    name, options, folder, run, metrics = whole
    copy(folder, tmp_path, last)
    torch.manual_seed(99)
    resumed = trainer(name, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}") if by_path else True)
    assert resumed.state.global_step == 5 and same(resumed.model, run.model)
    logs = [
        {entry["step"]: entry["loss"] for entry in each.state.log_history if "loss" in entry}
        for each in (run, resumed)
    ]
    assert logs[0] == logs[1]
    found = resumed.evaluate()
    names = [key for key in metrics if "kappa" in key or "rank" in key or "ratio" in key or "rir" in key]
    # As text, in which an undetermined RIR equals itself.
    assert "eval_rir" in names and [repr(found[key]) for key in names] == [repr(metrics[key]) for key in names]
    assert same(type(run.model).from_pretrained(folder / "checkpoint-5"), run.model)
