"""Run the experiments on networks, one command a row, and write the page from the rows.

python -m examples.networks list
python -m examples.networks run --experiment mobilenet_cars --method default --seed 0 --data_path DIR
python -m examples.networks run --config my_run.yaml --seed 1          (the same names; flags override the file)
python -m examples.networks all --data_path DIR                        (every row of the plan that is not there yet)
python -m examples.networks page --rows runs/networks --out docs/results/networks.md
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

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
    """Flags, and where ``--config`` names a file, its values in place of defaults."""
    parser = argparse.ArgumentParser("python -m examples.networks", description=__doc__, formatter_class=RAW)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="make one row, or go on with it", formatter_class=RAW, description=_RUN)
    one.add_argument("--config", metavar="FILE", help="YAML file of these arguments; flags override it")
    one.add_argument("--experiment", help="name of a file in experiments/, or a file of your own")
    one.add_argument("--method", default="default", help="see `list`")
    one.add_argument("--seed", type=int, default=0, help="decides splits, classes and draws")
    one.add_argument("--set", action="append", metavar="NAME=VALUE", help="change one argument; may be repeated")
    one.add_argument("--model", help="folder or Hub name of another model to start from")
    one.add_argument("--keep_card", action="store_true", help="copy card and record into model_cards/")
    one.add_argument("--redo", action="store_true", help="throw away what the run's folder has of other settings")
    many = commands.add_parser("all", help="every row of the plan that is not there yet, in its order")
    many.add_argument("--plan", type=Path, help="the plan; by default examples/networks/plan.yaml")
    many.add_argument("--only", nargs="+", help="experiments, in place of all that one machine of this kind can run")
    many.add_argument("--dry_run", action="store_true", help="print the commands alone")
    for command in (one, many):
        command.add_argument("--data_path", default="data", help="folder of the data sets")
        command.add_argument("--output_dir", default="runs/networks", help="folder of all runs")
        command.add_argument("--attackers", help="probes and fine-tuning, separated by commas")
    show = commands.add_parser("page", help="write the page and its figures from the rows")
    show.add_argument("--rows", type=Path, default=Path("runs/networks"), help="folder of all runs")
    show.add_argument("--out", type=Path, default=Path("docs/results/networks.md"), help="the page")
    show.add_argument("--plan", type=Path, help="rows that should be there; by default examples/networks/plan.yaml")
    show.add_argument("--readme", type=Path, help="a file whose overview is renewed too, such as README.md")
    commands.add_parser("list", help="experiments and methods")
    found = parser.parse_args(words)
    if getattr(found, "config", None):
        values = read_config(found.config)
        if unknown := sorted(set(values) - set(vars(found)) | {"command", "config"} & set(values)):
            raise ArgumentError(f"Expected names of flags in {found.config}, found {', '.join(unknown)}.")
        one.set_defaults(**values)
        found = parser.parse_args(words)
    return found


_RUN = """Make one row: immunize, measure before and after, attack both, write row.json and spectra.png.

What is finished is not done again: the same command goes on after an interruption. A run folder of other settings is
never reused; --redo throws it away."""


def read_config(path: str) -> dict[str, Any]:
    """Names and values of a YAML file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentError(f"Expected a YAML file at {path}, found: {error}.") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"Expected names and values in {path}, found {type(values).__name__}.")
    return values


def run(arguments: argparse.Namespace) -> None:
    """One row."""
    from examples.networks.page import one_line
    from examples.networks.run import run_one
    from examples.networks.settings import Run

    if not arguments.experiment:
        raise ArgumentError("Expected --experiment, found none; `list` names them.")
    row = run_one(
        Run(
            arguments.experiment,
            arguments.method,
            arguments.seed,
            arguments.set,
            arguments.data_path,
            arguments.output_dir,
            arguments.model,
            words_of(arguments.attackers),
            arguments.keep_card,
            arguments.redo,
        )
    )
    print(one_line(row))


def words_of(text: Any) -> list[str] | None:
    """Words separated by commas."""
    words = text.split(",") if isinstance(text, str) else text
    return [word.strip() for word in words] if words else None


def everything(arguments: argparse.Namespace) -> None:
    """Every row of the plan."""
    from dataclasses import replace

    from examples.networks.page import one_line
    from examples.networks.plan import planned_runs
    from examples.networks.run import ROW, run_one

    failed = []
    for one in planned_runs(arguments.plan, arguments.only):
        places = {"data_path": arguments.data_path, "output_dir": arguments.output_dir}
        shown = one.method == "default" and not one.changes and one.seed == 0
        one = replace(one, **places, attackers=words_of(arguments.attackers), keep_card=shown)
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
    from examples.networks.page import write_page

    write_page(arguments.rows, arguments.out, arguments.plan, arguments.readme)
    print(f"Wrote {arguments.out}")


def listing(arguments: argparse.Namespace) -> None:
    """Experiments and methods."""
    from examples.networks.methods import METHODS
    from examples.networks.settings import experiment_names, load_experiment

    for name in experiment_names():
        spec = load_experiment(name)
        print(f"{name:32}{spec['title']} ({spec.get('machine', 'any machine')})")
    print()
    for name, changes in METHODS.items():
        print(f"{name:16}{', '.join(f'{key}={value}' for key, value in changes.items()) or 'the library’s defaults'}")


if __name__ == "__main__":
    sys.exit(main())
