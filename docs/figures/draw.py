"""The figures of the documents, drawn with the library's own functions.

python docs/figures/draw.py                   # those of the page of ideas
python docs/figures/draw.py --demo runs/demo  # also that of the demo, which `hf-immunize demo` has made
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from hf_immunize import fitted_fraction, immunize_linear, relative_immunization_ratio, rir_ceiling


HERE = Path(__file__).parent
BENIGN, HARMFUL, GREY = "#0072b2", "#d55e00", "0.45"
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "hf_immunize"}


def panels(count, **options):
    """A figure as wide as a page, and its axes."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def save(figure, name):
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


def kappa():
    """Gradient descent with exact line search on a round bowl and on a narrow one."""
    figure, axes = panels(2)
    for ax, condition in zip(axes, (2, 50), strict=True):
        hessian = torch.tensor([1.0, float(condition)])
        w, path = torch.tensor([1.0, 1.0 / condition]), []
        while hessian @ w**2 > 1e-2 * (1 + 1 / condition):
            path.append(w)
            gradient = hessian * w
            w = w - gradient * (gradient @ gradient) / (gradient @ (hessian * gradient))
        path = torch.stack([*path, w])
        x, y = torch.meshgrid(torch.linspace(-0.4, 1.1, 200), torch.linspace(-0.7, 0.7, 200), indexing="xy")
        ax.contour(x, y, (x**2 + condition * y**2).sqrt(), levels=9, colors="0.85", zorder=0)
        ax.plot(*path.T, color=HARMFUL if condition > 10 else BENIGN, marker=".", linewidth=1)
        ax.set(
            title=f"κ = {condition}: {len(path) - 1} steps to 1 % of the loss", xlabel="weight 1", ylabel="weight 2"
        )
    save(figure, "kappa")


def time():
    """Two tasks on the same features: one lies where the features vary most, one where they vary least."""
    torch.manual_seed(0)
    sigma = torch.logspace(0, -1.5, 12, dtype=torch.float64)
    basis = torch.randn(200, 12, dtype=torch.float64)
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    features = basis * sigma
    steps = [round(10 ** (k / 8)) for k in range(33)]
    figure, (left, right) = panels(2)
    left.plot(range(1, 13), sigma, color=GREY, marker="o")
    left.set(yscale="log", title="One set of features: κ = 1,000", xlabel="direction", ylabel="singular value")
    for index, colour, name in ((1, BENIGN, "a task in direction 2"), (8, HARMFUL, "a task in direction 9")):
        left.plot(index + 1, sigma[index], color=colour, marker="o", markersize=11)
        curve = [float(fitted_fraction(features, basis[:, index : index + 1], count)) for count in steps]
        right.plot(steps, curve, color=colour, label=name)
    right.axhline(0.8, color=GREY, linestyle=":", linewidth=1)
    right.set(xscale="log", title="Two tasks: two times", xlabel="steps of gradient descent", ylabel="fitted")
    right.legend(frameon=False)
    save(figure, "probing-time")


def features(seed):
    """Benign and harmful features of 16 dimensions that vary most in different directions, and benign targets."""
    draw = torch.Generator().manual_seed(seed)
    options = {"generator": draw, "dtype": torch.float64}
    benign = torch.randn(300, 16, **options) * torch.logspace(0, -1, 16, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(16, 16, **options))[0]
    harmful = torch.randn(300, 16, **options) * torch.logspace(0, -1, 16, dtype=torch.float64) @ turn
    return benign, benign[:, :3].sum(1), harmful


def rir():
    """Spectra before and after a linear map, and the ratio that follows."""
    benign, targets, harmful = features(0)
    theta = immunize_linear(benign, targets, harmful).theta
    sides = {"benign": (benign, benign @ theta, BENIGN), "harmful": (harmful, harmful @ theta, HARMFUL)}
    found = relative_immunization_ratio(
        harmful=sides["harmful"][1], harmful_reference=harmful, benign=sides["benign"][1], benign_reference=benign
    )
    figure, axes = panels(2, sharey=True)
    growth = {"benign": f"(ii) = {found.benign_ratio:,.0f}", "harmful": f"(i) = {found.harmful_ratio:,.0f}"}
    for ax, (name, (before, after, colour)) in zip(axes, sides.items(), strict=True):
        for moment, matrix, line in (("before", before, "--"), ("after", after, "-")):
            values = torch.linalg.svdvals(matrix)
            label = f"{moment}: κ = {float((values[0] / values[-1]) ** 2):,.0f}"
            ax.plot(range(1, 17), values / values[0], line, color=colour, label=label)
        ax.set(yscale="log", title=f"{name}: κ grew by {growth[name]}", xlabel="direction")
        ax.legend(frameon=False, loc="lower left")
    axes[0].set_ylabel("singular value / largest")
    figure.suptitle(f"RIR = (i) / (ii) = {found.rir:,.0f}", fontweight="bold")
    save(figure, "rir")


