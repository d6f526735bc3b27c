"""Write docs/results/head-start.md from rows of examples/benchmark.py: one table, one figure, ten sentences.

What each attacker finds is on a page beside it, head-start-attackers.md.

python -m examples.head_start_page --rows runs/benchmark/rows.jsonl --out docs/results/head-start.md
"""

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

from examples.audit_page import table
from examples.benchmark import read_rows
from examples.experiments.settings import describe_changes, experiment_of, load_settings
from examples.field_methods import PAPERS
from hf_immunize.audit.names import CLASSES, label, percent, share, signed
from hf_immunize.audit.statistics import LEAST_HEAD_START
from hf_immunize.errors import DataError
from hf_immunize.files import write_whole
from hf_immunize.training.spectrum_figure import new_figure, save_figure


# Benign accuracy may change by so much.
KEPT = 0.01
# Attackers who know how models are immunized.
ADAPTIVE = ("leaky", "whitened", "every_block", "rebalanced")
# Removes nothing: shows what an attacker reads.
CHECKS = ("unchanged", "rescaled")
# Trained without the harmful images: what methods are measured by, and none itself.
RETRAINED = "retrained"
# Suites of attackers by what they are called beside a setting: all images are too many to fine-tune on without a GPU.
_FEW = "--attack_seeds 3 --attack_steps 200 --attack_images 200"
SUITES = {
    "": "--preset standard --attackers ridge,gd_line_search,lda,lbfgs,adamw,knn --attack_seeds 3",
    "200 images": "--preset standard --attackers ridge,gd_line_search,last_stage,whole_network,lora_r8,ridge_start,"
    f"leaky,whitened,every_block {_FEW}",
    # For what removes something by those above: others who know how models are immunized.
    "200 images, other attackers": f"--preset standard --attackers reinitialized,rebalanced,batchnorm_ridge {_FEW}",
}
# Methods, networks, tasks and suites: first the core grid, then what follows it.
PLAN = [
    (("default", "undo", "sophon", "leace"), ("resnet18_cifar10", "vit_cifar10"), ("near", "far"), "200 images"),
    (
        ("weight_distance", "tar", "contraction", "kappa", "r_ill", "opt_kappa", "imma"),
        ("resnet18_cifar10", "vit_cifar10"),
        ("near", "far"),
        "200 images",
    ),
    (("default", "undo", "sophon", "leace"), ("mobilenet", "dinov2_cifar10"), ("cars",), "200 images"),
    (("default", "undo", "leace", "redistilled", "retrained"), ("vit_cifar10_seen",), ("near",), "200 images"),
    (("redistilled", "retrained"), ("resnet18_cifar10_seen",), ("near",), "200 images"),
    (
        ("redistilled",),
        ("resnet18_cifar10_seen", "vit_cifar10_seen"),
        ("near",),
        "200 images, other attackers",
    ),
    (("default",), ("mobilenet",), ("cars",), ""),
    (("dead_relu",), ("mobilenet_distilled",), ("cars",), ""),
]
Key = tuple[str, str]  # attacker and class of access


