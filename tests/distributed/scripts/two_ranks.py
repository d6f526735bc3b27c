"""What one process and two should agree on, written as JSON by rank 0: ``torchrun ... two_ranks.py FOLDER``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf

from hf_immunize.spectra.regularizers import hessian_r_ill, hessian_r_well
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.distributed import gather_features, mean_gradient_norm, world_size
from hf_immunize.training.trainer import ImmunizationTrainer


PAPER = {"objective": "kappa", "benign_loss": "task", "benign_budget": None}
FIXED = PAPER | {"benign_weight": 0.5, "harmful_weight": 2.0}


def rows(count, seed):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2, initializer_range=0.3)
    model = hf.ViTForImageClassification(config)
    model.vit.layernorm.bias.data.normal_()
    return model


def gradients():
    """Gradients of the regularizers on this rank's features, as the mean over ranks that data parallelism takes."""
    features = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    part = features.chunk(world_size())[dist.get_rank() if world_size() > 1 else 0]
    found = {}
    for term in (hessian_r_well, hessian_r_ill):
        local = part.clone().requires_grad_()
        term(gather_features(local)).backward()
        # A parameter that shifts each rank's rows: its gradient is summed over rows, averaged over ranks.
        whole = [torch.empty_like(local.grad) for _ in range(world_size())]
        if world_size() > 1:
            dist.all_gather(whole, local.grad)
        else:
            whole = [local.grad]
        found[term.__name__] = (torch.cat(whole) / world_size()).tolist()
    return found


def norm():
    """Norm of the gradient of a loss that is the mean over all rows."""
    gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    part = gradient.chunk(world_size())[dist.get_rank() if world_size() > 1 else 0] * world_size()
    return float(mean_gradient_norm(torch.linalg.vector_norm(part)))


def run(folder, **options):
    """One step over a global batch of 8 images a side, then an evaluation of 13, which no batch size divides."""
    args = ImmunizationArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=8 // world_size() // options.get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=4,
        optim="sgd",
        learning_rate=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world_size() > 1 else None,
        **options,
    )
    sets = {"train_dataset": rows(16, 1), "harmful_dataset": rows(16, 2), "eval_dataset": rows(13, 3)}
    trainer = ImmunizationTrainer(vit(), args, **sets, harmful_eval_dataset=rows(11, 4))
    trainer.train()
    names = ("kappa", "rank", "rir", "ratio", "accuracy")
    metrics = {key: value for key, value in trainer.evaluate().items() if any(name in key for name in names)}
    log = next(entry for entry in trainer.state.log_history if "r_ill" in entry)
    names = ("loss", "benign_loss", "r_well", "r_ill", "benign_weight", "harmful_weight")
    moved = {name: p.flatten().tolist() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"metrics": metrics, "log": {name: log[name] for name in names}, "weights": moved}


def everything(folder):
    return {
        "world_size": world_size(),
        "gradients": gradients(),
        "norm": norm(),
        "auto": run(folder, **PAPER),
        "fixed": run(folder, **FIXED),
        "cached": run(f"{folder}/cached", cache_trunk="float32", **FIXED),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = everything(sys.argv[1])
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
