"""Pages of the reference, made from the code whenever the site is built (a hook of MkDocs)."""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import torch
import typer
from typer.cli import get_docs_for_click

import hf_immunize
from hf_immunize.attacks.presets import ATTACKERS, PRESET_VERSION
from hf_immunize.cli.main import app
from hf_immunize.cli.train import DataArguments
from hf_immunize.features.extract import Measurement, spectral_metrics
from hf_immunize.hub import record
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.objectives import OBJECTIVES


ROOT = Path(__file__).parents[2]
# Page of the API -> its title, first sentence, and the rooms whose public names it shows.
API = {
    "immunize": (
        "Immunize",
        "From a model and two sets of images to an immunized checkpoint.",
        ("training.immunize", "training", "data"),
    ),
    "measure": ("Measure", "Condition numbers, ratios and times of features.", ("spectra", "vision", "linear.time")),
    "linear": ("Linear setting", "One linear map in front of the probe, as in the paper.", ("linear",)),
    "publish": ("Publish", "The record of a checkpoint, loading and verifying it.", ("hub",)),
    "audit": ("Audit", "Attackers, and what they found.", ("audit",)),
}
# What an evaluation reports, by the end of its name; {side} is benign or harmful.
METRICS = {
    "{side}_probing_steps": "steps of gradient descent with exact line search until a probe with an intercept has "
    "fitted 80 % of what least squares fits on the starting features (10,000 at most)",
    "{side}_probing_is_lower_bound": "1.0 where those steps did not suffice",
    "{side}_probing_of_components": "1.0 where no image has a label, so that the probe fits the leading components of "
    "the starting features",
    "{side}_conjugate_gradient_steps": "the same steps by conjugate gradient",
    "{side}_conjugate_gradient_is_lower_bound": "1.0 where those did not suffice",
    "probing_time_ratio": "growth of the harmful steps over the growth of the benign ones",
    "probing_time_ratio_is_lower_bound": "1.0 where the harmful steps did not suffice",
    "probing_time_ratio_is_upper_bound": "1.0 where the benign steps did not suffice",
    "accuracy_change": "change of the benign top-1 accuracy, of the same images through both weights",
    "accuracy_change_low": "lower end of its 95 % interval over images, paired",
    "accuracy_change_high": "upper end of that",
    "{side}_log10_kappa": "decimal logarithm of κ of the features",
    "{side}_is_bound": "1.0 where rank was lost, so that κ is a bound from below",
    "{side}_rank": "numerical rank of the features",
    "{side}_effective_rank": "exp of the entropy of the normalized singular values",
    "rir": "relative immunization ratio, (i)/(ii); NaN where both sides' bounds oppose",
    "log10_rir": "its decimal logarithm",
    "harmful_ratio": "(i), growth of the harmful κ",
    "benign_ratio": "(ii), growth of the benign κ",
    "rir_is_lower_bound": "1.0 where the true ratio may be larger",
    "rir_is_upper_bound": "1.0 where the true ratio may be smaller",
}
ARGUMENTS_HEAD = """\
# Arguments

`ImmunizationArguments` is `transformers.TrainingArguments` with these fields added or given another default.
`hf-immunize train` takes each as a flag. [The class][hf_immunize.training.arguments.ImmunizationArguments] explains
them at length."""
ATTACKERS_HEAD = f"""\
# Attackers

`hf-immunize audit --attackers NAME,NAME` runs some of them. *From* is the smallest preset that runs one; the presets
are of version {PRESET_VERSION}. Some of those at the classifier's input also run at every earlier stage."""
METRICS_HEAD = """\
# Metrics

`trainer.evaluate()` returns these, on held-out images. Read `eval_accuracy` and `eval_harmful_probing_steps` first;
[Ideas](../ideas.md) says why. `eval_loss` and `eval_accuracy` are of the benign images (and stand a second time as
`eval_benign_loss`, `eval_benign_accuracy`). A metric with *yes* exists a second time as `eval_intercept_…`, of
`Z − mean`: of a probe with an intercept, which is the one to read of a network. Probing steps need labels. Ratios
compare with the model at its first evaluation."""
METRICS_FOOT = """\
In training, the log has `loss`, `benign_loss` and its parts, each term of the objective by its name, and both
weights."""


def pages():
    """Path below docs/ to the text of every generated page."""
    found = {f"reference/api/{page}.md": api(page) for page in API}
    written = {"command-line": command_line} | {one.__name__: one for one in (arguments, metrics, attackers, card)}
    return found | {f"reference/{name}.md": make() for name, make in (written | {"record": schema}).items()}


def on_files(files, config):
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def page_of(module):
    """The page of the API that shows the public names of a module."""
    rooms = {room: page for page, (_, _, rooms) in API.items() for room in rooms}
    return rooms.get(module) or rooms[module.split(".")[0]]


def api(page):
    """Public names of some rooms, by mkdocstrings."""
    title, sentence, _ = API[page]
    names = [
        f"{module}.{name}" for module, of in hf_immunize._PUBLIC.items() if page_of(module) == page for name in of
    ]
    listed = ", ".join(f"[`{name.split('.')[-1]}`][hf_immunize.{name}]" for name in names)
    names += ["audit.settings.AuditSettings"] if page == "audit" else []
    entries = "\n\n".join(f"::: hf_immunize.{name}" for name in names)
    return f"# {title}\n\n{sentence} All names are imported from `hf_immunize`: {listed}.\n\n{entries}\n"


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options_of(kind):
    """Name, default and meaning of the fields that a dataclass itself defines and describes."""
    for one in fields(kind):
        if one.name in kind.__annotations__ and "help" in one.metadata:
            default = one.default if one.default is not MISSING else one.default_factory()
            yield one.name, "" if default in (None, "", []) else f"`{default}`", one.metadata["help"]


