"""The page of all rows: tables, frontier, sentences, settings. Every figure on it comes from a row."""

import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from examples.audit_page import table
from examples.experiments import comparison, tables
from examples.experiments.files import read_json
from examples.experiments.methods import BASELINES, COLOURS, METHODS, TITLES
from examples.experiments.rows import (
    Group,
    benign_change,
    bound_sign,
    group_rows,
    log10_rir,
    pooled_difference,
    probe,
    read_rows,
    seconds_of,
)
from examples.experiments.run import FAILED
from examples.experiments.sentences import sentences
from examples.experiments.settings import Run, experiment_of, load_settings, planned_runs
from hf_immunize.audit.names import clean, percent, signed
from hf_immunize.errors import DataError
from hf_immunize.training.spectrum_figure import new_figure, save_figure


INTRODUCTION = """# Networks: results

Written by `python -m examples.experiments page` from the rows that `python -m examples.experiments run` left, one a
run; all but the section of findings is made from the rows. All figures are of held-out images. ± is the standard
deviation over seeds, of which each has its own split, classes and draws.

- *Change of benign accuracy*: after less before on the same images, over all splits, with a 95 % interval paired by
  image and clustered by image, since splits share images. What another training would change is not in it; ± is.
- *(i), (ii), RIR*: growth of κ of harmful and of benign probing, and their ratio, exact and rank-aware. ≥: rank was
  lost, and the figure is a bound from below. *Noise-floored* is the protocol of the paper's code (20 groups of 100
  images, smallest eigenvalue above 1e-6), for comparison with the paper's tables only.
- *Harmful probe*: the strongest of several linear probes at the classifier's input, each tuned on a part of its
  training images. *stopped* means within the wanted distance of chance in every row, *not stopped* anything else. *Any
  layer* counts probes of earlier layers too.
- *Minutes* are of one run: training with measuring before and after, measuring and attacking the immunized model. The
  starting model, and measuring and attacking it, are shared by the runs of a seed and not in them.
"""


# Written by hand: what the figures teach.
FINDINGS = Path(__file__).parent / "findings.md"
# Around the overview in a file that shows it too.
BEGIN, END = "<!-- networks: begin -->", "<!-- networks: end -->"


def one_line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    log, harmful = log10_rir(row), row["probes"]["harmful"]
    _, (low, high), _ = pooled_difference([row])
    changes = [
        f"{name} {percent(probe(row, task, kind, 'before'))} → {percent(probe(row, task, kind))}"
        for name, task, kind in (
            ("harmful probe", "harmful", "linear"),
            ("any layer", "harmful", "any_layer"),
            ("unseen", "unseen", "linear"),
            ("unrelated", "unrelated", "linear"),
        )
    ]
    return (
        f"{row['name']}: benign {percent(row['utility']['reference'])} → {percent(row['utility']['immunized'])} "
        f"({signed(low)} to {signed(high)}), log10 RIR {bound_sign([row])}{'?' if log is None else f'{log:.2f}'}, "
        f"(ii) {row['ratios']['exact']['benign_ratio']:.3g}, {', '.join(changes)}, chance "
        f"{percent(harmful['chance'])}, {sum(row['seconds'].values()) / 60:.0f} min"
    )


def write_page(folder: Path, out: Path, settings: str | None = None, readme: Path | None = None) -> str:
    """Write the page of a folder of runs, its figures beside it, and its overview into `readme`; returns the text."""
    rows = read_rows(folder)
    groups = group_rows(rows)
    missing = [run for run in planned_runs(settings, gpu=True) if run.name not in {row["name"] for row in rows}]
    failures = [read_json(path) for path in sorted(folder.glob(f"*/{FAILED}"))]
    shown = tables.overview(groups)
    lines = [INTRODUCTION, "## The default in every experiment", "", shown, "", FINDINGS.read_text(encoding="utf-8")]
    lines += _making(rows, missing)
    pairs = dict.fromkeys([(run.backbone, run.task) for run in planned_runs(settings, gpu=True)])
    pairs |= dict.fromkeys((row["backbone"], row["task"]) for row in rows)
    specs = {f"{backbone}_{task}": _spec(settings, backbone, task) for backbone, task in pairs}
    for name in sorted(specs, key=lambda name: "GPU" in specs[name]["machine"]):
        own = [group for group in groups if group.experiment == name]
        absent = [run for run in missing if run.experiment == name]
        if own or absent:
            lines += _experiment(name, specs[name], own, absent, out)
        failed = [one for one in failures if one["experiment"] == name]
        if failed:
            lines += ["Ended with an error:", ""]
            lines += [*(f"- `{one['command']}` ({one['date']}): {clean(one['error'], 300)}" for one in failed), ""]
    text = "\n".join(lines).rstrip() + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if readme is not None:
        write_overview(readme, shown)
    return text


