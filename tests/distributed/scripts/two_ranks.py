"""What one process and two should agree on: ``torchrun ... two_ranks.py FOLDER OF_ONE OF_KILLED IMAGES``."""

import gc
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers as hf

from hf_immunize.data.images import ImageCollator
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.distributed import (
    broadcast_from_main,
    gather_features,
    gather_labels,
    mean_gradient_norm,
    sum_hessian,
    world_size,
)
from hf_immunize.training.immunization_callback import ImmunizationCallback
from hf_immunize.training.objectives import OBJECTIVES, Side
from hf_immunize.training.trainer import ImmunizationTrainer


PAPER = {"objective": "kappa", "benign_loss": "task"}
# A ViT has no ReLU.
TRAINED = [name for name, kind in OBJECTIVES.items() if not kind.looks_inside()]
SPECTRAL = [name for name in TRAINED if not OBJECTIVES[name].needs_rows]
# Its default would make steps of full size out of gradients that are rounding, as of the bias of attention's keys.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1e-2}
# Of 8 centred rows, as wide, the smallest eigenvalue would be rounding; its logarithm, and so all weights, follow it.
DEFAULTS = ADAM | {"max_steps": 4, "benign_budget": 0.1, "batch": 12}
FIXED = PAPER | {"benign_weight": 0.5, "harmful_weight": 2.0}


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def rows(count, seed, dtype=torch.float32):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]


def vit(dropout=0.0):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"image_size": 8, "patch_size": 4, "num_labels": 2, "initializer_range": 0.3}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, hidden_dropout_prob=dropout))
    model.vit.layernorm.bias.data.normal_()
    return model


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))


def gathered(gradient):
    """The rows of all ranks, over the number of ranks: the mean that data parallelism takes."""
    whole = [torch.empty_like(gradient) for _ in range(world_size())] if world_size() > 1 else [gradient]
    if world_size() > 1:
        dist.all_gather(whole, gradient)
    return (torch.cat(whole) / world_size()).tolist()


def gradients():
    """Gradients of every objective's terms on this rank's features."""
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(12, 4, dtype=torch.float64, generator=generator) for _ in range(2)]
    labels = torch.arange(12) % 3
    own = gather_labels(labels.chunk(world_size())[rank()])
    found = {}
    for name, objective in OBJECTIVES.items():
        for dtype in (torch.float32, torch.float64):
            parts = [each.to(dtype).chunk(world_size())[rank()].clone().requires_grad_() for each in features]
            routes = {"rows": gather_features}
            if dtype == torch.float32 and name in SPECTRAL:
                routes["sum"] = sum_hessian
            for route, whole in routes.items():
                given, inside = [whole(part) for part in parts], [{"relu": part} for part in parts]
                terms = objective()(Side(given[0], inner=inside[0]), Side(given[1], labels=own, inner=inside[1]))
                every = terms.benign | terms.harmful | terms.inner
                torch.stack(list(every.values())).sum().backward()
                case = f"{name} {str(dtype).removeprefix('torch.')} {route}"
                found[case] = [gathered(part.grad) for part in parts if part.grad is not None]
                for part in parts:
                    part.grad = None
    return found


def norm():
    """Norm of the gradient of a loss that is the mean over all rows."""
    gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    part = gradient.chunk(world_size())[rank()] * world_size()
    return float(mean_gradient_norm(torch.linalg.vector_norm(part)))


def trainer(folder, model, dtype=torch.float32, callbacks=None, batch=8, **options):
    """For steps over a global batch of 8 images a side and evaluations of 13 and 11, which no batch size divides."""
    defaults = {"max_steps": 1, "optim": "sgd", "save_strategy": "no", "max_grad_norm": 0.0}
    options = defaults | options
    args = ImmunizationArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch // world_size() // options.get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world_size() > 1 else None,
        **options,
    )
    sets = {"train_dataset": rows(2 * batch, 1, dtype), "harmful_dataset": rows(2 * batch, 2, dtype)}
    sets |= {"eval_dataset": rows(13, 3, dtype), "harmful_eval_dataset": rows(11, 4, dtype)}
    if args.benign_loss == "distillation":
        sets["distillation_dataset"] = rows(10, 5, dtype)
    return ImmunizationTrainer(model, args, **sets, callbacks=callbacks)


def outcome(run):
    """Weights, last log, and metrics of a Trainer."""
    names = ("kappa", "rank", "rir", "ratio", "accuracy", "loss")
    metrics = {key: value for key, value in run.evaluate().items() if any(name in key for name in names)}
    metrics.pop("eval_model_preparation_time", None)
    log = [entry for entry in run.state.log_history if "loss" in entry][-1]
    names = ["loss", "benign_loss", "r_well", "r_ill", "benign_weight", "harmful_weight", "kl"]
    names += ["total_variation", "spread", "outside", "concentration", "negative_adapted_loss", "negative_log_kappa"]
    moved = {name: p.flatten().tolist() for name, p in run.model.named_parameters() if p.requires_grad}
    return {"metrics": metrics, "log": {name: log[name] for name in names if name in log}, "weights": moved}


def run(folder, dtype=torch.float32, model=None, first=False, **options):
    done = trainer(folder, (model or vit()).to(dtype), dtype, **options)
    if first:
        done.evaluate()
    done.train()
    return outcome(done)


