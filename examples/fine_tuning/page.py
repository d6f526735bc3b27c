"""The page of all rows. Every figure on it comes from a row; what was learned is in ``findings.md``."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from examples.audit_page import table
from examples.fine_tuning.attacks import TUNERS
from examples.fine_tuning.candidates import CANDIDATES
from examples.fine_tuning.plan import planned_runs
from examples.fine_tuning.run import VERSION
from examples.fine_tuning.settings import load
from examples.networks.rows import pooled_difference, read_rows, spread
from examples.networks.settings import describe_changes, differences, plain
from hf_immunize.audit.names import label, percent, signed
from hf_immunize.errors import DataError


READ = {"head": "classifier's input", "later": "later layers", "entering": "entering rectifiers"}
READ |= {"any_layer": "any layer"}
FINDINGS = Path(__file__).parent / "findings.md"
INTRODUCTION = """# Fine-tuning attackers and earlier layers: results

Written by `python -m examples.fine_tuning page` from the rows that `python -m examples.fine_tuning run` left behind,
one a run; no figure in the tables is typed by hand. All are of held-out images, before → after immunization, in per
cent; where there are several seeds, means with the standard deviation over them, each with its own split, starting
model and draws. All candidates have the library's benign loss (distillation), its budget (total variation 0.03 on
held-out benign images) and its multiplier; they differ in what is minimized and in what moves.

- *Benign change*: accuracy after less before on the same images, over all seeds, with a 95 % interval paired by image.
- *Classifier's input*: the strongest of ridge, LDA, gradient descent with exact line search, L-BFGS. *Later layers*:
  the strongest of these and of ridge at the output of every stage, pooled and flattened, from the second third of the
  network on. *Entering rectifiers*: ridge on what enters the first and the last ReLU of each stage there, which an
  attacker has only to look at. *Any layer*: all of these, and the first third too.
- *Last stage, LoRA, whole*: best accuracy of that attacker with a new head, after it tried each optimizer and rate.
- *Times the steps*: steps to half of what the starting model gives above chance, after over before, geometric mean;
  ≥ where the immunized model never came to it. *Deviation*: relative fine-tuning deviation, signed, in per cent
  (Sarker et al. 2025): positive where the immunized model learns worse.
"""


def grouped(rows: list[dict[str, Any]], experiment: str) -> list[list[dict[str, Any]]]:
    """Rows of an experiment, those that differ by their seed alone together, in the order of the candidates."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    order = {name: index for index, name in enumerate(CANDIDATES)}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["experiment"] == experiment:
            groups.setdefault((order[row["candidate"]], describe_changes(row["changes"])), []).append(row)
    return [groups[key] for key in sorted(groups)]


def title(group: list[dict[str, Any]]) -> str:
    """Candidate and changes."""
    changes = describe_changes(group[0]["changes"])
    return CANDIDATES[group[0]["candidate"]].title + (f", {changes}" if changes else "")


def points(value: float) -> str:
    """Per cent with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def known(values: list[Any], show: Callable[[float], str]) -> str:
    """Mean and spread over seeds, with how many of them it is of where it is not all."""
    found = [one for one in values if one is not None]
    part = f" ({len(found)} of {len(values)} seeds)" if 0 < len(found) < len(values) else ""
    return spread(found, show) + part


def _both(group: list[dict[str, Any]], part: Callable[[dict[str, Any]], dict[str, Any] | None]) -> str:
    """Before and after, of the seeds that have both."""
    pairs: list[tuple[float, float] | None] = []
    for row in group:
        found = part(row) or {"before": {"accuracy": None}, "after": {"accuracy": None}}
        before, after = (found[moment]["accuracy"] for moment in ("before", "after"))
        pairs.append(None if before is None or after is None else (before, after))
    if not any(pairs):
        return "–"
    sides = [[pair and pair[index] for pair in pairs] for index in (0, 1)]
    return f"{spread([one for one in sides[0] if one is not None], points)} → {known(sides[1], points)}"


def probes(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Benign accuracy and the strongest probes."""
    heads = ["candidate", "seeds", "benign change, points (95 %)", "log10 RIR", "(ii)", "classifier's input"]
    heads += ["later layers", "entering rectifiers", "any layer", "unrelated task", "minutes"]
    lines = []
    for group in groups:
        mean, (low, high), _ = pooled_difference(group)
        exact = [row["ratios"]["exact"] for row in group]
        logs = [one["log10_rir"] for one in exact]
        bounds = {one["bound"] for one in exact} - {None}
        sign = {frozenset(): "", frozenset({"lower"}): "≥ ", frozenset({"upper"}): "≤ "}.get(frozenset(bounds))
        minutes = statistics.fmean(row["seconds"]["training"] / 60 for row in group)
        lines.append(
            [
                title(group),
                ", ".join(str(row["seed"]) for row in group),
                f"{signed(mean)} ({signed(low)} to {signed(high)})",
                "undetermined" if sign is None else sign + known(logs, lambda value: f"{value:.2f}"),
                known([one["benign_ratio"] for one in exact], lambda value: f"{value:.2g}"),
                *(
                    _both(group, lambda row, name=name: row["attacks"][name])
                    for name in ("head", "later", "entering", "any_layer", "unrelated")
                ),
                f"{minutes:.0f}",
            ]
        )
    return table(heads, lines)