@dataclass(frozen=True)
class Found:
    """What an attacker, or the strongest of each model, reads with one seed; without a claim no share is removed."""

    before: float
    after: float
    without: float  # from random weights, or pixels
    removed: float | None
    interval: tuple[float, float] | None

    @property
    def apart(self) -> bool:
        """Whether the share is set apart from 0 % by its interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


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
    def place(self) -> str:
        """Backbone and task."""
        return titles().get(self.rows[0]["key"]["setting"], self.rows[0]["key"]["setting"])

    @property
    def setting(self) -> str:
        """The same, and who attacks."""
        return self.place + (f", {suite}" if (suite := suite_of(self.rows[0])) else "")

    @property
    def title(self) -> str:
        """Of the method, marked where benign accuracy is not kept."""
        row = self.rows[0]
        # Storing what frozen layers give makes steps faster, and nothing else.
        changes = describe_changes({k: v for k, v in row["key"]["changes"].items() if k != "cache_trunk"})
        known = row["key"]["method"].startswith("examples.field_methods:")
        name = PAPERS[row["title"]][0] if known else row["title"]
        return name + (f", {changes}" if changes else "") + " †" * (self.benign < -KEPT)

    @property
    def seeds(self) -> str:
        """Of data and training, with commas."""
        return ", ".join(str(row["key"]["seed"]) for row in self.rows)

    @property
    def benign(self) -> float:
        """Mean change of benign accuracy."""
        return statistics.fmean(row["benign"]["difference"] for row in self.rows)

    @property
    def change(self) -> str:
        """The change of benign accuracy, with the interval over images, or the least and the most of several seeds."""
        several = [row["benign"]["difference"] for row in self.rows]
        ends = self.rows[0]["benign"]["interval"] if len(several) == 1 else (min(several), max(several))
        return f"{signed(self.benign)} ({' to '.join(map(signed, ends))})"

    @cached_property
    def attackers(self) -> dict[Key, list[Found]]:
        """What each attacker finds, with every seed."""
        found: dict[Key, list[Found]] = {}
        for one in (one for row in self.rows for one in row["attackers"]):
            read = one["reference"], one["immunized"], one["random"]
            ends = one["interval"] and tuple(one["interval"])
            found.setdefault((one["attacker"], one["access"]), []).append(Found(*read, one["removed"], ends))
        return found

    @cached_property
    def strongest(self) -> dict[str, list[Found]]:
        """What the strongest attacker of each model finds, by class of access, with every seed."""
        found: dict[str, list[Found]] = {}
        for access, row in product(CLASSES, self.rows):
            if one := row["removed"][access]:
                read = one["reference_accuracy"], one["accuracy"], one["random_accuracy"]
                ends = one["removed_interval"] and tuple(one["removed_interval"])
                found.setdefault(access, []).append(Found(*read, one["removed"], ends))
        return found

    @property
    def slowed(self) -> str:
        """How many times the steps the last stage needs, to what it reaches from random weights."""
        costs = [one for row in self.rows for one in row["cost"] if one["attacker"] == "last_stage"]
        if not costs:
            return "–"
        bound = "≥ " * any(one["is_bound"] for one in costs)
        sides = [[one[f"{side}_steps"] for one in costs] for side in ("reference", "immunized")]
        before, after = map(statistics.fmean, sides)
        return f"{bound}{after / before:.1f} ×"

    @property
    def seconds(self) -> str:
        """Of immunizing, and on what."""
        spent = statistics.fmean(row["seconds"].get("immunizing", 0.0) for row in self.rows)
        machines = {machine(row) for row in self.rows}
        return f"{spent:,.0f} ({', '.join(sorted(machines))})"


def suite_of(row: dict[str, Any]) -> str:
    """What the row's attackers are called; those of no suite by all that the command says of them."""
    given = flags_of(row["command"])
    if known := [name for name, flags in SUITES.items() if flags_of(flags) == given]:
        return known[0]
    counts = [
        f"{given[f'attack_{name}']} {name}" for name in ("images", "steps", "seeds") if f"attack_{name}" in given
    ]
    names = map(label, given["attackers"].split(",")) if "attackers" in given else ()
    return ", ".join([*counts, f"preset {given['preset']}", *names])


def flags_of(words: str) -> dict[str, str]:
    """What a command says of attackers."""
    return dict(re.findall(r"--(preset|attack\w+) (\S+)", words))


def machine(row: dict[str, Any]) -> str:
    """What a method was trained on: where that is not said, what attacked it."""
    return "GPU" if "NVIDIA" in row.get("immunized_on", row["hardware"]) else "CPU"


