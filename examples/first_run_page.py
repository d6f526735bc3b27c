"""Write the page of a training run from its results.json, so that no figure on it is typed by hand.

python -m examples.first_run_page runs/first --output docs/results/first-run.md
"""

import argparse
import json
import shutil
from datetime import date
from pathlib import Path

from benchmarks.common import describe_machine
from hf_immunize.hub.card import metric_rows


MORE = (
    ("effective rank of benign features", "eval_benign_effective_rank", "{:.1f}"),
    ("effective rank of harmful features", "eval_harmful_effective_rank", "{:.1f}"),
    ("(i), harmful κ after over before", "eval_harmful_ratio", "{:,.4g}"),
    ("(ii), benign κ after over before", "eval_benign_ratio", "{:,.4g}"),
)


def page(results: dict, title: str, figure: str, settings: str, note: str) -> str:
    before, after, images = results["before"], results["after"], results["images"]
    count, share = images["benign_eval"], [moment["eval_accuracy"] for moment in (before, after)]
    # Unpaired, hence wider than a paired interval: the run keeps no single predictions.
    half = 196 * (sum(p * (1 - p) for p in share) / count) ** 0.5
    lines = [
        f"# {title}",
        "",
        f"{date.today().isoformat()}, {describe_machine()}. Written by `python -m examples.first_run_page`; one seed "
        f"({results['seed']}).",
        "",
        f"Objective `{results['objective']}`, moved: `{results['trainable']}`, {results['steps']} steps. Benign: "
        f"{results['benign']} ({images['benign_train']} images to train on, {count} to measure on). Harmful: "
        f"{results['harmful']} ({images['harmful_train']} and {images['harmful_eval']}).",
        "",
        "| on held-out images | before | after |",
        "|---|---:|---:|",
        *(f"| {name} | {old} | {new} |" for name, old, new in metric_rows(before, after)),
        *(f"| {name} | {form.format(before[key])} | {form.format(after[key])} |" for name, key, form in MORE),
        "",
        f"Benign accuracy changed by {100 * (share[1] - share[0]):+.1f} points (95 % interval ± {half:.1f}, taking "
        f"both accuracies as independent). {results['summary'].split('; ')[0]}.",
        "",
        f"With fewer images than feature dimensions ({count} benign) κ describes this sample of images, not the task. "
        "No attack was run for this page: what least squares, earlier layers and fine-tuning recover is not known "
        "from it.",
        "",
        *([note, ""] if note else []),
        f"![Spectra of the features before and after]({figure})",
        "",
        "Settings:",
        "",
        "```yaml",
        settings.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder that `hf-immunize train` wrote.")
    parser.add_argument("--output", type=Path, default=Path("docs/results/first-run.md"))
    parser.add_argument("--title", default="First run: MobileNetV2 with ImageNet weights against Stanford Cars")
    parser.add_argument("--benign-name", help="In place of the path it was loaded from.")
    parser.add_argument("--harmful-name", help="In place of the path it was loaded from.")
    parser.add_argument("--note", default="", help="A paragraph of what the figures need to be understood.")
    parser.add_argument("--settings", type=Path, default=Path("examples/first_run.yaml"))
    arguments = parser.parse_args()
    results = json.loads((arguments.run / "results.json").read_text(encoding="utf-8"))
    results["benign"] = arguments.benign_name or results["benign"]
    results["harmful"] = arguments.harmful_name or results["harmful"]
    figure = arguments.output.parent / "figures" / f"{arguments.output.stem}.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.run / "spectra.png", figure)
    text = page(
        results,
        arguments.title,
        f"figures/{figure.name}",
        arguments.settings.read_text(encoding="utf-8"),
        arguments.note,
    )
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
