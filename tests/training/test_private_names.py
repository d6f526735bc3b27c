"""Private names of other libraries are there, and are all listed."""

import argparse

import accelerate
import datasets
import pytest
import torch
import transformers

from hf_immunize.training.private_names import OVERRIDDEN, USED
from hf_immunize.training.trainer import ImmunizationTrainer


LIBRARIES = {"argparse": argparse, "accelerate": accelerate, "datasets": datasets, "torch": torch}
LIBRARIES["transformers"] = transformers


@pytest.mark.parametrize("name", [f"transformers.Trainer.{name}" for name in OVERRIDDEN] + list(USED))
def test_a_private_name_is_still_there(name):
    owner, private = name.rsplit(".", 1)
    library = name.split(".")[0]
    found = hasattr(eval(owner, LIBRARIES), private)
    assert found, f"{library} {LIBRARIES[library].__version__} has no {name}: {(OVERRIDDEN | USED).get(private, USED)}"


def test_every_private_method_that_is_overridden_is_listed():
    own = {name for name in vars(ImmunizationTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own & set(dir(transformers.Trainer)) == set(OVERRIDDEN)
