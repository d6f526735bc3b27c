"""The house has one direction of imports, and its front door is light."""

import ast
import subprocess
import sys
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "hf_immunize"
# Lowest first. A room imports from rooms of a lower level, from itself, and from errors.py.
LEVEL = {"text": 0, "files": 0, "tensor_hash": 0, "spectra": 1, "linear": 2, "metrics": 2, "data": 2, "vision": 2}
LEVEL |= {"features": 3, "attacks": 4, "hub": 4, "audit": 5, "training": 5, "cli": 6, "__main__": 7}


def rooms_imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("hf_immunize"):
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError(f"{file}: use absolute imports, so that this test can follow them")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hf_immunize."):
                    yield alias.name.split(".")[1]


def test_rooms_import_only_from_below():
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in rooms_imported(file):
            if target not in ("errors", "__version__", room):
                assert LEVEL[target] < LEVEL[room], f"{file} imports {target}"


def test_spectra_imports_torch_alone():
    allowed = {"torch", "hf_immunize", "math", "dataclasses", "typing", "collections", "contextlib", "__future__"}
    for file in (PACKAGE / "spectra").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{file} imports {name}"


def test_importing_the_package_alone_loads_nothing_heavy():
    code = "import sys, hf_immunize; print([m for m in ('transformers', 'datasets', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_text_files_are_read_and_written_as_utf8():
    root = PACKAGE.parent
    for file in (
        file for folder in (PACKAGE, root / "examples", root / "benchmarks") for file in folder.rglob("*.py")
    ):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and _opens_text(call):
                named = {keyword.arg for keyword in call.keywords}
                assert "encoding" in named, f"{file}:{call.lineno} leaves the encoding to the machine"


def _opens_text(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    # The method of a path has its mode first, the function behind the path; methods of other things take no mode.
    values = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    modes = [text for text in texts if set(text) <= set("rwxab+t")]
    is_open = name == "open" and (isinstance(call.func, ast.Name) or bool(modes))
    return is_open and not any("b" in mode for mode in modes)
