"""Audit the demo's model: every attacker of a preset on it, and on what it was before immunization.

    python examples/audit_demo.py --output-dir runs/demo

Runs `hf-immunize demo` first where the folder does not hold its model yet. Prints the verdict; the figures are in the
report.
"""

import argparse
from pathlib import Path

from hf_immunize import audit
from hf_immunize.cli.demo import digit_splits, run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/demo", help="Folder of the demo.")
    parser.add_argument("--preset", default="quick", help="quick, standard or full.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the demo.")
    parser.add_argument("--attackers", type=lambda text: text.split(","), help="These alone, with commas.")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    if not (folder / "before").exists():
        run_demo(folder, arguments.seed)
    benign, harmful = digit_splits(arguments.seed)
    into = folder / "-".join(["audit", *(arguments.attackers or ())])
    models = {"reference": str(folder / "before"), "preset": arguments.preset, "attackers": arguments.attackers}
    report = audit(str(folder), harmful=harmful, benign=benign, run_dir=into, **models)
    report.write(into)
    print(*report.verdict(), *report.data.warnings, f"Figures: {into / 'report.html'}", sep="\n")


if __name__ == "__main__":
    main()
