"""The frontier of what linear maps can do, as a figure."""

from pathlib import Path

from hf_immunize.errors import ArgumentError, RankError
from hf_immunize.files import check_writable, staged_directory
from hf_immunize.linear.optimum import Ceiling


FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def prepare_figure(path: str | Path) -> None:
    """Make sure, before any work is done, that a figure can be saved there; create its folder.

    Args:
        path: Where to.

    Raises:
        ArgumentError: An unknown ending, a folder of that name, or no folder can be made.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"Expected a figure that ends in one of {', '.join(FORMATS)}, found {path}; rename it.")
    if path.is_dir():
        raise ArgumentError(f"Expected a file for the figure, found the folder {path}; choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"Expected a folder {path.parent} for the figure, found that it cannot be made ({error.strerror}); choose "
            "another place."
        ) from error
    check_writable(path.parent, "--figure")


def save_frontier(ceiling: Ceiling, path: str | Path) -> None:
    """Draw the best harmful ratio (i) against the benign ratio (ii), and save it.

    Where the harmful data have directions that the benign data lack, the line is that of the shared directions, and
    legend and title say so.

    Args:
        ceiling: Of two tasks.
        path: Where to; the ending decides the format. A missing folder is created.

    Raises:
        RankError: The tasks share no direction, so there is no frontier to draw.
        ArgumentError: The file cannot be written, or has an unknown ending.
    """
    prepare_figure(path)
    points = ceiling.frontier()
    if not points:
        raise RankError("The two tasks share no direction, so there is no frontier to draw; leave --figure out.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    benign, harmful = [p[1] for p in points], [p[2] for p in points]
    figure, axis = plt.subplots(figsize=(7.5, 5.6), constrained_layout=True)
    axis.plot(benign, harmful, linewidth=3, color="tab:blue", label=_label(ceiling))
    axis.fill_between(benign, [min(harmful) / 10] * len(points), harmful, color="tab:blue", alpha=0.12)
    axis.plot([benign[0]], [harmful[0]], "o", markersize=10, color="tab:blue")
    axis.annotate(
        "t = 1: benign\nperfectly conditioned",
        (benign[0], harmful[0]),
        fontsize=12,
        textcoords="offset points",
        xytext=(12, -4),
        va="top",
    )
    axis.plot([1], [1], "s", markersize=11, color="tab:red", label="as it is (θ = I)")
    axis.axvline(1, color="gray", linestyle="--", linewidth=1.2)
    axis.axhline(1, color="gray", linestyle="--", linewidth=1.2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(min(min(harmful) / 10, 0.5), max(max(harmful) * 4, 2))
    axis.set_xlabel("(ii)  κ of the benign task, times what it was", fontsize=13)
    axis.set_ylabel("(i)  κ of the harmful task, times what it was", fontsize=13)
    scope = f" on the shared directions ({ceiling.common_rank})" if ceiling.harmful_only else ""
    axis.set_title(f"What a linear map can reach{scope}", fontsize=14)
    axis.tick_params(labelsize=12)
    for line in (axis.xaxis, axis.yaxis):
        low, high = line.get_view_interval()
        line.set_major_formatter("{x:g}")
        # Between few decades the ticks in between need numbers; between many they would run into each other.
        line.set_minor_formatter("{x:g}" if high / low < 30 else "")
    axis.tick_params(which="minor", labelsize=10)
    axis.legend(fontsize=12, loc="lower right")
    axis.grid(alpha=0.3)
    try:
        with staged_directory(Path(path).parent) as staging:
            figure.savefig(staging / Path(path).name, dpi=100)
    except OSError as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise ArgumentError(
            f"Expected to write the figure {path}, found that it cannot be ({reason}); choose another place."
        ) from error
    finally:
        plt.close(figure)


def _label(ceiling: Ceiling) -> str:
    if ceiling.harmful_only:
        return f"frontier of the shared directions: RIR = {ceiling.common_value:.3g}"
    if ceiling.harmful_rank == 1:
        return f"frontier: one harmful direction, RIR up to {ceiling.value:.3g}"
    return f"frontier: RIR = {ceiling.value:.3g}"
