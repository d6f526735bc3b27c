"""Features, logits and labels of a whole data set, batch by batch, in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.data.images import ImageCollator
from hf_immunize.vision.features import HeadInput, find_head
from hf_immunize.vision.precision import full_precision_forward


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExtractedBatch:
    """One batch after the forward pass, on the model's device.

    Attributes:
        features: Classifier inputs, shape ``(n, D)``.
        logits: Classifier outputs, shape ``(n, C)``.
        pixel_values: The images, shape ``(n, C, H, W)``.
        labels: Class indices, shape ``(n,)``, or None where the rows have none.
    """

    features: Tensor
    logits: Tensor
    pixel_values: Tensor
    labels: Tensor | None


def extract(
    model: PreTrainedModel,
    rows: Any,
    image_processor: Any = None,
    *,
    batch_size: int = 64,
    head_module: str | None = None,
    description: str = "features",
    progress: bool = True,
) -> Iterator[ExtractedBatch]:
    """Run a model over a data set in eval mode, in float32 at least and without gradients, in the set's order.

    Args:
        model: An image classifier; its train or eval mode is restored at the end.
        rows: A map-style dataset of rows with ``"image"`` or ``"pixel_values"``, such as `ImageRows`.
        image_processor: Needed where the rows hold images.
        batch_size: Images in one forward pass.
        head_module: The classifier's name, where it cannot be found without help.
        description: What the progress bar calls it.
        progress: Whether to show a progress bar.

    Yields:
        Batches; the last one may be short.

    Raises:
        DataError, ShapeError, ImageDecodeError: See `ImageCollator` and `ImageRows`.
        HeadError: See `find_head`.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 1}] * 5
        >>> batches = list(extract(ViTForImageClassification(config), rows, batch_size=4, progress=False))
        >>> [tuple(batch.features.shape) for batch in batches]
        [(4, 16), (1, 16)]
    """
    _, head = find_head(model, head_module)
    device = next(model.parameters()).device
    forward = full_precision_forward(model)
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=ImageCollator(image_processor))
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc=description, disable=not progress, leave=False):
            pixel_values = batch["pixel_values"].to(device)
            labels = batch.get("labels")
            with torch.no_grad(), torch.autocast(device.type, enabled=False), HeadInput(head) as captured:
                logits = forward(pixel_values=pixel_values).logits
            yield ExtractedBatch(
                captured.features, logits, pixel_values, None if labels is None else labels.to(device)
            )
    finally:
        model.train(was_training)