def definition():
    """Where maps of the linear setting land, the region that Definition 3.1 asks for, and the ceiling."""
    benign, targets, harmful = features(0)
    ceiling = rir_ceiling(benign, harmful)
    figure, (ax,) = panels(1)
    ends = [1 / ceiling.benign_kappa, 10]
    ax.plot(ends, [ceiling.value * end for end in ends], color=GREY, label="the ceiling: no linear map is above it")
    ax.fill_between([ends[0], 1], 1, 10 * ceiling.value, color=BENIGN, alpha=0.12, linewidth=0)
    ax.text(0.1, 1.8, "(a) and (b) hold", ha="center", color=BENIGN)
    ax.plot(1, 1, "o", color="black")
    ax.annotate("nothing done", (1, 1), (8, -4), textcoords="offset points")
    methods = {
        "R_ill alone": ("r_ill", {"step": "rule", "epochs": 5}),
        "descent on log κ": ("opt_kappa", {}),
        "Algorithm 1": ("kappa", {"step": "rule", "epochs": 100}),
        "closed form": ("optimum", {}),
    }
    for name, (method, options) in methods.items():
        theta = immunize_linear(benign, targets, harmful, method, **options).theta
        found = relative_immunization_ratio(
            harmful=harmful @ theta, harmful_reference=harmful, benign=benign @ theta, benign_reference=benign
        )
        ax.plot(found.benign_ratio, found.harmful_ratio, "o", color=HARMFUL)
        place = {"textcoords": "offset points", "color": HARMFUL}
        ax.annotate(name, (found.benign_ratio, found.harmful_ratio), (8, -4), **place)
    ax.set(xscale="log", yscale="log", xlabel="(ii), growth of benign κ", ylabel="(i), growth of harmful κ")
    ax.legend(frameon=False, loc="upper left")
    save(figure, "definition")


def head_start():
    """An example of three accuracies, and the share that follows."""
    figure, (ax,) = panels(1)
    read = {"random weights, or raw pixels": 50, "immunized weights": 70, "weights before": 90}
    ax.barh(list(read), list(read.values()), color=["0.75", HARMFUL, "0.55"])
    ax.axvline(20, color="black", linestyle=":", linewidth=1)
    ax.text(20.5, -0.75, "chance")
    for y, (begin, end, text, colour) in enumerate(
        [(50, 90, "head start: 40 points", "black"), (70, 90, "removed: 20 of 40 points, 50 %", HARMFUL)]
    ):
        height = 2.6 + 0.55 * (1 - y)
        ax.annotate("", (begin, height), (end, height), arrowprops={"arrowstyle": "<->", "color": colour})
        ax.text((begin + end) / 2, height + 0.12, text, ha="center", color=colour)
    ax.set(xlim=(0, 100), ylim=(-0.9, 3.6), xlabel="harmful accuracy of the strongest attacker, %")
    save(figure, "head-start")


def demo(folder):
    """What linear probes read of the demo's held-out digits, before immunization and after."""
    from transformers import AutoModelForImageClassification

    from hf_immunize.cli.demo import decoded, digit_splits, new_processor, probe

    processor = new_processor()
    models = [AutoModelForImageClassification.from_pretrained(path) for path in (folder / "before", folder)]
    figure, axes = panels(2, sharey=True)
    tasks = zip(axes, ("benign", "harmful"), ("0 to 4", "5 to 9"), (BENIGN, HARMFUL), digit_splits(0), strict=True)
    for ax, side, digits, colour, splits in tasks:
        rows = {name: decoded(data, processor) for name, data in splits.items()}
        for model, moment, line in zip(models, ("before", "after"), ("--", "-"), strict=True):
            found = probe(model, rows)
            steps = range(1, len(found.curve) + 1)
            ax.plot(steps, found.curve, line, color=colour, label=f"gradient descent, {moment}")
            style = {"linestyle": ":", "color": GREY if moment == "before" else "black", "linewidth": 1.2}
            ax.axhline(found.least_squares, label=f"least squares, {moment}", **style)
        ax.set(xscale="log", ylim=(0, 1.02), title=f"{side}: digits {digits}", xlabel="steps of the probe")
    axes[0].legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("held-out accuracy")
    save(figure, "demo")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="the folder that the demo of seed 0 has written")
    arguments = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        for one in (kappa, time, rir, definition, head_start):
            one()
        if arguments.demo is not None:
            demo(arguments.demo)
