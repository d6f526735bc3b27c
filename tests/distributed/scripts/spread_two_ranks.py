"""Cached trunks of one process and of two, what each saw written as JSON, and then a command of the terminal's.

``torchrun ... spread_two_ranks.py FOLDER COMMAND``. In the end the second process fails; the command
comes after that, since a start costs more than either. Of an audit each process counts the attacks that it ran.
"""

import json
import sys
from pathlib import Path

import torch
import transformers as hf

from hf_immunize.audit.journal import Journal
from hf_immunize.cli.main import app
from hf_immunize.errors import NonFiniteError, ProcessError
from hf_immunize.features.cache import TrunkCache, open_or_write
from hf_immunize.features.ranks import launched
from hf_immunize.features.trunk import split_trunk
from hf_immunize.vision.scope import select_trainable


# Batches of 3: on two processes, 2 and 2 with a short one, and one that leaves the second process nothing to do.
COUNTS = {"many": 11, "few": 2}


def images(count, seed, scale=1.0):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    pixels[-1] *= scale
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pixels)]


def cache(folder, processes, rows, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()
    split = split_trunk(model, select_trainable(model, "last_stage"), (3, 8, 8))
    return TrunkCache(
        model, split, rows, folder, name=folder.name, batch_size=3, progress=False, processes=processes, **options
    )


def everything(folder, processes):
    made = [cache(folder / name, processes, images(count, 1)) for name, count in COUNTS.items()]
    written = dict(zip(COUNTS, open_or_write(*made), strict=True))
    found = {
        "processes": processes.count,
        "shares": processes.together(lambda: processes.share(range(5))),
        "rows": {name: [row["pixel_values"].tolist() for row in rows] for name, rows in written.items()},
        "labels": {name: [row["labels"] for row in rows] for name, rows in written.items()},
    }
    before = (folder / "many" / "trunk.json").stat().st_mtime_ns
    open_or_write(*[cache(folder / name, processes, images(count, 1)) for name, count in COUNTS.items()])
    found["found_again"] = before == (folder / "many" / "trunk.json").stat().st_mtime_ns
    try:
        # The last image, which is the last process's, is too large for float16.
        open_or_write(cache(folder / "failing", processes, images(11, 2, scale=1e30), dtype="float16"))
    except (NonFiniteError, ProcessError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    target, everyone = Path(sys.argv[1]), launched()
    result = everything(target, everyone)
    (target / f"found-{everyone.index}.json").write_text(json.dumps(result))
    ran, add = [], Journal.add
    Journal.add = lambda journal, outcome: (ran.append(outcome.access), add(journal, outcome))
    try:
        app(sys.argv[2:])
    finally:
        (target / f"ran-{everyone.index}.json").write_text(json.dumps(ran))
        torch.distributed.destroy_process_group()
