"""Write docs/results/head-start.md from rows of examples/benchmark.py: one table, one figure, ten sentences.

python -m examples.head_start_page --rows runs/benchmark/rows.jsonl --out docs/results/head-start.md
"""

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from examples.audit_page import table
from examples.benchmark import read_rows
from examples.experiments.settings import describe_changes, experiment_of, load_settings
from examples.field_methods import PAPERS
from hf_immunize.audit.names import CLASSES, label, share, signed
from hf_immunize.audit.statistics import LEAST_HEAD_START
from hf_immunize.errors import DataError
from hf_immunize.files import write_whole
from hf_immunize.training.spectrum_figure import new_figure, save_figure


# Benign accuracy may change by so much.
KEPT = 0.01
# Attackers who know how models are immunized.
ADAPTIVE = ("leaky", "whitened", "every_block")
# The core grid: four methods, two networks against two tasks each, six attackers.
CORE = {
    "method": ("default", "undo", "sophon", "leace"),
    "backbone": ("resnet18_cifar10", "vit_cifar10"),
    "task": ("near", "far"),
    "attackers": ("ridge", "gd_line_search", "last_stage", "whole_network", "lora_r8", "ridge_start"),
}
BUDGET = "--preset standard --attack_steps 200 --attack_images 200"
GRID = f"""python -m examples.benchmark --backbone {" ".join(CORE["backbone"])} --task {" ".join(CORE["task"])} \\
    --method examples.field_methods:{{{",".join(CORE["method"])}}} \\
    --attackers {",".join([*CORE["attackers"], *ADAPTIVE])} {BUDGET} --data_path DATA
python -m examples.benchmark --backbone resnet18_cifar10 vit_cifar10 --task near far --data_path DATA \\
    --method examples.field_methods:{{weight_distance,tar,contraction,kappa,r_ill,opt_kappa,imma}} {BUDGET}
python -m examples.benchmark --backbone mobilenet dinov2_cifar10 --task cars --data_path DATA \\
    --method examples.field_methods:{{default,undo,sophon,leace}} {BUDGET}
python -m examples.head_start_page --rows runs/benchmark/rows.jsonl"""
Key = tuple[str, str]  # attacker and class of access


STRONGEST = "strongest"


@cache
def titles() -> dict[str, str]:
    """What every backbone with every task is called."""
    known = load_settings()
    pairs = product(known["backbones"], known["tasks"])
    return {f"{backbone}_{task}": experiment_of(known, backbone, task)["title"] for backbone, task in pairs}


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one method and setting, one a seed."""

    rows: list[dict[str, Any]]

    @property
    def setting(self) -> str:
        """Backbone and task."""
        key = self.rows[0]["key"]
        name = titles().get(key["setting"], key["setting"])
        return name + (f", {key['attack_images']} images" if "attack_images" in key else "")

    @property
    def title(self) -> str:
        """Of the method, marked where benign accuracy is not kept."""
        row = self.rows[0]
        changes = describe_changes(row["key"]["changes"])
        known = row["key"]["method"].startswith("examples.field_methods:")
        name = PAPERS[row["title"]][0] if known else row["title"]
        return name + (f", {changes}" if changes else "") + " †" * (self.benign < -KEPT)

    @property
    def benign(self) -> float:
        """Mean change of benign accuracy."""
        return statistics.fmean(row["benign"]["difference"] for row in self.rows)

    @property
    def removed(self) -> dict[Key, float]:
        """Mean share that is removed of each attacker's head start, where enough is at stake with every seed."""
        found = {key: [shares(row)[key][0] for row in self.rows] for key in shares(self.rows[0])}
        return {key: statistics.fmean(v) for key, v in found.items() if None not in v}  # type: ignore[type-var]

    def spread(self, key: Key) -> tuple[float, float] | None:
        """The interval of the only row, or the least and the most of several seeds; None where nothing is claimed."""
        found = [shares(row)[key] for row in self.rows]
        if len(found) == 1:
            return found[0][1]
        values = [removed for removed, _ in found if removed is not None]
        return (min(values), max(values)) if len(values) == len(found) else None

    @property
    def slowed(self) -> str:
        """How many times the steps the last stage needs, to what it reaches from random weights."""
        costs = [one for row in self.rows for one in row["cost"] if one["attacker"] == "last_stage"]
        if not costs:
            return "–"
        bound = "≥ " * any(one["is_bound"] for one in costs)
        before, after = (
            statistics.fmean(one[f"{side}_steps"] for one in costs) for side in ("reference", "immunized")
        )
        return f"{bound}{after / before:.1f} ×"