def summed(folder):
    """Batches of which the Hessian is smaller than the features, 8 numbers a row; and how often it was summed."""
    options = {"batch": 40, "max_steps": 2}
    with mock.patch("hf_immunize.training.step.sum_hessian", wraps=sum_hessian) as used:
        runs = {f"summed {name}": run(folder, **options, **PAPER | {"objective": name}) for name in SPECTRAL}
        runs["summed distilled"] = run(folder, **options, objective="concentration")
    return runs, used.call_count


def exactly(folder):
    """In float64: every objective, and what remembers or is a function of the whole batch."""
    imma = {"objective": "imma", "benign_loss": "both", "benign_budget": 0.1}
    found = {name: run(folder, torch.float64, **PAPER | {"objective": name, "max_steps": 2}) for name in TRAINED}
    return found | {
        "distilled": run(folder, torch.float64, max_steps=4, benign_budget=0.1),
        "defaults": run(folder, torch.float64, first=True, **DEFAULTS),
        "both": run(folder, torch.float64, max_steps=2, **imma),
        "dead_relu": run(folder, torch.float64, resnet(), objective="dead_relu", max_steps=2),
    }


def plain(folder, **options):
    """Arguments of someone else's Trainer."""
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    backend = "gloo" if world_size() > 1 else None
    return hf.TrainingArguments(output_dir=str(folder), ddp_backend=backend, **quiet, **options)


def beside_a_trainer(folder, objective):
    """Steps of someone else's Trainer, with a callback."""
    callback = ImmunizationCallback(rows(16, 2), rows(16, 1), **PAPER | {"objective": objective})
    size = 8 // world_size()
    args = plain(folder, per_device_train_batch_size=size, max_steps=2, optim="sgd", save_strategy="no")
    done = hf.Trainer(vit(), args, train_dataset=rows(16, 1), callbacks=[callback])
    done.train()
    return {name: parameter.flatten().tolist() for name, parameter in done.model.named_parameters()}


def resumable(folder, dropout=0.0, callbacks=None, **options):
    """A run of five steps in epochs of two, which keeps a checkpoint of each; in float64.

    The small eigenvalues of eight rows in eight dimensions magnify what float32 rounds off in sums of another order.
    """
    kept = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "benign_budget": 0.1}
    return trainer(folder, vit(dropout).double(), torch.float64, callbacks, **kept | ADAM | options)


def resumed(source, folder, last=None, **options):
    """Go on from a copy of another run's folder, as it was after a step."""
    if rank() == 0:
        shutil.copytree(source, folder)
        for path in Path(folder).glob("checkpoint-*"):
            if last is not None and int(path.name.split("-")[1]) > last:
                shutil.rmtree(path)
    if world_size() > 1:
        dist.barrier()
    done = resumable(folder, **options)
    done.train(resume_from_checkpoint=True)
    return outcome(done) | {"step": done.state.global_step}


def uninterrupted(folder, **options):
    done = resumable(folder, **options)
    done.train()
    return outcome(done)


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __init__(self, stored):
        self.stored = stored

    def __iter__(self):
        return iter(self.stored)


def measured(folder):
    """Sets that are awkward to deal out: of one image, so that one process holds none; a stream, of each length."""
    done = trainer(folder, vit(), **FIXED)
    loaders = {"one image": done.get_eval_dataloader(rows(1, 6))}
    for count in (8, 11, 13):
        stream = torch.utils.data.DataLoader(Stream(rows(count, 6)), 4, collate_fn=ImageCollator())
        loaders[f"stream of {count}"] = done.accelerator.prepare(stream)
    found = {name: done._measure(loader, name) for name, loader in loaders.items()}
    return {name: (each.factor.num_samples, each.checksum) for name, each in found.items()}


def everything(folder):
    gc.freeze()  # or each Trainer collects what was imported, for most of a second
    folder = Path(folder)
    of_sums, sums = summed(folder)
    return {
        "world_size": world_size(),
        "sums": sums,
        "gradients": gradients(),
        "norm": norm(),
        "main": broadcast_from_main({"rank": rank()}),
        "runs": {
            "fixed": run(folder, **FIXED),
            "adam": run(folder, **PAPER, max_steps=2, **ADAM),
            # Starting model, gate and a third set; evaluated first, as by the command.
            "defaults": run(folder, first=True, **DEFAULTS),
            "bf16": run(folder, bf16=True, **DEFAULTS),
            "cached": run(folder / "cached", cache_trunk="float32", **FIXED),
            **of_sums,
        },
        "exactly": exactly(folder),
        "beside": {name: beside_a_trainer(folder, name) for name in ("time", "imma")},
        "measured": measured(folder),
        "whole": uninterrupted(folder / "whole"),
    }


def on_two(folder, of_one, of_killed, images):
    from callbacks_two_ranks import callbacks
    from sharded import commands, sharded, through

    commands(folder, images)
    return everything(folder) | {
        "from_one": resumed(of_one / "whole", folder / "from_one", last=3),
        "dropout": uninterrupted(folder / "dropout", dropout=0.2),
        "after_kill": resumed(of_killed, folder / "after_kill", dropout=0.2),
        "callbacks": callbacks(folder, plain, vit, rows),
        "ddp": through(folder / "ddp", trainer, vit, DEFAULTS),
        "fsdp2": sharded(folder, trainer, vit, DEFAULTS),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    target = Path(sys.argv[1])
    found = on_two(target, *map(Path, sys.argv[2:]))
    each = [None, None]
    dist.all_gather_object(each, {name: found[name] for name in ("callbacks", "exactly")})
    if rank() == 0:
        (target / "found.json").write_text(json.dumps(found | {"each": each}))
    dist.barrier()
    dist.destroy_process_group()
