"""What an audit was asked for, checked before a model is loaded: each wrong value ends in one sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.attacks.presets import RESTORING, Preset, find_preset
from hf_immunize.errors import ArgumentError
from hf_immunize.text import printable


_TASKS = ("harmful", "benign", "unseen", "unrelated")
_NAMES = ("head_module", "image_column", "label_column")
_SWITCHES = ("progress", "trust_remote_code")
# Generators take no larger seed.
_LARGEST_SEED = 2**32 - 1


def check_asked(model: Any, options: Mapping[str, Any]) -> Preset:
    """Refuse what no audit can be made of.

    Args:
        model: As in `audit`.
        options: Every other parameter of `audit` by its name.

    Returns:
        The preset, with the attackers that were asked for.

    Raises:
        ArgumentError: The first impossible value.
    """
    if model is None:
        raise ArgumentError("Expected an image classifier, its folder or its name as model, found None. Give one.")
    for name, given in {"model": model, **{name: options[name] for name in ("reference", *_TASKS)}}.items():
        for part in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(part, str) and not part.strip():
                raise _wrong(name, "a name or a folder", part, "Give it, or leave it out.")
    if options["harmful"] is None:
        raise ArgumentError("Expected images of the harmful task as harmful, found None. Give a folder or a data set.")
    for name in _NAMES:
        if options[name] is not None and not (isinstance(options[name], str) and options[name].strip()):
            raise _wrong(name, "a name", options[name], "Leave it out where it can be found without help.")
    for name in _SWITCHES:
        if not isinstance(options[name], bool):
            raise _wrong(name, "True or False", options[name])
    if not isinstance(options["revision"], str) or not options["revision"].strip():
        raise _wrong("revision", "a branch, tag or commit", options["revision"])
    _check_numbers(options)
    _check_run_dir(options["run_dir"])
    return _check_attackers(options["preset"], options["attackers"], options["reference"] is not None)


def _check_numbers(options: Mapping[str, Any]) -> None:
    whole = {
        "max_images": (2, None),
        "seed": (0, _LARGEST_SEED),
        "memory_limit": (1, None),
        "keep_features": (0, None),
    }
    for name, (least, most) in whole.items():
        value = options[name]
        if value is None and name != "keep_features":
            continue
        if not _is_whole(value) or value < least or (most is not None and value > most):
            span = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise _wrong(name, f"a whole number {span}", value)
    fraction, accuracies = options["test_fraction"], options["accuracies"]
    if fraction is not None and not _is_share(fraction):
        raise _wrong("test_fraction", "a number between 0 and 1", fraction)
    if isinstance(accuracies, (str, bytes)) or not isinstance(accuracies, Sequence):
        raise _wrong("accuracies", "a list of accuracies to reach", accuracies)
    for value in accuracies:
        if not _is_share(value):
            raise _wrong("accuracies", "accuracies to reach between 0 and 1", value)


def _check_run_dir(folder: Any) -> None:
    if folder is None:
        return
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder).strip():
        raise _wrong("run_dir", "a folder", folder, "Give one, or leave it out.")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise _wrong("run_dir", "a folder", os.fspath(folder), "It is a file: choose another run directory.")


def _check_attackers(preset: Any, attackers: Any, has_reference: bool) -> Preset:
    if not isinstance(preset, (str, Preset)):
        raise _wrong("preset", "the name of a preset", preset)
    chosen = find_preset(preset) if isinstance(preset, str) else preset
    if attackers is not None:
        named = isinstance(attackers, Sequence) and not isinstance(attackers, (str, bytes))
        if not named or not attackers or not all(isinstance(name, str) for name in attackers):
            raise _wrong("attackers", "a list of names, one at least", attackers, "Leave it out for the preset's.")
        chosen = chosen.only(list(attackers))
    if not (chosen.probes or chosen.layer_probes or chosen.flattened_probes or chosen.fine_tuning):
        if not chosen.restoring:
            raise _wrong("preset", "attackers", "none", "An audit without attackers would report nothing.")
        if not has_reference:
            raise ArgumentError(
                f"Expected a reference for {' and '.join(RESTORING)}, which put its weights back, found none. Give "
                "the model before immunization, or name other attackers."
            )
    return chosen


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 < value < 1


def _wrong(name: str, expected: str, found: Any, remedy: str = "") -> ArgumentError:
    shown = printable(repr(found))
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ArgumentError(f"Expected {expected} as {name}, found {shown}.{' ' if remedy else ''}{remedy}")