def shares(row: dict[str, Any]) -> dict[Key, tuple[float | None, tuple[float, float] | None]]:
    """What is removed by each attacker and by the strongest of each class, with its interval; None without a claim."""
    found = {(one["attacker"], one["access"]): (one["removed"], one["interval"]) for one in row["attackers"]}
    for access in CLASSES:
        one = row["removed"][access] or {}
        found[STRONGEST, access] = one.get("removed"), one.get("removed_interval")
    return found


def grouped(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups by setting, the default first and the others in the order of the rows."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["key"]
        attackers = tuple(one["attacker"] for one in row["attackers"])
        images = key.get("attack_images", 0)
        of = key["setting"], images, row["title"], key["method"], str(key["changes"]), key["preset"]["name"], attackers
        found.setdefault(of, []).append(row)
    order = list(titles())

    def place(group: Group) -> tuple[Any, ...]:
        setting = group.rows[0]["key"]["setting"]
        known = order.index(setting) if setting in order else len(order)
        return known, group.setting, group.rows[0]["title"] != "default"

    return sorted(map(Group, found.values()), key=place)


def knows(key: Key) -> bool:
    """Whether an attacker knows how models are immunized."""
    return key[0] in ADAPTIVE


def named(key: Key) -> str:
    """An attacker, with where it looks."""
    return label(key[0]) + ", any layer" * (key[1] == "any_layer")


def headed(key: Key) -> str:
    """An attacker as the head of a column, marked where it knows how models are immunized."""
    if key[0] == STRONGEST:
        return f"strongest, {CLASSES[key[1]].lower()}"
    return re.sub("^fine-tuning (of )?", "", named(key)) + " ¹" * knows(key)


def columns(groups: list[Group]) -> list[Key]:
    """Attackers by class of access, those who know the method last; where there are several, the strongest first."""
    every = at_stake(groups)
    found: list[Key] = []
    for access in CLASSES:
        own = sorted((key for key in every if key[1] == access), key=knows)
        found += [(STRONGEST, access)] * (len(own) > 1) + own
    return found


def main_table(groups: list[Group]) -> list[str]:
    """Methods and attackers by what is removed, under what is at stake; of the single attackers the least in bold."""
    keys = columns(groups)
    slowed = any(group.slowed != "–" for group in groups)
    heads = ["method", "seeds", "benign, points", "seconds"]
    heads += [*map(headed, keys), *["steps of the last stage"] * slowed]
    lines = []
    for own in by_setting(groups):
        stakes = at_stake(own)
        shown = [f"{100 * stakes[key]:.0f}".replace("-", "−") if key in stakes else "" for key in keys]
        lines.append([f"*{own[0].setting}: points at stake*", *[""] * 3, *shown, *[""] * slowed])
        for group in own:
            least = min((value for key, value in group.removed.items() if key[0] != STRONGEST), default=None)
            bold = {key for key, value in group.removed.items() if key[0] != STRONGEST and value == least}
            cells = [share(group.removed.get(key)) for key in keys]
            cells = [f"**{cell}**" if key in bold else cell for key, cell in zip(keys, cells, strict=True)]
            seconds = statistics.fmean(row["seconds"].get("immunizing", 0.0) for row in group.rows)
            seeds = ", ".join(str(row["key"]["seed"]) for row in group.rows)
            lines.append([group.title, seeds, signed(group.benign), f"{seconds:,.0f}", *cells])
            lines[-1] += [group.slowed] * slowed
    return table(heads, lines)


def at_stake(groups: list[Group]) -> dict[Key, float]:
    """Mean head start of each attacker over settings and seeds, whose starting models all methods share."""
    found: dict[Key, dict[tuple[str, int], float]] = {}
    for group in groups:
        for row in group.rows:
            for one in row["attackers"]:
                start = group.setting, row["key"]["seed"]
                found.setdefault((one["attacker"], one["access"]), {})[start] = one["head_start"]
    return {key: statistics.fmean(points.values()) for key, points in found.items()}


def by_setting(groups: list[Group]) -> list[list[Group]]:
    """Groups of one setting each."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return list(found.values())


def sentences(groups: list[Group]) -> list[str]:
    """Ten, each of the rows alone."""
    rows = [row for group in groups for row in group.rows]
    settings = len({group.setting for group in groups})
    presets = ", ".join(dict.fromkeys(row["key"]["preset"]["name"] for row in rows))
    single = sum(len(group.rows) == 1 for group in groups)
    said = [
        f"Lines: {len(groups)}, each a method on a network with a harmful task ({settings} settings; preset: "
        f"{presets}); {single} are of one seed alone, of which another training may differ.",
        "*Removed* is the share of what the released weights give an attacker, beyond the same attack on random "
        "weights, that is gone: 100% where they give nothing more, below 0 where immunization helps.",
    ]
    stakes = [points for setting in by_setting(groups) for points in at_stake(setting).values()]
    said.append(
        f"Of {sum(points < LEAST_HEAD_START for points in stakes)} of {len(stakes)} attackers in these settings the "
        f"head start is under {100 * LEAST_HEAD_START:.0f} points, so that nothing can be said to be removed."
    )
    said += [_of_class(groups, access) for access in CLASSES]
    broken = [
        min(single, key=single.__getitem__)
        for group in groups
        if _real(group) and (single := {key: value for key, value in group.removed.items() if key[0] != STRONGEST})
    ]
    by = Counter(map(named, broken)).most_common()
    said.append(f"What breaks each is in bold: {', '.join(f'{name} ({times} ×)' for name, times in by)}.")
    lost = sorted((group for group in groups if group.benign < -KEPT), key=lambda group: group.benign)
    most = f", most with {lost[0].title} ({lost[0].setting}: {_change(lost[0])})" if lost else ""
    said.append(
        f"Benign accuracy came out more than a point lower in {len(lost)} lines{most}"
        f"{': what these, marked †, remove is no gain, since a model that knows nothing removes all' * bool(lost)}."
    )
    spent = [row["seconds"].get("immunizing", 0.0) for row in rows]
    attacked = statistics.fmean(row["seconds"]["audit"] for row in rows)
    said.append(
        f"Immunizing took up to {max(spent):,.0f} seconds and the attacks of a row {attacked:,.0f} on the mean, on "
        f"{'; '.join(dict.fromkeys(row['hardware'] for row in rows))}."
    )
    wanted = {f"{backbone}_{task}" for backbone in CORE["backbone"] for task in CORE["task"]}
    done = {(row["title"], row["key"]["setting"]) for row in rows if _of_core(row, wanted)}
    said.append(
        f"Of the {len(wanted) * len(CORE['method'])} rows of the core grid (four methods, two networks against two "
        f"tasks each, six attackers) {len(done)} are among them."
    )
    return said


def _of_class(groups: list[Group], access: str) -> str:
    """What the strongest attackers of a class find, of the best method that keeps benign accuracy where one does."""
    words, key = CLASSES[access], (STRONGEST, access)
    known = {group: group.removed[key] for group in groups if key in group.removed and _real(group)}
    if not known:
        return f"{words}: of no method may a share be claimed; too little is at stake, or none attacked."
    kept = {group: value for group, value in known.items() if group.benign >= -KEPT}
    best = max(kept or known, key=known.__getitem__)
    helped = sum(value < 0 for value in known.values())
    who = f"{best.title} ({best.setting})"
    most = (
        f"{who} removes most"
        if _significant(best, key)
        else f"{who} is ahead with a share that does not differ significantly from 0%"
    )
    ends = best.spread(key)
    spread = f" ({' to '.join(map(share, ends))}{' over seeds' * (len(best.rows) > 1)})" if ends else ""
    cost = "" if kept else ", at a loss of benign accuracy"
    return (
        f"{words}: by the strongest attacker of each model {most}, {share(known[best])}{spread}{cost}; {helped} of "
        f"{len(known)} are below 0%."
    )


def _of_core(row: dict[str, Any], settings: set[str]) -> bool:
    """Whether a row is one of the core grid: of its setting and method, unchanged, by all of its attackers."""
    key, attackers = row["key"], {one["attacker"] for one in row["attackers"]}
    own = key["setting"] in settings and row["title"] in CORE["method"]
    return own and not key["changes"] and attackers >= set(CORE["attackers"])


def _real(group: Group) -> bool:
    """Whether it is a method, and not the check that nothing is removed from the starting model itself."""
    return group.rows[0]["title"] != "unchanged"


def _change(group: Group) -> str:
    """The change of benign accuracy, of a single row with its interval over images."""
    ends = group.rows[0]["benign"]["interval"]
    return signed(group.benign) + (f", {' to '.join(map(signed, ends))}" if len(group.rows) == 1 else "")


def _significant(group: Group, key: Key) -> bool:
    """Whether the share that is removed is above zero with all of its interval, with every seed."""
    ends = [shares(row)[key][1] for row in group.rows]
    return all(one is not None and one[0] > 0 for one in ends)


def draw(groups: list[Group], path: Path) -> None:
    """Methods from top to bottom; what the strongest attackers leave, with their intervals, and each fine-tuning."""
    settings = [[group for group in own if group.removed] for own in by_setting(groups)]
    settings = [own for own in settings if own]
    figure, (axes,) = new_figure(1)
    lines = sum(map(len, settings)) + len(settings)
    figure.set_size_inches(9, 1.4 + 0.26 * lines)
    height, ticks, most = 0, [], 100.0
    for members in settings:
        axes.text(-118, height, members[0].setting, fontsize=8, fontweight="bold", va="center")
        for group in members:
            height += 1
            ticks.append((height, group.title))
            for access, colour, above in (("head_input", "C0", -0.15), ("fine_tuning", "C3", 0.15)):
                key = STRONGEST, access
                if access == "fine_tuning":
                    own = {name: value for (name, kind), value in group.removed.items() if kind == access}
                    single = [100 * value for name, value in own.items() if name != STRONGEST]
                    axes.plot(single, [height + above] * len(single), "|", color=colour, markersize=6, alpha=0.6)
                if (ends := group.spread(key)) is not None:
                    axes.plot([100 * end for end in ends], [height + above] * 2, color=colour, alpha=0.4)
                    axes.plot(100 * group.removed[key], height + above, "o", color=colour, markersize=5)
                    most = max(most, 100 * group.removed[key])
        height += 1
    axes.plot([], [], "o", color="C0", label="strongest probe at the classifier's input")
    axes.plot([], [], "o", color="C3", label="strongest fine-tuning")
    axes.plot([], [], "|", color="C3", label="each fine-tuning attacker")
    axes.set_yticks([at for at, _ in ticks], [title for _, title in ticks], fontsize=8)
    axes.set_ylim(height, -1)
    for line in (0, 100):
        axes.axvline(line, color="0.5", linewidth=0.8, zorder=0)
    axes.set_xlim(-120, most + 20)
    axes.set_xlabel("removed of the head start, %")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def commands(rows: list[dict[str, Any]]) -> list[str]:
    """The rows' commands, those together that differ in method and seed alone."""
    seeds: dict[tuple[str, str], list[str]] = {}  # of a method in a setting
    for row in rows:
        varied = dict(re.findall(r"--(method|seed) (\S+)", row["command"]))
        rest = re.sub(r" --(method|seed) \S+", "", row["command"])
        seeds.setdefault((rest, varied["method"]), []).append(varied["seed"])
    methods: dict[tuple[str, str], list[str]] = {}  # of a setting with these seeds
    for (rest, method), own in seeds.items():
        methods.setdefault((rest, " ".join(sorted(set(own)))), []).append(method)
    return [f"{rest} \\\n    --seed {own} --method {' '.join(names)}" for (rest, own), names in methods.items()]


def page(groups: list[Group], figure: str) -> str:
    """The page."""
    rows = [row for group in groups for row in group.rows]
    names = dict.fromkeys(row["title"] for row in rows if row["key"]["method"].startswith("examples.field_methods:"))
    papers = [f"- {PAPERS[name][0]}: {PAPERS[name][1]}." for name in names]
    lines = ["# Head start: methods of the field", "", "Written by `python -m examples.head_start_page` from rows of"]
    lines += ["`python -m examples.benchmark`.", "", *(f"- {said}" for said in sentences(groups)), ""]
    # What whoever made a row wrote beside it.
    lines += [line for note in dict.fromkeys(row["note"] for row in rows if "note" in row) for line in (note, "")]
    lines += [
        *main_table(groups),
        "A cell is the share that is removed of the points at stake; –: no share can be told, since under ten points",
        "are at stake, or since test images and seeds leave open whether any are. Strongest: the strongest attacker",
        "before immunization, on random weights and after, whichever each is. ¹: it knows how models are immunized.",
        "†: benign accuracy came out more than a point lower. Last column: times the steps to what the same attack",
        "reaches from random weights. Of several seeds a cell is the mean.",
        "",
        f"![What is removed of the head start, by method]({figure})",
        "",
        "Lines: 95 % intervals, or from the least to the most of several seeds.",
        "",
    ]
    lines += [
        "## Methods",
        "",
        "Of the papers' ideas on this library's Trainer (`examples/field_methods.py`), not of their authors' code.",
        "Where nothing else is said the last stage and the head move, as by the library's default: whoever draws",
        "that stage anew reads what he read before, whatever was done to it.",
        "",
        *papers,
        "",
        "## Commands",
        "",
        "Each goes on where it was interrupted. Of the lines above:",
        "",
        *["```bash", *commands(rows), "```"],
        "",
        "The core grid and what follows it:",
        "",
        *["```bash", GRID, "```"],
    ]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Write page and figure."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.head_start_page", description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=Path, default=Path("runs/benchmark/rows.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/head-start.md"))
    given = parser.parse_args(words)
    groups = grouped(read_rows(given.rows))
    if not groups:
        raise DataError(f"Expected rows in {given.rows}, found none. Make some by python -m examples.benchmark.")
    picture = given.out.parent / "figures" / f"{given.out.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(groups, picture)
    write_whole(given.out, page(groups, f"figures/{picture.name}"))


if __name__ == "__main__":
    main()
