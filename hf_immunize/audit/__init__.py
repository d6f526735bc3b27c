"""The audit: a preset of attackers on a model and its reference, and the report of what they found."""

import sys
from types import ModuleType
from typing import Any

from hf_immunize.errors import named_extras


class _Room(ModuleType):
    # The public function has the name of this room: after an import of one of its modules, `hf_immunize.audit` is it.
    def __call__(self, *args: Any, **options: Any) -> Any:
        with named_extras():
            from hf_immunize.audit.run import audit

        return audit(*args, **options)


sys.modules[__name__].__class__ = _Room
