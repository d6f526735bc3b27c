"""A linear head on a bare backbone (`AutoModel`), so that it can be trained, immunized and saved like a classifier.

What is saved is the backbone's ordinary checkpoint, which `AutoModel.from_pretrained` loads without this library, and
beside it the head: ``head.safetensors`` and ``head_config.json``.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file

from hf_immunize.errors import ArgumentError, CheckpointError, HeadError
from hf_immunize.text import library_words
from hf_immunize.vision.families import FAMILIES, classifier_class, family_of, image_shape
from hf_immunize.vision.head import in_eval_mode


# The head reads what the family's own image classifier feeds its head (and the result is that classifier, an ordinary
# checkpoint), pooler_output, or of last_hidden_state the class token or the mean over patches.
POOLINGS = ("head_input", "pooler", "cls", "mean")
HEAD_FILES = HEAD_FILE, HEAD_CONFIG_FILE = "head.safetensors", "head_config.json"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within, transformers builds whole models, also once ZeRO 3 is on, which gives each of all processes a part."""
    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


@whole_weights()
def with_linear_head(backbone: PreTrainedModel, num_labels: int | None = None, pooling: str = "") -> PreTrainedModel:
    """Put a new linear head on a bare backbone."""
    if pooling not in POOLINGS:
        raise ArgumentError(f"Expected pooling= out of {', '.join(POOLINGS)}, found {pooling!r}. Choose one of these.")
    _check_bare(backbone)
    num_labels = backbone.config.num_labels if num_labels is None else num_labels
    if pooling == "head_input":
        return _own_classifier(backbone, num_labels)
    return LinearHeadForImageClassification(backbone, num_labels, pooling).eval()


