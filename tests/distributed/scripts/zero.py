"""What two processes find under each stage of DeepSpeed's ZeRO, on the CPU: ``torchrun ... zero.py FOLDER IMAGES``."""

import json
import os
import sys
from pathlib import Path


os.environ["DS_ACCELERATOR"] = "cpu"

import torch.distributed as dist
from sharded import command, forget, through
from two_ranks import DEFAULTS, rank, trainer, vit

from hf_immunize.cli.train import run_train


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder, images = map(Path, sys.argv[1:])
    found, batches = {}, ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for stage in (1, 2, 3):
        settings = dict.fromkeys((*batches, "gradient_clipping"), "auto") | {"zero_allow_untested_optimizer": True}
        settings["zero_optimization"] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        found[stage] = through(folder / f"zero{stage}", trainer, vit, DEFAULTS | {"deepspeed": settings})
        (folder / f"{stage}.json").write_text(json.dumps(settings))
        forget()
        words = command(images, folder / f"command{stage}", "--deepspeed", folder / f"{stage}.json")
        run_train(words)
        forget()
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