def write_overview(readme: Path, text: str) -> None:
    """Put the table between its two marks in a file."""
    head, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise DataError(f"Expected {BEGIN} and {END} in {readme}, between which the table belongs, found none.")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def _spec(settings: str | None, backbone: str, task: str) -> dict[str, Any]:
    """Of settings that no longer have a row's backbone or task, its name alone."""
    known = load_settings(settings)
    if backbone in known["backbones"] and task in known["tasks"]:
        return experiment_of(known, backbone, task)
    return {"title": f"{backbone}, {task}", "about": "", "machine": "any machine"}


def _making(rows: list[dict[str, Any]], missing: list[Run]) -> list[str]:
    resumed = [
        row["name"] for row in rows if row["resumed"] or row["shared"]["resumed"] or row["start"].get("resumed")
    ]
    lines = ["## How to make it", "", "```bash"]
    lines += ["python -m examples.experiments all --data_path DATA    # all rows that need no GPU"]
    lines += ["python -m examples.experiments page --readme README.md", "```", ""]
    lines += [
        f"Each command goes on where it was interrupted. {len(rows)} rows are here, which took "
        f"{seconds_of(rows) / 3600:.1f} hours one after the other; {len(missing)} more of the plan were not run."
    ]
    if resumed:
        lines += [
            f"Of {len(resumed)} of them, which were interrupted and resumed, the last attempt alone is counted, so "
            "that they took longer."
        ]
    machines = Counter(row["hardware"] for row in rows)
    lines += ["", "Hardware:", "", *(f"- {name} ({count} rows)" for name, count in machines.most_common()), ""]
    dates = sorted({row["date"] for row in rows})
    return [*lines, f"Rows of {dates[0]} to {dates[-1]}.", ""] if dates else lines


def _experiment(name: str, spec: dict[str, Any], groups: list[Group], missing: list[Run], out: Path) -> list[str]:
    lines = [f"## {spec['title']}", "", " ".join(spec["about"].split()), ""]
    wanted = spec.get("wanted") or {}
    if groups:
        lines += _facts(groups)
        # Another number of steps is no other method.
        plain = [group for group in groups if set(group.changes) <= {"max_steps"}] or groups
        lines += tables.summary(plain, wanted)
        for group in plain:
            if group.method == "kappa" or (group.method == "default" and not group.changes):
                lines += [f"{group.title[:1].upper()}{group.title[1:]} ({_seeds(group.named_seeds.split(', '))}):", ""]
                lines += [*(f"- {one}" for one in sentences(group, wanted)), ""]
        lines += ["By what an attacker has, the strongest of all attackers tried:", "", *tables.classes(plain)]
        lines += ["### Frontier", "", *_frontier(name, groups, wanted, out)]
    else:
        lines += [f"No row of this experiment was run. It is meant for {spec['machine']}.", ""]
    if spec.get("published"):
        lines += ["Beside the paper's Table 3 (empty: not run here):", ""]
        lines += tables.published(groups, spec["published"])
    if missing:
        lines += ["Not run:", "", *_missing(missing), ""]
    return [*lines, *_settings(groups)] if groups else lines


def _missing(runs: list[Run]) -> list[str]:
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(replace(run, seed="N").command(), []).append(str(run.seed))  # type: ignore[arg-type]
    return [f"- {_seeds(of)}: `{command}`" for command, of in seeds.items()]


