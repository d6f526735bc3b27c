"""What an audit does, checked before a model is touched. Light, so that ``--help`` is quick."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_immunize.errors import ArgumentError
from hf_immunize.text import printable


if TYPE_CHECKING:
    from hf_immunize.attacks.presets import Preset


# What a field may be, and the words for it; text is never blank.
_NAME = ((str, type(None)), "a name, or nothing where it can be found without help,")
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("model", "reference"), (object, "a model, its folder or its name")),
    **dict.fromkeys(("harmful", "benign", "unseen", "unrelated"), (object, "images, their folder or their name")),
    **dict.fromkeys(("head_module", "image_column", "label_column"), _NAME),
    **dict.fromkeys(("progress", "trust_remote_code"), (bool, "True or False")),
    "run_dir": ((str, os.PathLike, type(None)), "a folder"),
    "revision": (str, "a branch, tag or commit"),
}
# Least and most of whole numbers; generators take no larger seed.
_COUNTS = (("max_images", 2, 2**53), ("seed", 0, 2**32 - 1), ("memory_limit", 1, 2**53))


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
    reference: Any = field(default=None, metadata={"help": "The model before immunization, to compare with."})
    # Names; by default those of the preset.
    attackers: Sequence[str] | None = None
    # "quick", "standard" or "full".
    preset: str | Preset = "standard"
    unseen: Any = field(default=None, metadata={"help": "Harmful images of classes that immunization never saw."})
    unrelated: Any = field(default=None, metadata={"help": "A third task, which should not suffer."})
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
        metadata={"help": "Share held out to test on, where there is no test split; by default as in training."},
    )
    max_images: int | None = field(
        default=None, metadata={"help": "At most so many training and test images of each task.", "min": 2}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of that split, where MODEL has no record of it."})
    # Bytes to use; by default 60 % of what is free.
    memory_limit: int | None = None
    progress: bool = True
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of MODEL on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        for name, (kind, words) in _KINDS.items():
            given = getattr(self, name)
            for part in given if isinstance(given, (tuple, list)) else (given,):
                missing = part is None and name in ("model", "harmful")
                if missing or not isinstance(part, kind) or (isinstance(part, str) and not part.strip()):
                    raise _wrong(name, words, part)
        for name, least, most in _COUNTS:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            if value is not None and not whole:
                raise _wrong(name, f"a whole number from {least} to {most}", value)
        fraction = self.test_fraction
        if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
            raise _wrong("test_fraction", "a number between 0 and 1", fraction)
        if self.run_dir is not None and Path(self.run_dir).is_file():
            raise _wrong("run_dir", "a folder, not a file,", os.fspath(self.run_dir))
        self.chosen()

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
                raise _wrong("attackers", "a list of names, one at least,", names)
            chosen = chosen.only(names)
        if set(chosen.attackers) == set(chosen.restoring) and self.reference is None:
            raise ArgumentError(
                f"Expected a reference for {' and '.join(chosen.restoring)}, which put its weights back, found "
                "none. Give the model before immunization, or name other attackers."
            )
        return chosen


def _wrong(name: str, expected: str, found: Any) -> ArgumentError:
    return ArgumentError(f"Expected {expected} as {name}, found {printable(repr(found))[:80]}. Give such a one.")