class LinearHeadForImageClassification(PreTrainedModel):
    """A bare backbone, a pooling and a linear classifier."""

    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    # Whether it holds is for the backbone to say, which has been asked when it was built.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, backbone: PreTrainedModel, num_labels: int, pooling: str) -> None:
        super().__init__(backbone.config)
        if self.config.num_labels != num_labels:
            self.config.num_labels = num_labels  # renames the labels
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        self.backbone, self.pooling = backbone, pooling
        self.classifier = nn.Linear(self._feature_dim(), num_labels, device=backbone.device, dtype=backbone.dtype)
        nn.init.normal_(self.classifier.weight, std=getattr(self.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the backbone brings its weights, which the Transformers way of a new model would draw anew."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the loss where labels are given."""
        outputs = self.backbone(pixel_values=pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(pooled(self.backbone, outputs, self.pooling))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        inner = {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}
        result = ImageClassifierOutput(loss=loss, logits=logits, **inner)
        return result.to_tuple() if return_dict is False else result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the backbone's ordinary checkpoint, and the head beside it."""
        if push_to_hub:
            raise ArgumentError("Expected push_to_hub=False, found True. Use model.push_to_hub(...) after saving.")
        state = self.state_dict() if state_dict is None else state_dict
        inner = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
        given = None if state_dict is None else inner
        self.backbone.save_pretrained(save_directory, is_main_process, given, **kwargs)
        if not is_main_process:
            return
        head = {n: state[f"classifier.{n}"] for n in ("weight", "bias")}
        about = {"pooling": self.pooling, "num_labels": len(head["bias"]), "feature_dim": head["weight"].shape[1]}
        write_head(save_directory, about, head)

    @property
    def unread_modules(self) -> tuple[str, ...]:
        """Names of modules that make the pooled output, where the head does not read it."""
        return () if self.pooling == "pooler" else (f"backbone.{family_of(self.config).pooler}",)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `load_with_linear_head`, under the name that Transformers calls."""
        return load_with_linear_head(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _feature_dim(self) -> int:
        """Width of the features, found by running one image; configs have no common name for it."""
        shape = image_shape(self.config, default=224)
        pixels = torch.zeros(1, *shape, device=self.backbone.device, dtype=self.backbone.dtype)
        with in_eval_mode(self.backbone):
            return pooled(self.backbone, self.backbone(pixel_values=pixels, return_dict=True), self.pooling).shape[1]


def write_head(folder: str | os.PathLike[str], about: Mapping[str, Any], head: Mapping[str, Tensor]) -> None:
    """Write the files of a head beside the rest of a checkpoint."""
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (Path(folder) / HEAD_CONFIG_FILE).write_text(text, encoding="utf-8")
    if head:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.items()}
        save_file(tensors, Path(folder) / HEAD_FILE, metadata={"format": "pt"})


def read_head(source: str | os.PathLike[str], **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is said of a head beside a checkpoint, and its weights; empty where there are no such files."""
    about, weights = (cached_file(source, name, **options) for name in (HEAD_CONFIG_FILE, HEAD_FILE))
    described = json.loads(Path(about).read_text(encoding="utf-8")) if about is not None else {}
    if described and not {"pooling", "num_labels"} <= set(described):
        raise ValueError(f"only {sorted(described)}")
    return described, load_file(weights) if weights is not None else {}


def load_with_linear_head(folder: str | os.PathLike[str], *, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Load a backbone and the linear head that was saved beside it."""
    # Without a word on it, transformers asks at the keyboard.
    kwargs.setdefault("trust_remote_code", False)
    try:
        backbone, info = AutoModel.from_pretrained(folder, output_loading_info=True, **kwargs)
    except ValueError as error:
        raise CheckpointError(
            f"Expected a backbone that transformers loads in {folder}, found: {library_words(error)}. Load it in "
            "another way and give it a new head."
        ) from error
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    try:
        about, head = read_head(folder, **hub)
        pooling, shape = about["pooling"], (about["num_labels"], about["feature_dim"])
        if pooling not in POOLINGS[1:] or tuple(head["weight"].shape) != shape or len(head["bias"]) != shape[0]:
            raise ValueError(f"{about} beside weights of shape {tuple(head['weight'].shape)}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected {HEAD_FILE} and {HEAD_CONFIG_FILE} of a backbone with a linear head in {folder}, found: "
            f"{error}. Load the backbone alone with AutoModel.from_pretrained and give it a new head."
        ) from error
    unused = {key for key in info["missing_keys"] if key.startswith("pooler.")}
    if unused and pooling != "pooler":
        # It was saved without its pooler, which nothing here runs.
        backbone.pooler, info["missing_keys"] = None, set(info["missing_keys"]) - unused
    model = LinearHeadForImageClassification(backbone, shape[0], pooling)
    if model.classifier.in_features != shape[1]:
        raise CheckpointError(
            f"Expected a backbone with {shape[1]} features in {folder}, found {model.classifier.in_features}. The "
            "head belongs to another backbone."
        )
    model.classifier.load_state_dict(head)
    return (model.eval(), info) if output_loading_info else model.eval()


def pooled(backbone: PreTrainedModel, outputs: Any, pooling: str) -> Tensor:
    """Features out of a backbone's outputs."""
    kind = type(backbone).__name__
    if pooling == "pooler":
        features = getattr(outputs, "pooler_output", None)
        if features is None:
            raise HeadError(f"Expected a pooler_output, found none of {kind}. Choose pooling='mean' or 'cls'.")
        return features.flatten(1)
    hidden = outputs.last_hidden_state
    leading = _leading_tokens(backbone)
    if pooling == "cls" and (hidden.dim() == 4 or leading == 0):
        raise HeadError(f"Expected a class token, found none in {kind}. Choose pooling='mean' or 'pooler'.")
    if hidden.dim() == 4:  # of a convolution
        return hidden.mean((2, 3))
    return hidden[:, 0] if pooling == "cls" else hidden[:, leading:].mean(1)


def _leading_tokens(backbone: PreTrainedModel) -> int:
    """How many tokens stand before the patches: the class token, DeiT's distillation token, registers."""
    single = ("cls_token", "class_embedding", "distillation_token")
    named = [(name.rpartition(".")[2], parameter) for name, parameter in backbone.named_parameters()]
    registers = sum(parameter.shape[1] for name, parameter in named if name == "register_tokens")
    return registers + sum(name in single for name, _ in named)


def _check_bare(backbone: PreTrainedModel) -> None:
    arguments = inspect.signature(type(backbone).forward).parameters
    usual = MODEL_MAPPING.get(type(backbone.config), None)
    others = {"labels", "input_ids", "spatial_shapes"}.intersection(arguments)
    if others or "pixel_values" not in arguments or (usual is not None and not isinstance(backbone, usual)):
        raise HeadError(
            f"Expected a bare backbone as AutoModel loads it, which takes pixel_values alone, found "
            f"{type(backbone).__name__}. Leave out pooling= for a classifier; of a model of images and text, give the "
            "vision model."
        )


def _own_classifier(backbone: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """The family's own classifier with the weights of a backbone."""
    config, remedy = copy.deepcopy(backbone.config), f"Choose pooling= out of {', '.join(POOLINGS[1:])}."
    two_towers = next((kind for kind, row in FAMILIES.items() if row.backbone == config.model_type), None)
    if two_towers is not None:
        config = AutoConfig.for_model(two_towers, vision_config=config.to_dict())
    kind = classifier_class(config)
    if kind is None:
        raise HeadError(
            f"Expected a backbone whose family has an image classifier in transformers, for pooling='head_input', "
            f"found {type(backbone).__name__}. {remedy}"
        )
    if config.num_labels != num_labels:
        config.num_labels = num_labels
    model = kind._from_config(config, dtype=backbone.dtype).to(backbone.device)
    inner = model.base_model if two_towers is None else model.vision_model
    # A pooler that the classifier does not have is left behind.
    missing = inner.load_state_dict(backbone.state_dict(), strict=False).missing_keys
    if missing:
        raise HeadError(
            f"Expected a {type(backbone).__name__} with all weights of a {type(model).__name__}, found none for "
            f"{', '.join(missing[:3])}. {remedy}"
        )
    return model.eval()
