"""Write the table of model families: what "last_stage" means in each, how much of it is trainable, what the head sees.

python -m examples.backbones_page --output docs/backbones.md

The models have their usual sizes and no weights (the meta device), so that nothing is downloaded.
"""

import argparse
import itertools
import logging
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from hf_immunize.vision.families import FAMILIES, Family, classifier_class
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import last_stage


SHOWN = {kind: family for kind, family in FAMILIES.items() if family.checkpoint}

NOTES = Path(__file__).parent / "backbones_notes.md"


def whole_modules(model: Any, names: list[str]) -> list[str]:
    """The largest modules all of whose parameters are named, neighbours of a list as a range."""
    chosen, every = set(names), [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if all(other in chosen for other in every if other == prefix or other.startswith(f"{prefix}.")):
                break
        if prefix not in found:
            found.append(prefix)
    ranges = []
    for stem, group in itertools.groupby(
        found, key=lambda name: name.rpartition(".")[0] if name[-1].isdigit() else name
    ):
        members = list(group)
        last = members[-1].rpartition(".")[2]
        ranges.append(members[0] if len(members) == 1 else f"{stem}.{members[0].rpartition('.')[2]} … {last}")
    return ranges


def row(kind: str, family: Family) -> list[str]:
    """The cells of one family."""
    config = hf.AutoConfig.for_model(kind, num_labels=1000, **family.sizes)
    with torch.device("meta"):
        model = classifier_class(config)(config)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    stage = last_stage(model)
    moves, total = sum(sizes[key] for key in stage), sum(sizes.values())
    return [
        family.name,
        f"`{family.checkpoint}`",
        ", ".join(f"`{part}`" for part in whole_modules(model, stage)),
        f"{moves / 1e6:.2f} M",
        f"{total / 1e6:.2f} M",
        f"{100 * moves / total:.0f} %",
        str(find_head(model)[1].in_features),
        family.head_input,
        "yes" if model.supports_gradient_checkpointing else "no",
    ]


def page() -> str:
    """The whole page."""
    columns = ["family", "sizes of", "last stage", "trainable", "of", "share", "D", "the head sees", "checkpointing"]
    rows = [columns, ["---", "---", "---", "---:", "---:", "---:", "---:", "---", "---"]]
    rows += [row(kind, family) for kind, family in SHOWN.items()]
    lines = [
        "# Model families",
        "",
        "Written by `python -m examples.backbones_page`, from the models of transformers with 1,000 labels; a test "
        "checks that it is current.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
    ]
    return "\n".join(lines) + "\n" + NOTES.read_text(encoding="utf-8")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m examples.backbones_page", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/backbones.md"))
    path = parser.parse_args().output
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(f"{path}: {len(SHOWN)} families")


if __name__ == "__main__":
    main()
