"""The regularizers forward and backward: exactness against float64, and their share of a ViT-B-sized step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import format_seconds, interleaved_medians, network_like_features
from hf_immunize.spectra.hessian_functions import hessian_r_ill, hessian_r_well
from hf_immunize.vision.scope import select_trainable


DIM = 768
# Rows a side, and the share of a step that the regularizers may take.
WANTED = {64: 0.01, 256: 0.01, 1024: 0.05}
STEP_BATCH = 8


def by_autograd(benign: Tensor, harmful: Tensor) -> Tensor:
    """R_well on benign and R_ill on harmful features through the eigenvalues of the D×D Hessian, in float64."""
    h_benign, h_harmful = (z.double().mT @ z.double() for z in (benign, harmful))
    well = torch.linalg.eigvalsh(h_benign)
    # float32 features have no more directions than samples, and what lies below their rounding is none
    ill = torch.linalg.eigvalsh(h_harmful)[-min(harmful.shape) :]
    r_well = 0.5 * well[-1] ** 2 - well.square().sum() / (2 * benign.shape[1])
    return r_well + 1 / (ill.square().mean() / 2 - 0.5 * ill[0] ** 2)


def closed_form(benign: Tensor, harmful: Tensor) -> Tensor:
    return hessian_r_well(benign) + hessian_r_ill(harmful)


def gradients(function: Callable[[Tensor, Tensor], Tensor], benign: Tensor, harmful: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(benign, harmful), (benign, harmful))


def vit_base_step() -> Callable[[], None]:
    """Forward and backward of a ViT-B of 224 pixels on `STEP_BATCH` images, the last stage trainable."""
    model = ViTForImageClassification(ViTConfig(num_labels=2))
    select_trainable(model, "last_stage")
    images, labels = torch.randn(STEP_BATCH, 3, 224, 224), torch.arange(STEP_BATCH) % 2

    def step() -> None:
        model.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()

    return step


def run() -> dict[str, Any]:
    """Medians, shares of a step of as many images, and the largest difference of the gradients."""
    step_seconds = interleaved_medians({"step": vit_base_step()}, 3)["step"]
    measurements = []
    for rows, wanted in WANTED.items():
        benign, harmful = (network_like_features(rows, DIM, seed).requires_grad_() for seed in (0, 1))
        expected = gradients(by_autograd, benign, harmful)
        found = gradients(closed_form, benign, harmful)
        difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        runs = {
            "closed form": lambda b=benign, h=harmful: gradients(closed_form, b, h),
            "autograd": lambda b=benign, h=harmful: gradients(by_autograd, b, h),
        }
        seconds = interleaved_medians(runs, 9)
        step = step_seconds * 2 * rows / STEP_BATCH  # benign and harmful images
        share = seconds["closed form"] / step
        measurements.append(
            {"N": rows, "D": DIM, "seconds": seconds, "step": step, "share": share, "wanted": wanted}
            | {"gradient_difference": difference}
        )
    missed = [str(row["N"]) for row in measurements if row["share"] > row["wanted"]]
    return {
        "summary": (
            f"Float32 features of {DIM} dimensions. The step is that of a ViT-B at 224 pixels whose last "
            f"stage trains, measured on {STEP_BATCH} images and extrapolated to N benign and N harmful ones. "
            + (f"More than the share wanted: N = {', '.join(missed)}." if missed else "All shares are within bounds.")
        ),
        "tables": [
            {
                "title": "R_well on benign and R_ill on harmful features, forward and backward:",
                "columns": ["N a side", "closed form", "D×D autograd", "step", "share", "wanted", "gradients differ"],
                "rows": [
                    [
                        row["N"],
                        format_seconds(row["seconds"]["closed form"]),
                        format_seconds(row["seconds"]["autograd"]),
                        format_seconds(row["step"]),
                        f"{row['share']:.2%}",
                        f"≤ {row['wanted']:.0%}",
                        f"{row['gradient_difference']:.0e}",
                    ]
                    for row in measurements
                ],
            }
        ],
        "measurements": measurements,
    }