def grouped(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups by setting, the default first and the others in the order of the rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        # What is of one method, setting and budget differs in nothing but what the seed decides.
        by_seed = {"seed", "data", "start"}
        of = {name: value for name, value in row["key"].items() if name not in by_seed}
        found.setdefault(str((row["title"], sorted(of.items()))), []).append(row)
    order = list(titles())

    def place(group: Group) -> tuple[Any, ...]:
        setting = group.rows[0]["key"]["setting"]
        known = order.index(setting) if setting in order else len(order)
        return known, group.setting, group.rows[0]["title"] != "default"

    return sorted(map(Group, found.values()), key=place)


def methods(groups: list[Group]) -> list[Group]:
    """All but the starting model itself, also by other weights."""
    return [group for group in groups if group.rows[0]["title"] not in CHECKS]


def by_setting(groups: list[Group]) -> list[list[Group]]:
    """Groups of one setting each."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return list(found.values())


# ---- numbers ----


def mean(found: list[Found]) -> float | None:
    """Mean share that is removed; None where with a seed too little is at stake."""
    shares = [one.removed for one in found]
    return statistics.fmean(shares) if shares and None not in shares else None  # type: ignore[type-var]


def spread(found: list[Found]) -> tuple[float, float] | None:
    """The interval of the only seed, or the least and the most of several; None where nothing is claimed."""
    if mean(found) is None:
        return None
    shares = [one.removed for one in found if one.removed is not None]
    return found[0].interval if len(found) == 1 else (min(shares), max(shares))


def apart(found: list[Found]) -> bool:
    """Whether with every seed the share is set apart from 0 %."""
    return mean(found) is not None and all(one.apart for one in found)


def with_ends(found: list[Found]) -> str:
    """The share that is removed, with its interval or, of several seeds, the least and the most; bold if apart."""
    ends = spread(found)
    said = share(mean(found)) + (f" ({' to '.join(map(share, ends))})" if ends else "")
    return f"**{said}**" if apart(found) else said


def at_stake(groups: list[Group], key: Key | str) -> float | None:
    """Mean head start of an attacker, or of a class's strongest, over settings and seeds; methods share the start."""
    points = {}
    for group in groups:
        found = group.strongest.get(key) if isinstance(key, str) else group.attackers.get(key)
        for row, one in zip(group.rows, found or [], strict=False):
            points[group.setting, row["key"]["seed"]] = one.before - one.without
    return statistics.fmean(points.values()) if points else None


def in_points(value: float | None) -> str:
    """A head start in points, without sign of zero."""
    return "" if value is None else f"{round(100 * value) + 0:d}".replace("-", "−")


# ---- tables ----


def main_table(groups: list[Group]) -> list[str]:
    """What the strongest attackers of each class find, under what is at stake, beside benign accuracy."""
    heads = ["method", "seeds", "benign accuracy, points", *(f"{words}: removed" for words in CLASSES.values())]
    lines = []
    for own in by_setting(groups):
        stakes = [in_points(at_stake(own, access)) for access in CLASSES]
        lines.append([f"*{own[0].setting}: points at stake*", "", "", *stakes])
        for group in own:
            cells = [with_ends(group.strongest.get(access, [])) for access in CLASSES]
            lines.append([group.title, group.seeds, group.change, *cells])
    return table(heads, lines)


def named(key: Key) -> str:
    """An attacker, with where it looks."""
    return label(key[0]) + ", any layer" * (key[1] == "any_layer")


def attackers_table(groups: list[Group]) -> list[str]:
    """What each attacker reads before and after, what from random weights, and what is removed."""
    every = list(dict.fromkeys(key for group in groups for key in group.attackers))
    keys = [key for access in CLASSES for key in sorted(every, key=lambda key: key[0] in ADAPTIVE) if key[1] == access]
    heads = ["method", "seconds to immunize", "steps of the last stage"]
    heads += [re.sub("^fine-tuning (of )?", "", named(key)) + " ¹" * (key[0] in ADAPTIVE) for key in keys]
    lines = []
    for own in by_setting(groups):
        stakes = [in_points(at_stake(own, key)) for key in keys]
        lines.append([f"*{own[0].setting}: points at stake*", "", "", *stakes])
        lines += [[group.title, group.seconds, group.slowed, *(reading(group, key) for key in keys)] for group in own]
    return table(heads, lines)


def reading(group: Group, key: Key) -> str:
    """A cell: the share that is removed, and the means over seeds of what is read before, after and without."""
    if not (found := group.attackers.get(key)):
        return ""
    before, after, without = (
        percent(statistics.fmean(getattr(one, side) for one in found)) for side in ("before", "after", "without")
    )
    said = share(mean(found))
    return f"{f'**{said}**' if apart(found) else said}: {before} → {after} ({without})"


# ---- sentences ----


def sentences(groups: list[Group]) -> list[str]:
    """Ten, each of the rows alone; the first answers whether anything stops fine-tuning."""
    groups = [group for group in groups if group.rows[0]["title"] != RETRAINED]
    rows = [row for group in groups for row in group.rows]
    several = sum(len(group.rows) > 1 for group in groups)
    single = [
        (group, key, found)
        for group in groups
        for key, found in group.attackers.items()
        if key[1] == "fine_tuning" and mean(found) is not None
    ]
    widths = [ends[1] - ends[0] for _, _, found in single if len(found) == 1 and (ends := spread(found))]
    alone = Counter(_where(group) for group, _, found in single if apart(found))
    by = "; ".join(f"{count} after {where}" for where, count in alone.items())
    tried = [(own, key) for own in by_setting(groups) for key in {key for group in own for key in group.attackers}]
    stakes = [at_stake(own, key) or 0.0 for own, key in tried]
    lost = sorted((group for group in groups if group.benign < -KEPT), key=lambda group: group.benign)
    most = f", most with {_where(lost[0])}, by {lost[0].change}" if lost else ""
    attacked = statistics.median(row["seconds"]["audit"] for row in rows)
    machines = "; ".join(dict.fromkeys(row["hardware"] for row in rows))
    return [
        *(of_class(groups, access) for access in ("fine_tuning", "head_input", "any_layer")),
        "*Removed* is the share of what the released weights give an attacker, beyond the same attack on random "
        "weights, that is gone: 100% where they give nothing more, below 0% where immunization helps.",
        f"Of {sum(points < LEAST_HEAD_START for points in stakes)} of {len(stakes)} attackers in these settings the "
        f"head start is under {100 * LEAST_HEAD_START:.0f} points: no share of it is claimed.",
        f"Of {len(single)} shares of single fine-tuning attackers {alone.total()} are set apart from 0%"
        f"{': ' * bool(by)}{by}; chance alone would put {0.05 * len(single):.0f}.",
        f"Half of their intervals are wider than {100 * statistics.median(widths or [0]):.0f} points: smaller effects "
        "go unseen.",
        f"Lines: {len(groups)}, each a method in one of {len(by_setting(groups))} settings, a network with a harmful "
        f"task and attackers; {several} have several seeds, the others one, and another training may differ.",
        f"Benign accuracy came out more than a point lower in {len(lost)} of them, marked †{most}"
        f"{'; what they remove may be what the model has lost altogether' * bool(lost)}.",
        f"The attacks of one seed took {attacked:,.0f} seconds (median), on {machines}.",
    ]


def of_class(groups: list[Group], access: str) -> str:
    """Which methods remove a share that is set apart from 0 % by the strongest attackers of a class."""
    known = {group: found for group in groups if mean(found := group.strongest.get(access, [])) is not None}
    where = f"{CLASSES[access]}, by the strongest attacker of each model:"
    if not known:
        return f"{where} of no method a share can be claimed; too little is at stake, or none attacked."
    claims = {
        group: f"{with_ends(found)}, of {_where(group)}, benign {group.change}" for group, found in known.items()
    }
    if best := [claims[group] for group, found in known.items() if apart(found)]:
        return f"{where} of {len(known)} shares {len(best)} are set apart from 0%: {'; '.join(best)}."
    largest = max(known, key=lambda group: mean(known[group]) or 0.0)
    return f"{where} of {len(known)} shares none is set apart from 0%; the largest is {claims[largest]}."


def _where(group: Group) -> str:
    return f"{group.title} on {group.setting}"


# ---- the pages ----


def draw(groups: list[Group], path: Path) -> None:
    """Methods from top to bottom; what the strongest attackers leave, with their intervals, and each fine-tuning."""
    shown = {"head_input": "C0", "any_layer": "C2", "fine_tuning": "C3"}
    groups = [group for group in groups if any(mean(found) is not None for found in group.strongest.values())]
    settings = by_setting(groups)
    figure, (axes,) = new_figure(1)
    figure.set_size_inches(9, 1.8 + 0.26 * (len(groups) + len(settings)))
    height, headings, ticks, edges = 0, [], [], [-50.0, 120.0]
    for own in settings:
        headings.append((height, own[0].setting))
        for group in own:
            height += 1
            ticks.append((height, group.title))
            tuned = [mean(found) for key, found in group.attackers.items() if key[1] == "fine_tuning"]
            at = [100 * value for value in tuned if value is not None]
            axes.plot(at, [height + 0.2] * len(at), "|", color=shown["fine_tuning"], markersize=6, alpha=0.6)
            for place, (access, colour) in enumerate(shown.items()):
                found = group.strongest.get(access, [])
                if (value := mean(found)) is not None and (ends := spread(found)) is not None:
                    line = [100 * end for end in ends]
                    axes.plot(line, [height + 0.2 * (place - 1)] * 2, color=colour, alpha=0.4)
                    axes.plot(100 * value, height + 0.2 * (place - 1), "o", color=colour, markersize=5)
                    edges += [*line, 100 * value]
        height += 1
    low, high = min(edges) - 5, max(edges) + 5
    for at, words in headings:
        # From left of the axes: some are as long as the figure is wide.
        axes.text(-0.38, at, words, transform=axes.get_yaxis_transform(), fontsize=8, fontweight="bold", va="center")
    for access, colour in shown.items():
        axes.plot([], [], "o", color=colour, label=f"{CLASSES[access].lower()}: strongest attacker of each model")
    axes.plot([], [], "|", color=shown["fine_tuning"], label="each fine-tuning attacker")
    axes.set_yticks([at for at, _ in ticks], [title for _, title in ticks], fontsize=8)
    axes.set_ylim(height, -1)
    axes.set_xlim(low, high)
    for line, words in ((0, "nothing removed"), (100, "all removed")):
        axes.axvline(line, color="0.5", linewidth=0.8, zorder=0)
        axes.text(line, -1.1, words, fontsize=8, ha="center", va="bottom")
    axes.set_xlabel("removed of the head start, %; below 0 immunization helps the attacker")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
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


def planned(groups: list[Group]) -> tuple[list[str], str]:
    """The commands of the whole plan, and how many of its rows there are; of the others, where nothing is at stake."""
    rows = [row for group in groups for row in group.rows]
    done = {_planned_as(row) for row in rows if not row["key"]["changes"]}
    lines = [
        f"python -m examples.benchmark --backbone {' '.join(backbones)} --task {' '.join(tasks)} \\\n"
        f"    --method examples.field_methods:{{{','.join(names)}}} \\\n"
        f"    {SUITES[suite]} --data_path DATA"
        for names, backbones, tasks, suite in PLAN
    ]
    lines.append("python -m examples.head_start_page --rows runs/benchmark/rows.jsonl")
    every = [
        (name, f"{backbone}_{task}", suite)
        for names, backbones, tasks, suite in PLAN
        for name, backbone, task in product(names, backbones, tasks)
    ]
    lacking: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}  # by whether all rows there say that
    for name, *where in (one for one in every if one not in done):
        own = [group for group in groups if [*_planned_as(group.rows[0])[1:]] == where]
        stakes = [points for access in CLASSES if (points := at_stake(own, access)) is not None]
        place = where[0] + (f" with {where[1]}" if where[1] else "")
        lacking[bool(stakes) and max(stakes) < LEAST_HEAD_START].setdefault(place, []).append(name)
    lists = {
        idle: "; ".join(f"{', '.join(names)} on {at}" for at, names in of.items()) for idle, of in lacking.items()
    }
    found = len(set(every) & done)
    said = f"The whole plan, of whose {len(every)} rows {found} are above"
    said += f". Not yet: {lists[False]}" if lists[False] else ""
    if lists[True]:
        said += (
            f". Not yet, where under {100 * LEAST_HEAD_START:.0f} points are at stake for every class of attackers, "
            f"so that of no method a share could be claimed: {lists[True]}"
        )
    return lines, said


