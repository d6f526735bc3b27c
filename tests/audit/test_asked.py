"""What an audit was asked for is checked before a model is touched."""

import math

import pytest

from hf_immunize.audit.run import audit
from hf_immunize.errors import ArgumentError


class Untouched:
    """A model at which nobody may look."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} of the model was read")


WRONG = [
    *(("max_images", value) for value in (-1, 0, 1, 1.5, True, "20")),
    *(("seed", value) for value in (-1, 2**32, 0.5, "0")),
    *(("memory_limit", value) for value in (0, -1, 1e9)),
    *(("test_fraction", value) for value in (0.0, 1.0, -0.3, math.nan, "0.3")),
    *(("attackers", value) for value in ([], (), "ridge", ["ridge", 3], ["no_such"], [""], 3)),
    *(("attackers", value) for value in (["restore_swap"],)),  # no reference
    *(("preset", value) for value in ("no_such", "", 3, None, ["quick"])),
    *(("head_module", value) for value in ("", 3)),
    *(("image_column", value) for value in ("", " ", 3)),
    *(("label_column", value) for value in ("", b"label")),
    *(("revision", value) for value in ("", None, 3)),
    *(("run_dir", value) for value in ("", 3, __file__)),  # a file
    *(("progress", value) for value in (None, "yes")),
    *(("trust_remote_code", value) for value in (None, "False", 1)),
    *(("harmful", value) for value in (None, "", " ", ("images", ""))),
    *(("model", value) for value in (None, "", "  ")),
    *(("benign", ""), ("unseen", " "), ("unrelated", ""), ("reference", "")),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_impossible_value_is_named_before_the_model_is_touched(name, value):
    with pytest.raises(ArgumentError, match=None if name == "attackers" else name):
        audit(**{"model": Untouched(), "harmful": "images", name: value})
