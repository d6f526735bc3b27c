"""A run of which the last process is killed after three steps: ``torchrun ... killed_rank.py FOLDER``."""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
import transformers as hf
from two_ranks import resumable


class Killed(hf.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == args.world_size - 1:
            Path(args.output_dir, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    resumable(sys.argv[1], dropout=0.2, callbacks=[Killed()]).train()
