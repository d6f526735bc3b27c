"""Write docs/results/head-start.md from rows of examples/benchmark.py: one table, one figure, ten sentences.

python -m examples.head_start_page --rows runs/benchmark/rows.jsonl --out docs/results/head-start.md
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.audit_page import table
from examples.benchmark import read_rows
from examples.experiments.settings import describe_changes
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


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one method and setting, one a seed."""

    rows: list[dict[str, Any]]

    @property
    def setting(self) -> str:
        """Backbone and task."""
        key = self.rows[0]["key"]
        return key["setting"] + (f", {key['attack_images']} images" if "attack_images" in key else "")

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
        found: dict[Key, list[float | None]] = {}
        for one in (one for row in self.rows for one in row["attackers"]):
            found.setdefault((one["attacker"], one["access"]), []).append(one["removed"])
        return {key: statistics.fmean(v) for key, v in found.items() if None not in v}  # type: ignore[type-var]

    @property
    def head_starts(self) -> dict[Key, float]:
        """Mean head start of each attacker."""
        found: dict[Key, list[float]] = {}
        for one in (one for row in self.rows for one in row["attackers"]):
            found.setdefault((one["attacker"], one["access"]), []).append(one["head_start"])
        return {key: statistics.fmean(values) for key, values in found.items()}

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

    def of_class(self, access: str) -> float | None:
        """Mean share that is removed by the strongest attacker of each model, where it may be claimed."""
        found = [(row["removed"][access] or {}).get("removed") for row in self.rows]
        return None if None in found else statistics.fmean(found)


