"""A run of which the second process is killed after three steps: ``torchrun ... killed_rank.py FOLDER``."""

import os
import signal
import sys

import torch.distributed as dist
import transformers as hf
from two_ranks import resumable


class Killed(hf.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    resumable(sys.argv[1], dropout=0.2, callbacks=[Killed()]).train()
