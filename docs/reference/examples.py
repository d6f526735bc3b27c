"""Docstrings, as mkdocstrings reads them (an extension of griffe)."""

import re

from griffe import Extension


class Examples(Extension):
    """Sections called Example, which griffe knows in the plural alone, and would take for prose."""

    def on_object(self, *, obj, **_):
        """Called with every object that has a docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("[!NOTE]", "**Note**")
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
