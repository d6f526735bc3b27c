"""What three processes find, of which the last is killed: ``torchrun ... three_ranks.py FOLDER``."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from killed_rank import Killed
from two_ranks import DEFAULTS, gradients, rank, resumable, run


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    found = {"gradients": gradients(), "run": run(folder, first=True, **DEFAULTS)}
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    resumable(folder, batch=12, callbacks=[Killed()]).train()
