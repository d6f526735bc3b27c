"""An audit of which the second process fails at its first attack, while the first one is in one without end."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.cli.main import main
from hf_immunize.errors import WeightsError


def endless(*_):
    time.sleep(600)


def fail(*_):
    while '"ridge"' not in (JOURNAL.read_text() if JOURNAL.exists() else ""):
        time.sleep(0.1)
    raise WeightsError("the weights are gone")


if __name__ == "__main__":
    JOURNAL = Path(sys.argv[-1], "outcomes.jsonl")
    second = os.environ["RANK"] == "1"
    for name in ("knn", "bias_only"):
        ATTACKERS[name] = replace(ATTACKERS[name], run=fail if second else endless)
    main()
