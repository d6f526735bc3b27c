"""Write the table of model families: what "last_stage" means in each, how much of it moves, what the head sees.

python -m examples.backbones_page --output docs/backbones.md

The models have their usual sizes and no weights (the meta device), so that nothing is downloaded.
"""

import argparse
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import last_stage


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        size: The checkpoint whose sizes these are.
        build: Builds the model.
        head_input: What the head's input is, in words.
        features: The same as a function of the model and its backbone's output; a test compares it with what the head
            receives.
    """

    size: str
    build: Callable[[], Any]
    head_input: str
    features: Callable[[Any, Any], Tensor]


LABELS = {"num_labels": 1000}
EFFICIENTNET_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}
DINOV2 = {"patch_size": 14, "image_size": 518}


def mean_map(model: Any, outputs: Any) -> Tensor:
    return outputs.last_hidden_state.mean((2, 3))


def mean_token(model: Any, outputs: Any) -> Tensor:
    return outputs.last_hidden_state.mean(1)


def class_token(model: Any, outputs: Any) -> Tensor:
    return outputs.last_hidden_state[:, 0]


def mean_patch(model: Any, outputs: Any) -> Tensor:
    return outputs.last_hidden_state[:, 1:].mean(1)


def normed_mean_patch(model: Any, outputs: Any) -> Tensor:
    return model.base_model.pooler.layernorm(mean_patch(model, outputs))


def normed_mean_map(model: Any, outputs: Any) -> Tensor:
    return model.base_model.layernorm(mean_map(model, outputs))


def class_and_mean_patch(model: Any, outputs: Any) -> Tensor:
    leading = 1 + getattr(model.config, "num_register_tokens", 0)
    hidden = outputs.last_hidden_state
    return torch.cat([hidden[:, 0], hidden[:, leading:].mean(1)], dim=1)


MEAN_MAP, MEAN_TOKEN = (
    ("mean of the last feature map", mean_map),
    ("mean of the tokens after the last norm", mean_token),
)
CLASS_TOKEN = ("class token after the last norm", class_token)
NORMED_MAP = ("norm of the mean of the last feature map", normed_mean_map)
BOTH = "class token beside the mean of the patches, after the last norm"
FAMILIES = {
    "ViT": Family(
        "google/vit-base-patch16-224", lambda: hf.ViTForImageClassification(hf.ViTConfig(**LABELS)), *CLASS_TOKEN
    ),
    "DeiT": Family(
        "facebook/deit-base-patch16-224", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**LABELS)), *CLASS_TOKEN
    ),
    "BEiT": Family(
        "microsoft/beit-base-patch16-224",
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**LABELS)),
        "norm of the mean of the patches",
        normed_mean_patch,
    ),
    "DINOv2": Family(
        "facebook/dinov2-base",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2, **LABELS)),
        BOTH,
        class_and_mean_patch,
    ),
    "DINOv2 with registers": Family(
        "facebook/dinov2-with-registers-base",
        lambda: hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**DINOV2, **LABELS)),
        f"{BOTH}; registers left out",
        class_and_mean_patch,
    ),
    "CLIP": Family(
        "openai/clip-vit-base-patch32",
        lambda: hf.CLIPForImageClassification(hf.CLIPConfig(**LABELS)),
        "mean of the patches, before the last norm",
        mean_patch,
    ),
    "SigLIP": Family(
        "google/siglip-base-patch16-224",
        lambda: hf.SiglipForImageClassification(hf.SiglipConfig(**LABELS)),
        "mean of the patches after the last norm",
        mean_token,
    ),
    "Swin": Family(
        "microsoft/swin-tiny-patch4-window7-224",
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**LABELS)),
        *MEAN_TOKEN,
    ),
    "SwinV2": Family(
        "microsoft/swinv2-tiny-patch4-window8-256",
        lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(image_size=256, window_size=8, **LABELS)),
        *MEAN_TOKEN,
    ),
    "FocalNet": Family(
        "microsoft/focalnet-tiny", lambda: hf.FocalNetForImageClassification(hf.FocalNetConfig(**LABELS)), *MEAN_TOKEN
    ),
    "ResNet": Family(
        "microsoft/resnet-50", lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**LABELS)), *MEAN_MAP
    ),
    "RegNet": Family(
        "facebook/regnet-y-040", lambda: hf.RegNetForImageClassification(hf.RegNetConfig(**LABELS)), *MEAN_MAP
    ),
    "ConvNeXt": Family(
        "facebook/convnext-tiny-224",
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**LABELS)),
        *NORMED_MAP,
    ),
    "ConvNeXtV2": Family(
        "facebook/convnextv2-tiny-1k-224",
        lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**LABELS)),
        *NORMED_MAP,
    ),
    "MobileNetV2": Family(
        "google/mobilenet_v2_1.0_224",
        lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(**LABELS)),
        *MEAN_MAP,
    ),
    "EfficientNet": Family(
        "google/efficientnet-b0",
        lambda: hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**EFFICIENTNET_B0, **LABELS)),
        *MEAN_MAP,
    ),
}

NOTES = """\
The features of an image are the input of the classifier, D numbers, found by a hook. `trainable="last_stage"` moves
the parameters named above and no others; statistics of BatchNorm stay unless `freeze_batchnorm=False`. Any other
choice is a regular expression on parameter names, or `"all"`; an expression that matches nothing, the head alone, or
everything is refused. Parts that the classifier does not read (the last norm of CLIP, the attention pooling of SigLIP)
never move.

