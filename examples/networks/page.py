"""The page of all rows: tables, frontier, sentences, settings. Every figure on it comes from a row."""

import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from examples.audit_page import table
from examples.networks import comparison, tables
from examples.networks.frontier import draw_frontier
from examples.networks.overview import overview, write_overview
from examples.networks.plan import planned_runs
from examples.networks.rows import (
    Group,
    bound_sign,
    group_rows,
    log10_rir,
    pooled_difference,
    probe,
    read_failures,
    read_rows,
    seconds_of,
)
from examples.networks.sentences import sentences
from examples.networks.settings import experiment_names, load_experiment
from examples.networks.starting import starting_features
from hf_immunize.audit.names import clean, percent, signed


INTRODUCTION = """# Networks: results

Written by `python -m examples.networks page` from the rows that `python -m examples.networks run` left behind, one a
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


def one_line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    group = Group(row["experiment"], row["method"], row["changes"], [row])
    log, harmful = log10_rir(row), row["probes"]["harmful"]
    _, (low, high), _ = pooled_difference([row])
    return (
        f"{row['name']}: benign {percent(row['utility']['reference'])} → {percent(row['utility']['immunized'])} "
        f"({signed(low)} to {signed(high)}), log10 RIR {bound_sign(group)}{'?' if log is None else f'{log:.2f}'}, "
        f"(ii) {row['ratios']['exact']['benign_ratio']:.3g}, harmful probe {percent(probe(row, moment='before'))} → "
        f"{percent(probe(row))} (chance {percent(harmful['chance'])}), any layer "
        f"{percent(probe(row, kind='any_layer'))}, unseen {percent(probe(row, 'unseen', moment='before'))} → "
        f"{percent(probe(row, 'unseen'))}, unrelated {percent(probe(row, 'unrelated', moment='before'))} → "
        f"{percent(probe(row, 'unrelated'))}, {sum(row['seconds'].values()) / 60:.0f} min"
    )


def write_page(folder: Path, out: Path, plan: Path | None = None, readme: Path | None = None) -> str:
    """Write the page, and its figures beside it.

    Args:
        folder: Of all runs.
        out: The page.
        plan: Rows that should be there.
        readme: A file that shows the overview too, between its marks.

    Returns:
        The text.
    """
    rows = read_rows(folder)
    groups = group_rows(rows)
    missing = [run for run in planned_runs(plan, gpu=True) if run.name not in {row["name"] for row in rows}]
    shown = overview(groups)
    lines = [INTRODUCTION, "## The default in every experiment", "", shown, "", FINDINGS.read_text(encoding="utf-8")]
    lines += _making(rows, missing)
    places = [one.experiment for one in missing] + [row["experiment"] for row in rows]
    names = [name for name in (*experiment_names(), *places) if name in places]
    for name in dict.fromkeys(sorted(names, key=lambda name: "GPU" in _spec(name).get("machine", ""))):
        own = [group for group in groups if group.experiment == name]
        lines += _experiment(name, own, [run for run in missing if run.experiment == name], out, folder)
        failures = [one for one in read_failures(folder) if one["experiment"] == name]
        if failures:
            lines += ["Ended with an error:", ""]
            lines += [*(f"- `{one['command']}` ({one['date']}): {clean(one['error'], 300)}" for one in failures), ""]
    text = "\n".join(lines).rstrip() + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if readme is not None:
        write_overview(readme, shown)
    return text


def _spec(name: str) -> dict[str, Any]:
    return load_experiment(name) if name in experiment_names() else {"title": name}


def _making(rows: list[dict[str, Any]], missing: list[Any]) -> list[str]:
    machines = Counter(row["hardware"] for row in rows)
    resumed = [
        row["name"] for row in rows if row["resumed"] or row["shared"]["resumed"] or row["start"].get("resumed")
    ]
    lines = ["## How to make it", "", "```bash"]
    lines += ["python -m examples.networks all --data_path DATA    # all rows that one machine without a GPU can make"]
    lines += ["python -m examples.networks page --readme README.md", "```", ""]
    lines += [
        f"Each command goes on where it was interrupted. {len(rows)} rows are here, which took "
        f"{seconds_of(rows) / 3600:.1f} hours one after the other; {len(missing)} more of the plan were not run."
    ]
    if resumed:
        lines += [
            f"Of {len(resumed)} of them, which were interrupted and resumed, the last attempt alone is counted, so "
            "that they took longer."
        ]
    if hours := _hours(rows, missing):
        lines += [
            f"Those that are missing of experiments with rows here would take about {hours:.0f} "
            "hours more, at the pace of these."
        ]
    lines += ["", "Hardware:", "", *(f"- {name} ({count} rows)" for name, count in machines.most_common()), ""]
    dates = sorted({row["date"] for row in rows})
    return [*lines, f"Rows of {dates[0]} to {dates[-1]}.", ""] if dates else lines


def _hours(rows: list[dict[str, Any]], missing: list[Any]) -> float:
    """Of the rows that are not there, by the training time a step and the other parts of those that are."""
    found = 0.0
    for run in missing:
        own = [row for row in rows if row["experiment"] == run.experiment]
        if not own:
            continue
        training = statistics.fmean(_seconds(row, "training") / row["steps"] for row in own)
        rest = statistics.fmean(sum(row["seconds"].values()) - _seconds(row, "training") for row in own)
        length = run.changes.get("max_steps", _spec(run.experiment)["training"]["max_steps"])
        found += training * length + rest
    return found / 3600


def _experiment(name: str, groups: list[Group], missing: list[Any], out: Path, folder: Path) -> list[str]:
    spec = _spec(name)
    lines = [f"## {spec['title']}", "", " ".join(spec.get("about", "").split()), ""]
    wanted = spec.get("wanted") or {}
    if groups:
        lines += [*_facts(groups), *starting_features(groups, folder)]
        # Another number of steps is no other method.
        plain = [group for group in groups if set(group.changes) <= {"max_steps"}] or groups
        lines += tables.summary(plain, wanted)
        for group in plain:
            if group.method in ("default", "kappa") and (group.method == "kappa" or not group.changes):
                lines += [f"{group.title[:1].upper()}{group.title[1:]} ({_seeds(group.seeds.split(', '))}):", ""]
                taken = [f"`objective=auto` took {group.objectives}."] if group.method == "default" else []
                lines += [*(f"- {one}" for one in [*taken, *sentences(group, wanted)]), ""]
        lines += ["By what an attacker has, the strongest of all attackers tried:", "", *tables.classes(plain)]
        lines += ["### Frontier", "", *_frontier(name, groups, wanted, out)]
    else:
        lines += [f"No row of this experiment was run. It is meant for {spec.get('machine', 'any machine')}.", ""]
    if spec.get("published"):
        lines += [
            "Beside the paper's Table 3 (empty: not run here):",
            "",
            *tables.published(groups, spec["published"]),
        ]
    if missing:
        lines += ["Not run:", "", *_missing(missing), ""]
    return [*lines, *_settings(groups)] if groups else lines


def _missing(runs: list[Any]) -> list[str]:
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
    draw_frontier(groups, figure)
    return [
        f"![Benign accuracy against the strongest linear probe, and against exact RIR](figures/{figure.name})",
        "",
        *tables.frontier(groups, wanted),
        "### Objective and recipe",
        "",
        *comparison.contributions(groups),
        f"At no less benign accuracy than the default's, within {comparison.EQUAL_POINTS:g} points on the seeds that "
        "both have, each method's setting with the weakest probe (chosen on these same images, in its favour):",
        "",
        *comparison.at_equal_accuracy(groups),
        *comparison.standing(groups),
    ]


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
