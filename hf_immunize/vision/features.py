"""The input of the final classifier: the one notion of features that all Hugging Face vision models share.

``pooler_output`` is absent in ViT, unpooled in ResNet, and half of what DINOv2's head sees; the head's input is what a
linear probe would be trained on, whatever the family. It is captured by a hook, so the forward pass stays the model's
own (and, under data parallelism, the wrapper's own).
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_immunize.errors import HeadError


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


def find_head(model: PreTrainedModel, head_module: str | None = None) -> tuple[str, nn.Linear]:
    """Find the final classifier, the ``nn.Linear`` with one output a label.

    Only modules outside ``model.base_model`` are candidates, so a block as wide as the number of labels is not taken
    for the head. Models that are their own base model (CLIP, SigLIP) are searched whole.

    Args:
        model: An image classifier of transformers.
        head_module: The head's name in ``model.named_modules()``, where it cannot be found without help.

    Returns:
        The head's name and the head.

    Raises:
        HeadError: If there is no head, more than one candidate, or ``head_module`` names no ``nn.Linear``.

    Examples:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
        >>> find_head(ResNetForImageClassification(config))
        ('classifier.1', Linear(in_features=8, out_features=3, bias=True))
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if head_module is not None:
        if head_module not in linears:
            found = type(dict(model.named_modules()).get(head_module)).__name__
            found = "no module of that name" if found == "NoneType" else f"a {found}"
            raise HeadError(
                f"head_module={head_module!r} should name the nn.Linear that classifies, but {type(model).__name__} "
                f"has {found}; the last nn.Linear modules are {_shown(list(linears)[-3:])}."
            )
        return head_module, linears[head_module]

    num_labels = model.config.num_labels
    inside = set() if model.base_model is model else set(model.base_model.modules())
    candidates = {n: m for n, m in linears.items() if m.out_features == num_labels and m not in inside}
    if not candidates:
        raise HeadError(
            f"{type(model).__name__} has no classifier with {num_labels} outputs outside its backbone; load it with "
            f"AutoModelForImageClassification and num_labels >= 1, or name the classifier with head_module=..."
        )
    if len(candidates) > 1:
        raise HeadError(
            f"{type(model).__name__} has {len(candidates)} linear modules with {num_labels} outputs: "
            f"{_shown(list(candidates))}; name the classifier with head_module=..."
        )
    return next(iter(candidates.items()))


class HeadInput:
    """Record what the head receives during one forward pass.

    The hook is attached on entry and removed on exit, also after an exception.

    Args:
        head: The module whose input is recorded, as found by `find_head`.

    Raises:
        HeadError: If the head did not run, ran twice, or received anything but one feature row an image.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with HeadInput(model[2]) as captured:
        ...     logits = model(torch.randn(5, 4))
        >>> captured.features.shape, captured.features.requires_grad
        (torch.Size([5, 8]), True)
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self._features: Tensor | None = None
        self._handle: RemovableHandle | None = None

    @property
    def features(self) -> Tensor:
        """The head's input, ``(N, D)``, in the autograd graph of the forward pass."""
        if self._features is None:
            raise HeadError(
                f"The head {self.head} did not run in the recorded forward pass; run the whole model inside the "
                f"`with` block, or name the module that classifies with head_module=..."
            )
        return self._features

    def __enter__(self) -> HeadInput:
        if self._handle is not None:
            raise HeadError(
                "This HeadInput is already recording; use a HeadInput of its own for an inner `with` block."
            )
        self._features = None
        self._handle = self.head.register_forward_pre_hook(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _record(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._features is not None:
            raise HeadError(
                f"The head {head} ran twice within one HeadInput, so it is not clear which input holds the features; "
                f"use one `with` block for each forward pass, or name another module with head_module=..."
            )
        features = inputs[0]
        if features.dim() != 2:
            raise HeadError(
                f"The head {head} should receive one feature row an image, (N, D), but received the shape "
                f"{tuple(features.shape)}; name the module that classifies with head_module=..."
            )
        self._features = features


def penultimate_features(model: PreTrainedModel, pixel_values: Tensor, head_module: str | None = None) -> Tensor:
    """Compute the features a linear probe sees: the input of the model's classifier.

    The model's train or eval mode and the grad mode stay as they are.

    Args:
        model: An image classifier of transformers.
        pixel_values: Images, ``(N, C, H, W)``.
        head_module: The classifier's name, where it cannot be found without help; see `find_head`.

    Returns:
        Features ``(N, D)``, in the autograd graph.

    Raises:
        HeadError: If the classifier cannot be found or does not see one row an image.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> penultimate_features(ViTForImageClassification(config), torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """
    _, head = find_head(model, head_module)
    with HeadInput(head) as captured:
        model(pixel_values=pixel_values)
    return captured.features


def _shown(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names) or "absent"