def _seeds(seeds: list[str]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


def _facts(groups: list[Group]) -> list[str]:
    row = groups[0].rows[0]
    sources = ", ".join(
        f"{side}: {row['sources'][side]} ({' + '.join(f'{n:,}' for n in images.values())} images)"
        for side, images in row["images"].items()
    )
    found = [f"Images, to train on and to measure on: {sources}."]
    accuracies = {one["start"]["name"]: one["start"].get("accuracy") for group in groups for one in group.rows}
    values = [value for value in accuracies.values() if value is not None]
    if values:
        seconds = statistics.fmean(one["start"]["seconds"] for group in groups for one in group.rows)
        found.append(
            f"The starting models, one a seed, were trained here in {seconds / 60:.1f} minutes each and read "
            f"{' / '.join(percent(value) for value in values)} of the benign test images."
        )
    exact = row["ratios"]["exact"]
    for side in ("benign", "harmful"):
        before = exact[f"{side}_reference"]
        if before["images"] < before["dim"]:
            found.append(
                f"κ of {side} features is of {before['images']} images in {before['dim']} dimensions: it describes "
                "this sample, not the task."
            )
    return [" ".join(found), ""]


def _frontier(name: str, groups: list[Group], wanted: dict[str, Any], out: Path) -> list[str]:
    figure = out.parent / "figures" / f"{out.stem}-{name}.png"
    _draw_frontier(groups, figure)
    return [
        f"![Benign accuracy against the strongest linear probe, and against exact RIR](figures/{figure.name})",
        "",
        *tables.frontier(groups, wanted),
        "### At equal benign accuracy",
        "",
        f"At no less benign accuracy than the default's, within {comparison.EQUAL_POINTS:g} points on the seeds that "
        "both have, each method's setting with the weakest probe (chosen on these same images, in its favour):",
        "",
        *comparison.at_equal_accuracy(groups),
    ]


def _draw_frontier(groups: list[Group], path: Path) -> None:
    """One point a row; filled: our recipe, open: the paper's; large: the default; triangles: a bound."""
    figure, (left, right) = new_figure(2)
    for method in METHODS:
        own = [group for group in groups if group.method == method]
        colour, ours = COLOURS[method.removesuffix("_ours")], method not in BASELINES
        for index, group in enumerate(own):
            for row in group.rows:
                style = {
                    "color": colour,
                    "markerfacecolor": colour if ours else "none",
                    "linestyle": "none",
                    "markersize": 9 if method == "default" and not group.changes else 6,
                    "label": TITLES[method] if index == 0 and row is group.rows[0] else None,
                }
                change = 100 * benign_change(row)
                if (read := probe(row)) is not None:
                    left.plot(change, 100 * read, marker="o", **style)
                if (log := log10_rir(row)) is not None:
                    right.plot(change, log, marker="^" if bound_sign([row]) else "o", **style)
    tasks = [row["probes"]["harmful"] for group in groups for row in group.rows]
    left.axhline(100 * statistics.fmean(task["chance"] for task in tasks), color="grey", linestyle=":", label="chance")
    before = [value for group in groups for value in group.values(lambda row: probe(row, moment="before"))]
    if before:
        left.axhline(100 * statistics.fmean(before), color="grey", linestyle="--", label="before immunization")
    left.set_ylabel("harmful accuracy of the strongest linear probe\nat the classifier's input, % (less is better)")
    right.set_ylabel("log10 of the exact RIR (more is better;\ntriangles: a bound)")
    for axes in (left, right):
        axes.set_xlabel("change of benign accuracy, points")
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.grid(True, alpha=0.3)
    left.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _settings(groups: list[Group]) -> list[str]:
    rows = [row for group in groups for row in group.rows]
    training = [row["settings"]["training"] for row in rows]
    common = {key: value for key, value in training[0].items() if all(one.get(key) == value for one in training)}
    lines = ["### Rows and their settings", ""]
    lines += table(
        ["row", "date", "steps", "training, s", "measuring, s", "attacks, s", "differs in"],
        [
            [
                f"`{row['command']}`",
                row["date"],
                f"{row['steps']:,}",
                *(f"{_seconds(row, part):,.0f}" for part in ("training", "measuring the", "attacks")),
                ", ".join(
                    f"{key}={value}"
                    for key, value in row["settings"]["training"].items()
                    if key not in common and key != "seed"
                ),
            ]
            for row in rows
        ],
    )
    audit = rows[0]["settings"]["audit"]
    return [
        *lines,
        "Common to all of them:",
        "",
        "```yaml",
        yaml.safe_dump({"training": common, "audit": audit}, sort_keys=False, width=110).strip(),
        "```",
        "",
    ]


def _seconds(row: dict[str, Any], part: str) -> float:
    return sum(seconds for name, seconds in row["seconds"].items() if name.startswith(part))
