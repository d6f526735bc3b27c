"""Run the experiments, one command a row, and write the page from the rows.

python -m examples.experiments list
python -m examples.experiments run --backbone mobilenet --task cars --method default --seed 0 --data_path DIR
python -m examples.experiments all --data_path DIR                     (every row of the plan that is not there yet)
python -m examples.experiments page --rows runs/experiments --out docs/results/networks.md

What is finished is not done again: the same command goes on after an interruption. A run folder of other settings is
never reused; --redo throws it away.
"""

import argparse
import sys
from dataclasses import replace
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
    parser = argparse.ArgumentParser("python -m examples.experiments", description=__doc__, formatter_class=RAW)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="make one row, or go on with it")
    one.add_argument("--backbone", required=True, help="the starting model, see `list`")
    one.add_argument("--task", required=True, help="what is harmful, see `list`")
    one.add_argument("--method", default="default", help="see `list`")
    one.add_argument("--seed", type=int, default=0, help="decides splits, classes and draws")
    one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change an argument; repeatable")
    one.add_argument("--model", help="folder or Hub name of another model to start from")
    one.add_argument("--keep_card", action="store_true", help="copy card and record into model_cards/")
    one.add_argument("--redo", action="store_true", help="throw away what the run's folder has of other settings")
    many = commands.add_parser("all", help="every row of the plan that is not there yet, in its order")
    many.add_argument("--only", nargs="+", help="backbones, in place of all that a machine without a GPU can run")
    many.add_argument("--dry_run", action="store_true", help="print the commands alone")
    for command in (one, many):
        command.add_argument("--data_path", default="data", help="folder of the data sets")
        command.add_argument("--output_dir", default="runs/experiments", help="folder of all runs")
        command.add_argument("--attackers", type=names_of, help="probes and fine-tuning, separated by commas")
    show = commands.add_parser("page", help="write the page and its figures from the rows")
    show.add_argument("--rows", type=Path, default=Path("runs/experiments"), help="folder of all runs")
    show.add_argument("--out", type=Path, default=Path("docs/results/networks.md"), help="the page")
    show.add_argument("--readme", type=Path, help="a file whose overview is renewed too, such as README.md")
    names = commands.add_parser("list", help="backbones, tasks and methods")
    for command in (one, many, show, names):
        command.add_argument("--settings", help="backbones, tasks and plan, in place of settings.yaml")
    return parser.parse_args(words)


def names_of(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",")]


def run(arguments: argparse.Namespace) -> None:
    """One row."""
    from examples.experiments.page import one_line
    from examples.experiments.run import run_one
    from examples.experiments.settings import Run, parse_changes

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "set")}
    print(one_line(run_one(Run(**given, changes=parse_changes(arguments.set)))))


def everything(arguments: argparse.Namespace) -> None:
    """Every row of the plan."""
    from examples.experiments.page import one_line
    from examples.experiments.run import ROW, run_one
    from examples.experiments.settings import planned_runs

    failed = []
    for one in planned_runs(arguments.settings, arguments.only):
        places = {"data_path": arguments.data_path, "output_dir": arguments.output_dir}
        shown = one.method == "default" and not one.changes and one.seed == 0
        one = replace(one, **places, attackers=arguments.attackers, keep_card=shown)
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
    """The page and its figures."""
    from examples.experiments.page import write_page

    write_page(arguments.rows, arguments.out, arguments.settings, arguments.readme)
    print(f"Wrote {arguments.out}")


def listing(arguments: argparse.Namespace) -> None:
    """Backbones, tasks and methods."""
    from examples.experiments.methods import METHODS, TITLES
    from examples.experiments.settings import load_settings

    settings = load_settings(arguments.settings)
    for part in ("backbones", "tasks"):
        print(f"{part}:")
        for name, one in settings[part].items():
            machine = f" ({one['machine']})" if "machine" in one else ""
            print(f"  {name:20}{one['title'].lstrip(', ')}{machine}")
    print("methods:")
    for name, changes in METHODS.items():
        shown = ", ".join(f"{key}={value}" for key, value in changes.items()) or "the library’s defaults"
        print(f"  {name:20}{TITLES[name]}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