def grouped(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups by setting, in the order of the rows."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["key"]
        attackers = tuple(one["attacker"] for one in row["attackers"])
        images = key.get("attack_images", 0)
        of = key["setting"], images, row["title"], key["method"], str(key["changes"]), key["preset"]["name"], attackers
        found.setdefault(of, []).append(row)
    return sorted(map(Group, found.values()), key=lambda group: group.setting)


def knows(key: Key) -> bool:
    """Whether an attacker knows how models are immunized."""
    return key[0] in ADAPTIVE


def named(key: Key) -> str:
    """An attacker, with where it looks."""
    return label(key[0]) + ", any layer" * (key[1] == "any_layer")


def main_table(groups: list[Group], adaptive: bool = False) -> list[str]:
    """Methods and attackers by what is removed of how many points; the least of a row in bold."""
    attackers = list(dict.fromkeys(key for group in groups for key in group.head_starts if knows(key) == adaptive))
    attackers.sort(key=lambda key: list(CLASSES).index(key[1]))
    slowed = not adaptive and any(group.slowed != "–" for group in groups)
    heads = ["method", "seeds", "benign, points", "seconds"]
    heads += [*map(named, attackers), *["steps of the last stage"] * slowed]
    lines, setting = [], ""
    for group in groups:
        if not any(key in group.head_starts for key in attackers):
            continue
        if group.setting != setting:
            setting = group.setting
            lines.append([f"*{setting}*", *[""] * (len(heads) - 1)])
        found = {key: value for key, value in group.removed.items() if key in attackers}
        stakes = group.head_starts
        least = min(found.values(), default=None)
        cells = [
            share(found.get(key)) + (f" of {round(100 * stakes[key])}".replace("-", "−") if key in stakes else "")
            for key in attackers
        ]
        cells = [
            f"**{cell}**" if key in found and found[key] == least else cell
            for key, cell in zip(attackers, cells, strict=True)
        ]
        seconds = statistics.fmean(row["seconds"].get("immunizing", 0.0) for row in group.rows)
        seeds = ", ".join(str(row["key"]["seed"]) for row in group.rows)
        lines.append([group.title, seeds, signed(group.benign), f"{seconds:,.0f}", *cells])
        lines[-1] += [group.slowed] * slowed
    return table(heads, lines)


def sentences(groups: list[Group]) -> list[str]:
    """Ten, each of the rows alone."""
    rows = [row for group in groups for row in group.rows]
    settings = ", ".join(dict.fromkeys(group.setting for group in groups))
    presets = ", ".join(dict.fromkeys(row["key"]["preset"]["name"] for row in rows))
    single = sum(len(group.rows) == 1 for group in groups)
    said = [
        f"The table has {len(groups)} of the methods in their settings ({settings}), {single} with one seed alone, of "
        f"which another training may differ; rows: {len(rows)}, preset: {presets}.",
        "*Removed* is the share of what the released weights give an attacker, beyond the same attack on random "
        "weights, that is gone: 100% where they give nothing more, below 0 where immunization helps.",
    ]
    stakes = [(group.setting, key, points) for group in groups for key, points in group.head_starts.items()]
    under = {tuple(pair) for *pair, points in stakes if points < LEAST_HEAD_START}
    every = {tuple(pair) for *pair, _ in stakes}
    said.append(
        f"Of {len(under)} of {len(every)} attackers in these settings the head start is under "
        f"{100 * LEAST_HEAD_START:.0f} points, so that nothing can be said to be removed."
    )
    for access, words in CLASSES.items():
        known = {group: value for group in groups if (value := group.of_class(access)) is not None and _real(group)}
        if not known:
            said.append(f"{words}: of no method may a share be claimed; too little is at stake, or none attacked.")
            continue
        kept = {group: value for group, value in known.items() if group.benign >= -KEPT}
        best = max(kept or known, key=known.__getitem__)
        helped = sum(value < 0 for value in known.values())
        who = f"{best.title} ({best.setting})"
        most = (
            f"{who} removes most"
            if _significant(best, access)
            else f"{who} is ahead with a share that does not differ significantly from 0%"
        )
        said.append(
            f"{words}: by the strongest attacker of each model {most}, {share(known[best])}{_ends(best, access)}"
            f"{'' if kept else ', at a loss of benign accuracy'}; {helped} of {len(known)} are below 0%."
        )
    broken = [group.removed for group in groups if group.removed and _real(group)]
    by = Counter(named(min(removed, key=removed.__getitem__)) for removed in broken)
    said.append(
        f"What breaks each is in bold: {', '.join(f'{name} ({times} ×)' for name, times in by.most_common())}."
    )
    lost = [f"{group.title} ({group.setting}: {_change(group)})" for group in groups if group.benign < -KEPT]
    said.append(
        f"Benign accuracy came out more than a point lower with {', '.join(lost) or 'none'}"
        f"{', marked †: what these remove is no gain, since a model that knows nothing removes all' * bool(lost)}."
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
        f"tasks each, six attackers) {len(done)} are among them; the commands below make the rest."
    )
    return said


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


def _significant(group: Group, access: str) -> bool:
    """Whether the share that is removed is above zero with all of its interval, with every seed."""
    ends = [(row["removed"][access] or {}).get("removed_interval") for row in group.rows]
    return all(one is not None and one[0] > 0 for one in ends)


def _ends(group: Group, access: str) -> str:
    """The interval of the only row; of several, each has its own in the file."""
    ends = (group.rows[0]["removed"][access] or {}).get("removed_interval")
    return f" ({' to '.join(map(share, ends))})" if ends and len(group.rows) == 1 else ""


def draw(groups: list[Group], path: Path) -> None:
    """Methods from top to bottom, what is removed of each attacker from left to right, with its interval."""
    groups = [group for group in groups if group.removed]
    figure, (axes,) = new_figure(1)
    figure.set_size_inches(9, 1.8 + 0.5 * len(groups))
    attackers = list(dict.fromkeys(key for group in groups for key in group.removed if not knows(key)))
    for number, key in enumerate(attackers):
        for height, group in enumerate(groups):
            if key not in group.removed:
                continue
            at, value = height + 0.12 * (number - (len(attackers) - 1) / 2), group.removed[key]
            known = [one for row in group.rows for one in row["attackers"] if (one["attacker"], one["access"]) == key]
            ends = known[0]["interval"] if len(known) == 1 else (min(known_removed(known)), max(known_removed(known)))
            axes.plot([100 * end for end in ends or (value, value)], [at, at], color=f"C{number}", alpha=0.4)
            axes.plot(100 * value, at, "o", color=f"C{number}", markersize=5)
        axes.plot([], [], "o", color=f"C{number}", label=named(key))
    axes.set_yticks(range(len(groups)), [f"{group.title}\n{group.setting}" for group in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.axvline(100, color="0.5", linewidth=0.8)
    most = max((value for group in groups for value in group.removed.values()), default=0.0)
    axes.set_xlim(-120, max(140, 100 * most + 15))
    axes.set_xlabel("removed of the head start, %")
    figure.legend(frameon=False, fontsize=7, loc="outside lower center", ncols=2)
    save_figure(figure, path)


def known_removed(known: list[dict[str, Any]]) -> list[float]:
    """Shares of several seeds."""
    return [one["removed"] for one in known]


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
        "A cell is the share that is removed of how many points of head start; –: no share can be told, since under",
        "ten points are at stake, or since test images and seeds leave open whether any are. †: benign accuracy came",
        "out more than a point lower. The last column: steps to what the same attack reaches from random weights.",
    ]
    if any(knows(key) for group in groups for key in group.head_starts):
        lines += ["", "## Under attackers who know the method", "", *main_table(groups, adaptive=True)]
    lines += ["", f"![What is removed of each attacker’s head start, by method]({figure})", ""]
    lines += ["## Methods", "", "Of the papers' ideas on this library's Trainer (`examples/field_methods.py`), not of"]
    lines += ["their authors' code.", "", *papers, "", "## Rows that were run", "", "```bash"]
    lines += [*dict.fromkeys(row["command"] for row in rows), "```", "", "## The rest", ""]
    lines += ["The core grid and what follows it; each command goes on where it was interrupted:", "", "```bash", GRID]
    return "\n".join([*lines, "```"]) + "\n"


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
