"""What an audit does, checked before a model is touched. Light, so that ``--help`` is quick."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_immunize.errors import ArgumentError
from hf_immunize.text import printable


if TYPE_CHECKING:
    from hf_immunize.attacks.presets import Preset


_TASKS = ("harmful", "benign", "unseen", "unrelated")
# Least and most of whole numbers; generators take no larger seed.
_COUNTS = (("max_images", 2, math.inf), ("seed", 0, 2**32 - 1), ("memory_limit", 1, math.inf))


@dataclass(frozen=True)
class AuditSettings:
    """What an audit does; the command line, `audit` and the report read this one description, and each field's help.

    Data are a folder, a parquet file, a name on the Hub, a ``datasets.Dataset``, a ``DatasetDict``, or a pair
    (train, test) of such.
    """

    model: Any = field(metadata={"help": "The immunized model: a folder or a name on the Hub."})
    _: KW_ONLY
    harmful: Any = field(metadata={"help": "Labelled images of the harmful task: folder, parquet file or Hub id."})
    benign: Any = field(default=None, metadata={"help": "Labelled images of the task to keep."})
    reference: Any = field(
        default=None, metadata={"help": "The model before immunization; without it nothing can be compared."}
    )
    # Names; by default those of the preset.
    attackers: Sequence[str] | None = None
    # "quick", "standard" or "full".
    preset: str | Preset = "standard"
    unseen: Any = field(default=None, metadata={"help": "Harmful images of classes that immunization never saw."})
    unrelated: Any = field(default=None, metadata={"help": "A third task that should be left alone."})
    # Image processor, where the model is not given by its name and the data hold images.
    processing_class: Any = None
    # Where finished attacks are kept; the same call resumes an interrupted audit there.
    run_dir: str | os.PathLike[str] | None = None
    head_module: str | None = field(
        default=None, metadata={"help": "The classifier's name, where it cannot be found."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images, where it cannot be found."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels, where it cannot be found."})
    test_fraction: float | None = field(
        default=None,
        metadata={"help": "Held out where data have no validation or test split; by default as training did."},
    )
    max_images: int | None = field(
        default=None, metadata={"help": "At most so many training and test images of each task.", "min": 2}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of held-out splits, where MODEL has no record of the one training used."}
    )
    # Bytes to use; by default 60 % of what is free.
    memory_limit: int | None = None
    progress: bool = True
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of MODEL on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        if self.model is None:
            raise ArgumentError("Expected an image classifier, its folder or its name as model, found None. Give one.")
        for name in ("model", "reference", *_TASKS):
            given = getattr(self, name)
            for part in given if isinstance(given, (tuple, list)) else (given,):
                if isinstance(part, str) and not part.strip():
                    raise _wrong(name, "a name or a folder", part, "Give it, or leave it out.")
        if self.harmful is None:
            raise _wrong("harmful", "images of the harmful task", None, "Give a folder or a data set.")
        for name in ("head_module", "image_column", "label_column"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise _wrong(name, "a name", value, "Leave it out where it can be found without help.")
        for name in ("progress", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        if not isinstance(self.revision, str) or not self.revision.strip():
            raise _wrong("revision", "a branch, tag or commit", self.revision)
        self._check_numbers()
        folder = self.run_dir
        if folder is not None and (not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder).strip()):
            raise _wrong("run_dir", "a folder", folder, "Give one, or leave it out.")
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise _wrong("run_dir", "a folder", os.fspath(folder), "It is a file: choose another run directory.")
        self.chosen()

    def _check_numbers(self) -> None:
        for name, least, most in _COUNTS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                span = f"from {least} to {most}" if name == "seed" else f"of at least {least}"
                raise _wrong(name, f"a whole number {span}", value)
        fraction = self.test_fraction
        if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
            raise _wrong("test_fraction", "a number between 0 and 1", fraction)

    def chosen(self) -> Preset:
        """The preset, with the attackers that were asked for."""
        from hf_immunize.attacks.presets import Preset, find_preset

        if not isinstance(self.preset, (str, Preset)):
            raise _wrong("preset", "the name of a preset", self.preset)
        chosen = find_preset(self.preset) if isinstance(self.preset, str) else self.preset
        names = self.attackers
        if names is not None:
            listed = isinstance(names, Sequence) and not isinstance(names, (str, bytes))
            if not listed or not names or not all(isinstance(name, str) for name in names):
                raise _wrong("attackers", "a list of names, one at least", names, "Leave it out for the preset's.")
            chosen = chosen.only(names)
        if not chosen.attackers:
            raise _wrong("preset", "attackers", "none", "An audit without attackers would report nothing.")
        if set(chosen.attackers) == set(chosen.restoring) and self.reference is None:
            raise ArgumentError(
                f"Expected a reference for {' and '.join(chosen.restoring)}, which put its weights back, found "
                "none. Give the model before immunization, or name other attackers."
            )
        return chosen


def _wrong(name: str, expected: str, found: Any, remedy: str = "") -> ArgumentError:
    shown = printable(repr(found))
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ArgumentError(f"Expected {expected} as {name}, found {shown}.{' ' if remedy else ''}{remedy}")