- **`objective="auto"`** is `silence` in ResNet, RegNet and MobileNetV2, whose last ReLU no shortcut bypasses, and
  `concentration` in the others, where GELU and SiLU are never quite off or a residual stream leads around every one
  of them. The first hides harmful information from all that follows, where it succeeds; the second makes it small.
  In the former too it is `concentration` where the starting model hardly tells harmful from benign images (a ridge
  classifier on the first batch puts fewer than 90 % of them on their own side, of at least 32 a side): what is off for
  the ones would be off for the others. A warning says so. A smaller first batch is not checked, and says that.
- **SigLIP 2** with a fixed resolution (`google/siglip2-base-patch16-224`) is loaded as SigLIP. The variant for images
  of any size (NaFlex) is refused: its inputs are patches with masks and shapes.
- **DeiT with a teacher** (`DeiTForImageClassificationWithTeacher`) is refused: it has two heads and is for inference.
  The same checkpoint loads as `DeiTForImageClassification`.
- **timm** (`TimmWrapperForImageClassification`): the head is the one timm names (`get_classifier`), the last stage is
  found as above (`layer4` of a ResNet, the last block of a ViT, `s4` of a RegNet). Where no stage can be told from the
  rest (DenseNet), give an expression.
- **Bare backbones** (`AutoModel`): `pooling="head_input"`, `"pooler"`, `"cls"` or `"mean"` in the arguments, or
  `with_linear_head` of `hf_immunize.vision.bare`, put a linear head on them. With `"head_input"` the result is the
  family's own classifier; else the backbone is saved as its own ordinary checkpoint, and the head beside it
  (`load_with_linear_head` loads both).
- **PEFT** (`peft.get_peft_model`): `"last_stage"` takes, of what PEFT trains and saves, the parameters in the last
  stage; `"all"` takes all that PEFT trains. Nothing of the base model moves. What is saved is PEFT's adapter.
- **Gradient checkpointing** works where the table says that transformers supports it, in the kind that is not
  reentrant, which is the default; the reentrant kind is refused where a part is frozen, since the blocks behind it
  would get no gradient.
"""


def whole_modules(model: Any, names: list[str]) -> list[str]:
    """The largest modules all of whose parameters are named, neighbours of a list as a range."""
    chosen, every = set(names), [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if all(other in chosen for other in every if other == prefix or other.startswith(f"{prefix}.")):
                break
        if prefix not in found:
            found.append(prefix)
    ranges = []
    for stem, group in itertools.groupby(
        found, key=lambda name: name.rpartition(".")[0] if name[-1].isdigit() else name
    ):
        members = list(group)
        last = members[-1].rpartition(".")[2]
        ranges.append(members[0] if len(members) == 1 else f"{stem}.{members[0].rpartition('.')[2]} … {last}")
    return ranges


def row(name: str, family: Family) -> list[str]:
    """The cells of one family."""
    with torch.device("meta"):
        model = family.build()
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    stage = last_stage(model)
    moves, total = sum(sizes[key] for key in stage), sum(sizes.values())
    return [
        name,
        f"`{family.size}`",
        ", ".join(f"`{part}`" for part in whole_modules(model, stage)),
        f"{moves / 1e6:.2f} M",
        f"{total / 1e6:.2f} M",
        f"{100 * moves / total:.0f} %",
        str(find_head(model)[1].in_features),
        family.head_input,
        "yes" if model.supports_gradient_checkpointing else "no",
    ]


def page() -> str:
    """The whole page."""
    columns = ["family", "sizes of", "last stage", "moves", "of", "share", "D", "the head sees", "checkpointing"]
    rows = [columns, ["---", "---", "---", "---:", "---:", "---:", "---:", "---", "---"]]
    rows += [row(name, family) for name, family in FAMILIES.items()]
    lines = [
        "# Model families",
        "",
        "Written by `python -m examples.backbones_page`, from the models of transformers with 1,000 labels; a test "
        "checks that it is current.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
    ]
    return "\n".join(lines) + "\n" + NOTES


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m examples.backbones_page", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/backbones.md"))
    path = parser.parse_args().output
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(f"{path}: {len(FAMILIES)} families")


if __name__ == "__main__":
    main()
