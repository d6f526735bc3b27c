"""Audit the demo's model: every attacker of a preset on it, and on what it was before immunization.

    python examples/audit_demo.py --output-dir runs/demo

Runs `hf-immunize demo` first where the folder does not hold its model yet. Prints the strongest attacker of each kind
before and after, and how many steps gradient descent needs; the rest is in the report.
"""

import argparse
from pathlib import Path

from hf_immunize import audit
from hf_immunize.cli.demo import digit_splits, run_demo


def strongest(outcomes, subject, access):
    """The best mean accuracy over seeds, and by what."""
    groups = {}
    for one in outcomes:
        if (one.subject, one.task, one.access, one.status) == (subject, "harmful", access, "done"):
            groups.setdefault((one.attacker, one.layer, one.precision), []).append(one.accuracy)
    name, values = max(groups.items(), key=lambda item: sum(item[1]) / len(item[1]))
    return f"{sum(values) / len(values):6.1%} by {name[0]} at {name[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/demo", help="Folder of the demo.")
    parser.add_argument("--preset", default="quick", help="quick, standard or full.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the demo.")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    if not (folder / "before").exists():
        run_demo(folder, arguments.seed)
    benign, harmful = digit_splits(arguments.seed)
    report = audit(
        str(folder),
        harmful=harmful,
        benign=benign,
        reference=str(folder / "before"),
        preset=arguments.preset,
        run_dir=folder / "audit",
    )
    report.write(folder / "audit")
    outcomes = report.data.outcomes
    for access in ("head_input", "any_layer", "fine_tuning"):
        for subject in ("reference", "immunized"):
            print(f"{access:12} {subject:10} {strongest(outcomes, subject, access)}")
    for subject in ("reference", "immunized"):
        for attacker in ("gd_line_search", "adamw", "ridge"):
            found = [
                one
                for one in outcomes
                if (one.subject, one.attacker, one.access, one.task) == (subject, attacker, "head_input", "harmful")
            ]
            mean = sum(one.accuracy for one in found) / len(found)
            steps = next((s for s, a in zip(found[0].steps, found[0].curve, strict=True) if a >= 0.76), None)
            print(
                f"{attacker:16} {subject:10} {mean:6.1%}, steps to 76 %: {steps if found[0].steps else 'closed form'}"
            )
    print(report.data.utility, report.data.rir, *report.data.warnings, sep="\n")


if __name__ == "__main__":
    main()
