"""Run the candidates against fine-tuning attackers, one command a row, and write the page from the rows.

python -m examples.fine_tuning list
python -m examples.fine_tuning run --experiment resnet18_far --candidate depths --seed 0 --data_path DIR
python -m examples.fine_tuning all --data_path DIR                     (every row of plan.yaml that is not there yet)
python -m examples.fine_tuning page                                    (docs/results/fine-tuning.md from the rows)
"""

import argparse
import sys
from pathlib import Path

from hf_immunize.errors import ArgumentError, ImmunizationError


RAW = argparse.RawDescriptionHelpFormatter


def main(words: list[str] | None = None) -> int:
    """Do what was typed; 1 where it could not be done."""
    try:
        arguments = parse(sys.argv[1:] if words is None else words)
        {"run": run, "all": everything, "page": page, "list": listing}[arguments.command](arguments)
    except ImmunizationError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser("python -m examples.fine_tuning", description=__doc__, formatter_class=RAW)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="make one row, or go on with it where it was interrupted")
    one.add_argument("--experiment", required=True, help="name of a file in experiments/, or a file of your own")
    one.add_argument("--candidate", default="concentration", help="see `list`")
    one.add_argument("--seed", type=int, default=0, help="decides splits, starting model and draws")
    one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one training argument")
    one.add_argument("--redo", action="store_true", help="throw away what the run's folder has of other settings")
    many = commands.add_parser("all", help="every row of the plan that is not there yet, in its order")
    many.add_argument("--dry_run", action="store_true", help="print the commands alone")
    many.add_argument("--plan", type=Path, help="the plan; by default examples/fine_tuning/plan.yaml")
    for command in (one, many):
        command.add_argument("--data_path", default="data", help="folder of the data sets")
        command.add_argument("--output_dir", default="runs/fine_tuning", help="folder of all runs")
        command.add_argument("--shared", default="runs/networks/shared", help="folder of images and starting models")
    show = commands.add_parser("page", help="write the page from the rows")
    show.add_argument("--rows", type=Path, default=Path("runs/fine_tuning"), help="folder of all runs")
    show.add_argument("--out", type=Path, default=Path("docs/results/fine-tuning.md"), help="the page")
    show.add_argument("--plan", type=Path, help="rows that should be there")
    commands.add_parser("list", help="experiments and candidates")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> None:
    """One row."""
    from examples.fine_tuning.page import one_line
    from examples.fine_tuning.run import run_one
    from examples.fine_tuning.settings import Run
    from examples.networks.settings import parse_changes

    changes = parse_changes(arguments.set)
    places = (arguments.data_path, arguments.output_dir, arguments.shared)
    row = run_one(
        Run(arguments.experiment, arguments.candidate, arguments.seed, changes, *places, redo=arguments.redo)
    )
    print(one_line(row))


def everything(arguments: argparse.Namespace) -> None:
    """Every row of the plan."""
    from dataclasses import replace

    from examples.fine_tuning.page import one_line
    from examples.fine_tuning.plan import planned_runs
    from examples.fine_tuning.run import ROW, run_one

    failed = []
    for one in planned_runs(arguments.plan):
        one = replace(one, data_path=arguments.data_path, output_dir=arguments.output_dir, shared=arguments.shared)
        if arguments.dry_run:
            print(f"{'done' if (one.folder / ROW).is_file() else 'to do'}: {one.command()}")
            continue
        try:
            print(one_line(run_one(one)), flush=True)
        except ImmunizationError as error:  # the other rows do not depend on it
            print(f"Error in {one.name}: {error}", file=sys.stderr, flush=True)
            failed.append(one.name)
    if failed:
        raise ArgumentError(f"Expected every row of the plan, found that {', '.join(failed)} failed; see above.")


def page(arguments: argparse.Namespace) -> None:
    """The page."""
    from examples.fine_tuning.page import write_page

    write_page(arguments.rows, arguments.out, arguments.plan)
    print(f"Wrote {arguments.out}")


def listing(arguments: argparse.Namespace) -> None:
    """Experiments and candidates."""
    from examples.fine_tuning.candidates import CANDIDATES
    from examples.fine_tuning.settings import experiment_names, load

    for name in experiment_names():
        print(f"{name:20}{load(name)[0]['title']}")
    print()
    for name, one in CANDIDATES.items():
        print(f"{name:20}{one.about}")


if __name__ == "__main__":
    sys.exit(main())
