"""``make house``: the size and shape of the project, and what exceeds its bound."""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_immunize"
LONGEST_FUNCTION = 60
# Written by `make test`.
TEST_TIMES = ROOT / "runs" / "tests.xml"
# Words that are not the field's. Only those that can be found by their spelling.
OLD_WORDS = (
    "silence",
    "silenced",
    "rectifiers off",
    "switched off",
    "told apart",
    "telling apart",
    "telling_apart",
    "what moves",
    "standing",
    "what the model is for",
    "whole_or_passed_over",
    "from_first",
    "most_of_an_image",
    "images a batch",
    "known by heart",
    "on and on over the epochs",
    "lent",
)
# One of each kind: only the module that defines it may name it, so that adding another touches that module and a test.
ONE_OF_EACH = {"attacker": "knn", "objective": "concentration", "model family": "swin"}


@dataclass
class Figure:
    """A figure with its bound, and what exceeds it."""

    name: str
    value: str
    bound: str
    held: bool
    excess: list[str] = field(default_factory=list)


def python_files(*folders: Path) -> list[Path]:
    """Python files that git tracks or would track below folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *map(str, folders)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / line for line in listed.splitlines() if line.endswith(".py")]
    return [path for path in paths if path.is_file()]


def physical_lines(paths: Iterable[Path]) -> int:
    """Lines of files, all counted."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def logical_lines(paths: Iterable[Path]) -> int:
    """Statements and other logical lines, docstrings and comments left out.

    Example:
        >>> source = Path(__file__)
        >>> 0 < logical_lines([source]) < physical_lines([source])
        True
    """
    total = 0
    for path in paths:
        fresh = True
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NEWLINE:
                total += not fresh
                fresh = True
            elif token.type not in (
                tokenize.COMMENT,
                tokenize.NL,
                tokenize.INDENT,
                tokenize.DEDENT,
                tokenize.ENDMARKER,
                tokenize.STRING,
            ):
                fresh = False
    return total


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module of the package to those of its modules that it imports, local imports included."""
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_immunize"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.append(inner if inner in files else str(node.module))
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names if alias.name.startswith("hf_immunize")]
            found[name] |= {target for target in targets if target in files and target != name}
    return found


def module_names() -> dict[str, Path]:
    """Dotted name to file of every module of the package."""
    names = {}
    for path in python_files(PACKAGE):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def long_functions(files: dict[str, Path]) -> list[str]:
    """Functions over `LONGEST_FUNCTION` lines, the docstring not counted."""
    found = []
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                text = first.end_lineno - first.lineno + 1 if documented else 0
                length = node.end_lineno - node.lineno + 1 - text
                if length > LONGEST_FUNCTION:
                    found.append(f"{name}.{node.name}: {length} lines")
    return found


def naming(files: dict[str, Path], name: str) -> list[str]:
    """Modules with a string that is the name."""
    return [
        module
        for module, path in files.items()
        if any(
            isinstance(node, ast.Constant) and node.value == name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]


def modules_of_a_step() -> list[str]:
    """Modules of the package with a call in one ``compute_loss`` of a tiny ViT, after the first step."""
    import os
    import tempfile

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from hf_immunize import ImmunizationArguments, ImmunizationTrainer

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=2,
        initializer_range=0.3,
    )
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(32)]
    harmful = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(32)]
    seen: set[str] = set()

    class Watched(ImmunizationTrainer):
        def compute_loss(self, *args, **kwargs):
            def note(frame, event, _):
                file = frame.f_code.co_filename
                if event == "call" and file.startswith(str(PACKAGE)):
                    seen.add(".".join(Path(file).relative_to(ROOT).with_suffix("").parts))

            last = self.state.global_step == 1
            if last:
                sys.setprofile(note)
            try:
                return super().compute_loss(*args, **kwargs)
            finally:
                if last:
                    sys.setprofile(None)

    with tempfile.TemporaryDirectory() as folder:
        args = ImmunizationArguments(
            folder,
            max_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            per_device_train_batch_size=8,
            logging_strategy="no",
            save_strategy="no",
        )
        Watched(ViTForImageClassification(config), args, train_dataset=rows, harmful_dataset=harmful).train()
    return sorted(seen)


def heavy_imports() -> list[str]:
    """Which of torch, transformers and datasets ``import hf_immunize`` loads."""
    code = "import sys, hf_immunize; print(*[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_minutes() -> float | None:
    """How long the last ``make test`` took; None where its times were not kept."""
    if not TEST_TIMES.is_file():
        return None
    suites = ElementTree.parse(TEST_TIMES).getroot().iter("testsuite")
    return sum(float(suite.get("time", 0)) for suite in suites) / 60


def old_words() -> list[str]:
    """Lines with words for which the field has others, in code, messages and documents.

    A word in quotes is an old name that is still accepted; the committed cards say what their records say.
    """
    pattern = re.compile(r"(?<![A-Za-z\"'])(" + "|".join(OLD_WORDS) + r")(?![A-Za-z])", re.IGNORECASE)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in listed:
        path = ROOT / line
        if path.suffix not in (".py", ".md", ".jinja") or path == Path(__file__) or not path.is_file():
            continue
        if line.startswith("model_cards/"):
            continue
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(text):
                found.append(f"{line}:{number}")
    return found


def figures(quick: bool) -> list[Figure]:
    """All figures; without those that run a step when ``quick``."""
    files = module_names()
    package = list(files.values())
    graph = imports(files)
    importers = defaultdict(set)
    for name, targets in graph.items():
        for target in targets:
            importers[target].add(name)
    mutual = sorted({" ↔ ".join(sorted((a, b))) for a in graph for b in graph[a] if a in graph[b]})
    # `__main__` has no importer by design.
    single = sorted(f"{m} ← {next(iter(i))}" for m, i in importers.items() if len(i) == 1)
    long = long_functions(files)
    tests, examples = python_files(ROOT / "tests"), python_files(ROOT / "examples")
    words = old_words()
    lines, modules = physical_lines(package), len(package)
    result = [
        Figure("package, physical lines", f"{lines:,}", "17,500", lines <= 17_500),
        Figure("package, logical lines", f"{logical_lines(package):,}", "", True),
        Figure("package, modules", str(modules), "90", modules <= 90),
        Figure("tests, lines", f"{physical_lines(tests):,}", "15,000", physical_lines(tests) <= 15_000),
        Figure(
            "examples and experiments, lines",
            f"{physical_lines(examples):,}",
            "3,500",
            physical_lines(examples) <= 3_500,
        ),
        Figure("modules that import each other", str(len(mutual)), "0", not mutual, mutual),
        Figure(f"functions over {LONGEST_FUNCTION} lines", str(len(long)), "3", len(long) <= 3, long),
        Figure("modules with one importer", str(len(single)), "15", len(single) <= 15, single),
        Figure("words with a better one", str(len(words)), "0", not words, words),
    ]
    heavy = heavy_imports()
    result.append(Figure("loaded by `import hf_immunize`", ", ".join(heavy) or "nothing heavy", "", not heavy, heavy))
    minutes = test_minutes()
    measured = "not measured, run `make test`" if minutes is None else f"{minutes:.1f} min"
    result.append(Figure("`make test`", measured, "7 min", minutes is not None and minutes <= 7))
    for kind, name in ONE_OF_EACH.items():
        places = naming(files, name)
        result.append(Figure(f"modules that name the {kind} {name}", str(len(places)), "1", len(places) == 1, places))
    if not quick:
        step = modules_of_a_step()
        result.append(Figure("modules with a call in a step", str(len(step)), "10", len(step) <= 10, step))
    return result


def main() -> None:
    """Print the figures; exit with 1 where one exceeds its bound and ``--strict`` is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the figures that run a training step")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a figure exceeds its bound")
    parser.add_argument("--most", type=int, default=20, help="at most so many lines on what exceeds a bound")
    options = parser.parse_args()
    found = figures(options.quick)
    for one in found:
        bound = f" (at most {one.bound})" if one.bound else ""
        print(f"{'ok  ' if one.held else 'MISS'} {one.name}: {one.value}{bound}")
        if not one.held:
            for line in one.excess[: options.most]:
                print(f"       {line}")
            if len(one.excess) > options.most:
                print(f"       … and {len(one.excess) - options.most} more")
    if options.strict and not all(one.held for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