def tuners_of(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Attackers that all rows have, in their order."""
    return [name for name in TUNERS if all(name in row["attacks"]["tuning"] for group in groups for row in group)]


def tuning(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Best accuracy of each fine-tuning attacker."""
    names = tuners_of(groups)
    lines = [
        [title(group), *(_both(group, lambda row, name=name: row["attacks"]["tuning"][name]) for name in names)]
        for group in groups
    ]
    return table(["candidate", *map(label, names)], lines)


def times(group: list[dict[str, Any]], name: str) -> str:
    """How many times the steps, over seeds."""
    rows = [row["attacks"]["tuning"][name]["half"] for row in group]
    found = [one for one in rows if one]
    if not found:
        return "–"
    part = f" ({len(found)} of {len(rows)} seeds)" if len(found) < len(rows) else ""
    return ("≥ " if any(one["is_bound"] for one in found) else "") + (
        f"{statistics.geometric_mean(one['ratio'] for one in found):.2g}{part}"
    )


def speed(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Times the steps, and signed deviation, of each."""
    names = tuners_of(groups)
    lines = []
    for group in groups:
        cells = [title(group)]
        for name in names:
            found = [row["attacks"]["tuning"][name]["deviation"] for row in group]
            cells.append(f"{times(group, name)}, {known(found, lambda value: f'{value:+.0f}')}")
        lines.append(cells)
    return table(["times the steps, deviation", *map(label, names)], lines)


def verdict(group: list[dict[str, Any]], wanted: dict[str, float]) -> str:
    """Which of the wanted figures a candidate reaches, in a sentence; of what cannot be told, that."""
    mean, _, _ = pooled_difference(group)
    chance = [row["attacks"]["chance"] for row in group]
    near = f"within {wanted['above_chance_points']:.0f} points of chance"

    def worst(name: str) -> bool | None:
        found = [row["attacks"][name] for row in group]
        if None in found:
            return None
        above = [one["after"]["accuracy"] - least for one, least in zip(found, chance, strict=True)]
        return 100 * max(above) <= wanted["above_chance_points"]

    parts: list[tuple[str, bool | None]] = [
        (f"benign within {wanted['benign_points']:.0f} points", 100 * mean >= -wanted["benign_points"]),
        (f"probes of later layers' outputs {near}", worst("later")),
        (f"probes of what enters rectifiers there {near}", worst("entering")),
    ]
    tuned = [row["attacks"]["tuning"] for row in group]
    if all("lora_r8" in one for one in tuned):
        lora = [one["lora_r8"]["deviation"] for one in tuned]
        above = None if None in lora else statistics.fmean(lora) > wanted["deviation"]
        parts.append((f"LoRA-8 deviation above {wanted['deviation']:.0f} %", above))
    if all("last_stage" in one for one in tuned):
        last = [one["last_stage"]["half"] for one in tuned]
        slower: bool | None = None
        if all(last):
            slower = statistics.geometric_mean(one["ratio"] for one in last) >= wanted["times"]
            # A bound from below that lies under what is wanted says nothing.
            slower = None if not slower and any(one["is_bound"] for one in last) else slower
        parts.append((f"last stage {wanted['times']:.0f} times the steps", slower))
    sides = {"reached": True, "missed": False, "not determined": None}
    said = {word: [what for what, holds in parts if holds is side] for word, side in sides.items()}
    said = {word: whats for word, whats in said.items() if whats or word != "not determined"}
    return f"{title(group)}: " + "; ".join(f"{word}: {', '.join(whats) or 'nothing'}" for word, whats in said.items())


def check_settings(rows: list[dict[str, Any]], experiment: str, spec: dict[str, Any]) -> None:
    """Refuse rows that were made with other settings than the page would print.

    Raises:
        DataError: If there is such a row.
    """
    for row in rows:
        if row["experiment"] != experiment:
            continue
        made = row["settings"]
        now = {
            "scope": spec["scopes"][CANDIDATES[row["candidate"]].scope],
            **{name: spec[name] for name in ("layers", "rectifiers", "attacks")},
            "training": {**spec["training"], **row["changes"]},
        }
        if other := differences({name: made[name] for name in now}, plain(now)):
            raise DataError(
                f"Expected {row['name']} to be of the settings of {experiment}.yaml, found {'; '.join(other[:4])}. "
                "Make it again with --redo."
            )


def settings_of(spec: dict[str, Any]) -> list[str]:
    """What is behind an experiment's rows."""
    shown = {
        name: spec[name]
        for name in ("networks", "scopes", "layers", "rectifiers", "first_third", "training", "attacks")
    }
    return ["```yaml", yaml.safe_dump(shown, sort_keys=False, width=110).strip(), "```", ""]


def one_line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    found, utility = row["attacks"], row["utility"]
    tuned = ", ".join(
        f"{name} {percent(one['before']['accuracy'])} → {percent(one['after']['accuracy'])} ({times([row], name)}×)"
        for name, one in found["tuning"].items()
        if one["before"]["accuracy"] is not None and one["after"]["accuracy"] is not None
    )
    sides = ", ".join(
        f"{called} {percent(found[name]['before']['accuracy'])} → {percent(found[name]['after']['accuracy'])}"
        for name, called in READ.items()
        if found[name]
    )
    return f"{row['name']}: benign {percent(utility['reference'])} → {percent(utility['immunized'])}, {sides}, {tuned}"


def write_page(folder: Path, out: Path, plan: Path | None = None) -> None:
    """Write the page.

    Args:
        folder: Of all runs.
        out: The page.
        plan: Rows that should be there; those that are not are named.

    Raises:
        DataError: If there is no row.
    """
    rows = read_rows(folder, VERSION)
    if not rows:
        raise DataError(f"Expected rows in {folder}, found none. Make them with `python -m examples.fine_tuning all`.")
    lines = [INTRODUCTION]
    if FINDINGS.is_file():
        lines += [FINDINGS.read_text(encoding="utf-8").strip(), ""]
    planned = planned_runs(plan)
    for experiment in dict.fromkeys(Path(run.experiment).stem for run in planned):
        groups = grouped(rows, experiment)
        if not groups:
            continue
        file = next(run.experiment for run in planned if Path(run.experiment).stem == experiment)
        spec, _ = load(file)
        check_settings(rows, experiment, spec)
        first = groups[0][0]
        lines += [f"## {spec['title']}", "", spec["about"].strip(), ""]
        train, test = first["attacks"]["images"]
        lines += [
            f"Chance {percent(first['attacks']['chance'])}; probes have {train} images to train on and {test} to "
            f"measure on; fine-tuning at most {spec['attacks']['max_images']} and "
            f"{spec['attacks']['max_test_images']}. {first['hardware']}, {first['date']}; minutes are of "
            "immunization alone.",
            "",
            "### Probes",
            "",
            *probes(groups),
            "### Fine-tuning",
            "",
            *tuning(groups),
            *speed(groups),
            "Of the figures wanted:",
            "",
            *(f"- {verdict(group, spec['wanted'])}." for group in groups),
            "",
            "Settings:",
            "",
            *settings_of(spec),
        ]
    lines += ["## Candidates", ""]
    lines += [f"- **{one.title}** (`{name}`): {one.about}" for name, one in CANDIDATES.items()]
    lines += ["", "## Commands", "", "```bash", *(row["command"] for row in rows), "```", ""]
    names = {row["name"] for row in rows}
    if missing := [run.command() for run in planned if run.name not in names]:
        lines += ["Planned and not run:", "", "```bash", *missing, "```", ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