def _planned_as(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["title"], row["key"]["setting"], suite_of(row)


def page(groups: list[Group], figure: str, beside: str) -> str:
    """The page."""
    rows = [row for group in groups for row in group.rows]
    # What whoever made a row wrote beside it.
    notes = [line for note in dict.fromkeys(row["note"] for row in rows if "note" in row) for line in (note, "")]
    lines = [
        "# Head start: methods of the field",
        "",
        "Written by `python -m examples.head_start_page` from rows of `python -m examples.benchmark`.",
        "",
        *(f"- {said}" for said in sentences(groups)),
        "",
        *notes,
        *main_table(groups),
        "In brackets: 95 % intervals, or of several seeds the least and the most. Bold: set apart from 0 %. –: of a",
        "head start under ten points, or one that images and seeds leave open, no share is claimed. The strongest",
        "attackers before, after and from random weights may be three different ones; what",
        f"[each attacker]({beside}) finds is on its own page. †: benign accuracy came out more than a point lower.",
        "",
        f"![What is removed of the head start, by method]({figure})",
        "",
        "Lines of the table without a share are left out. Intervals are those of the table.",
        "",
        "## Methods",
        "",
        "Of the papers' ideas on this library's Trainer (`examples/field_methods.py`), not of their authors' code.",
        "Where nothing else is said the last stage and the head move, as by the library's default: whoever draws",
        "that stage anew reads what he read before, whatever was done to it ([how much](../threat-model.md)).",
        "",
    ]
    names = dict.fromkeys(row["title"] for row in rows if row["key"]["method"].startswith("examples.field_methods:"))
    lines += [f"- {PAPERS[name][0]}: {PAPERS[name][1]}." for name in names]
    plan, said = planned(groups)
    lines += ["", "## Commands", "", "Each goes on where it was interrupted. Of the lines above:", ""]
    lines += ["```bash", *commands(rows), "```", "", f"{said}:", "", "```bash", *plan, "```"]
    return "\n".join(lines) + "\n"


def page_of_attackers(groups: list[Group], beside: str) -> str:
    """The page of single attackers."""
    lines = [
        "# Head start: each attacker",
        "",
        f"What each attacker finds, beside [the strongest of each class]({beside}). A cell has the share that is",
        "removed of the points at stake, and accuracy on harmful test images: before → after (from random weights).",
        "–: no share is claimed. Bold: set apart from 0 % with every seed. ¹: it knows how models are immunized.",
        "Steps of the last stage: how many times the steps its fine-tuning takes to what random weights reach.",
        "Unchanged: the starting model itself, for attackers that undo all that a method does. Rescaled weights: the",
        "same function by weights that no usual step moves; what an attacker loses there is removed by nothing.",
        "",
        *attackers_table(groups),
    ]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Write pages and figure."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.head_start_page", description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=Path, default=Path("runs/benchmark/rows.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/head-start.md"))
    given = parser.parse_args(words)
    every = grouped(read_rows(given.rows))
    groups = methods(every)
    if not groups:
        raise DataError(
            f"Expected rows of methods in {given.rows}, found none. Make some by python -m examples.benchmark."
        )
    picture = given.out.parent / "figures" / f"{given.out.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(groups, picture)
    beside = given.out.with_stem(f"{given.out.stem}-attackers")
    write_whole(beside, page_of_attackers(every, given.out.name))
    write_whole(given.out, page(groups, f"figures/{picture.name}", beside.name))


if __name__ == "__main__":
    main()
