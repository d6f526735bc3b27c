"""What the ceiling of RIR means for somebody about to train, in one plain sentence."""

import math

from hf_immunize.linear.optimum import Ceiling


# From which ceiling on immunization by conditioning is worth trying; the paper's own results start at 3 and reach 350.
_HARDLY, _WORTHWHILE = 2.0, 10.0


def advice(ceiling: Ceiling) -> str:
    """One sentence: can these two tasks be told apart by conditioning at all, and what limits it.

    Args:
        ceiling: Of the two tasks.

    Example:
        >>> from hf_immunize.linear.optimum import rir_ceiling
        >>> advice(rir_ceiling([[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]))
        'No linear map can immunize here: both tasks use the same directions in the same proportions (ceiling 1), ...'
    """
    if math.isinf(ceiling.value):
        share = ceiling.harmful_only / ceiling.harmful_rank
        text = (
            f"A linear map can immunize without limit here, because {ceiling.harmful_only} of the "
            f"{ceiling.harmful_rank} harmful directions ({100 * share:.0f} %) do not occur in the benign data"
        )
        if ceiling.num_benign < ceiling.dim:
            return (
                f"{text}, but with {ceiling.num_benign} benign samples in {ceiling.dim} dimensions that may only mean "
                "that samples are missing: add benign data and look again."
            )
        if ceiling.common_rank == 0:
            return f"{text}; the two tasks share no direction at all."
        return f"{text}; on the directions that both use the ceiling is {ceiling.common_value:.3g}."
    if ceiling.value < _HARDLY:
        how = "the same" if ceiling.value < 1.01 else "almost the same"
        return (
            f"No linear map can immunize here: both tasks use the same directions in {how} proportions (ceiling "
            f"{ceiling.value:.3g}), so change the features, not the map behind them."
        )
    if ceiling.value < _WORTHWHILE:
        return (
            f"A linear map can immunize only weakly here (ceiling {ceiling.value:.3g}): expect little from "
            "conditioning unless earlier layers of the network move as well."
        )
    return (
        f"A linear map can immunize here: harmful probing can become {ceiling.value:.3g} times worse conditioned "
        "while benign probing stays as it is."
    )