def command_line():
    """Every command with its options; of `train`, those that TrainingArguments does not have."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="hf-immunize")
    text = get_docs_for_click(obj=command, ctx=context, name="hf-immunize")
    for name, one in command.commands.items():  # `train` has its own parser
        if not one.add_help_option:
            mine = [(f"`--{option}`", *rest) for option, *rest in options_of(DataArguments)]
            begin, _, rest = text.partition(f"## `hf-immunize {name}`")
            _, _, rest = rest.partition("\n## ")
            text = (
                f"{begin}## `hf-immunize {name}`\n\nImmunize your model. Of each option hyphens and underscores work "
                f"alike. In addition to these: [the arguments](arguments.md), every flag of "
                "`transformers.TrainingArguments`, and `--config FILE` for a YAML or JSON file of them, which flags "
                f"override.\n\n{table(('option', 'default', 'meaning'), mine)}\n\n## {rest}"
            )
    text = re.sub(r"\[default: ([^\]]*)\]", r"(default: `\1`)", text).replace("[required]", "(required)")
    return text.replace("# `hf-immunize`", "# Command line", 1)


def arguments():
    """The fields that `ImmunizationArguments` adds or changes."""
    rows = [(f"`{name}`", default, meaning) for name, default, meaning in options_of(ImmunizationArguments)]
    terms = [(f"`{name}`", inspect.getdoc(kind).split("\n\n")[0]) for name, kind in OBJECTIVES.items()]
    objectives = f"## Objectives\n\n{table(('objective', 'what it does'), terms)}"
    return f"{ARGUMENTS_HEAD}\n\n{table(('argument', 'default', 'meaning'), rows)}\n\n{objectives}\n"


def attackers():
    """Every attacker of the audit."""
    access = {"head_input": "the classifier's input", "fine_tuning": "all weights"}
    rows = [(f"`{one.name}`", one.label, access[one.access], one.preset) for one in ATTACKERS.values()]
    return f"{ATTACKERS_HEAD}\n\n{table(('name', 'attacker', 'has', 'from'), rows)}\n"


def schema():
    """The parts of the record with their fields, read off the source."""
    text = "# Record\n\n" + inspect.getdoc(record).split("\n\n")[1].replace("The file", "`immunization.json`", 1)
    text += f"\n\nSchema {record.SCHEMA_VERSION}. Every part may also hold `unknown`: fields of a later version.\n"
    kinds = [kind for kind in vars(record).values() if inspect.isclass(kind) and kind.__module__ == record.__name__]
    kinds = [kind for kind in kinds if is_dataclass(kind) and kind is not record.Part]
    for kind in sorted(kinds, key=lambda kind: (kind is not record.ImmunizationRecord, kinds.index(kind))):
        rows, above = [], ""
        for line in inspect.getsource(kind).splitlines():
            found = re.match(r"    (\w+): (.*?)(?: = (.*?))?(?:  # (.*))?$", line)
            if found and found[1] in kind.__dataclass_fields__:
                kind_of = re.sub(r"Annotated\[(\w+), .*\]", r"\1", found[2]).replace(" | ", " or ")
                part = getattr(record, kind_of.removesuffix(" or None"), None)
                about = inspect.getdoc(part).split("\n\n")[0] if part in kinds else ""
                rows.append((f"`{found[1]}`", f"`{kind_of}`", found[4] or above or about))
            above = line.strip()[2:] if line.startswith("    # ") else ""
        summary = inspect.getdoc(kind).split("\n\nExample")[0]
        text += f"\n## {kind.__name__}\n\n{summary}\n\n{table(('field', 'type', 'meaning'), rows)}\n"
    return text


def metric_names():
    """What `spectral_metrics` reports of two labelled sets and their references."""
    torch.manual_seed(0)
    sides = [Measurement() for _ in range(4)]
    for side in sides:
        side.update(torch.randn(8, 2), torch.ones(8, 3, 2, 2), torch.arange(8) % 2, torch.randn(8, 2))
    return list(spectral_metrics(*sides))


def metrics():
    """Every metric of an evaluation; a name without a description is an error."""
    known = {key.format(side=side): text for key, text in METRICS.items() for side in ("benign", "harmful")}
    names = metric_names()
    rows = [(f"`eval_{name}`", known[name]) for name in names if not name.startswith("intercept_")]
    also = {name.removeprefix("intercept_") for name in names if name.startswith("intercept_")}
    rows = [(*row, "yes" if row[0][6:-1] in also else "") for row in rows]
    return f"{METRICS_HEAD}\n\n{table(('metric', 'meaning', 'with an intercept'), rows)}\n\n{METRICS_FOOT}\n"


def card():
    """The card of the demo's model, without its metadata and figures."""
    text = (ROOT / "model_cards" / "digits-demo" / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]
    text = re.sub(r"^(#+ )", r"#\1", re.sub(r"^!\[.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return f"# A model card\n\n`hf-immunize card` renders it from the record. This is the demo's.\n\n{text}"
