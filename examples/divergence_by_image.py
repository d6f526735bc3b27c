"""How far a model's predictions moved, image by image: whether a few images make the mean that a budget is held by.

python examples/divergence_by_image.py runs/mobilenet_v2_cars --reference runs/mobilenet_v2 --images imagenet.parquet
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.sources import load_image_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Immunized model.")
    parser.add_argument("--reference", required=True, help="The model before.")
    parser.add_argument("--images", required=True, help="Benign images, of which the part that was held out is taken.")
    parser.add_argument("--eval-fraction", type=float, default=0.3, help="That part, as in `hf-immunize train`.")
    parser.add_argument("--seed", type=int, default=0, help="Of the split, as in `hf-immunize train`.")
    parser.add_argument("--sample", type=int, default=70, help="Images on which a budget is measured.")
    arguments = parser.parse_args()
    after, before = (
        AutoModelForImageClassification.from_pretrained(name).eval() for name in (arguments.model, arguments.reference)
    )
    data = load_image_dataset(arguments.images).train_test_split(arguments.eval_fraction, seed=arguments.seed)["test"]
    image, label = find_columns(data)
    rows = ImageRows(data, "images", image, label)
    collate = ImageCollator(AutoImageProcessor.from_pretrained(arguments.reference))
    kl, moved, right = [], [], []
    with torch.no_grad():
        for batch in DataLoader(rows, batch_size=8, collate_fn=collate):
            old, new = (model(batch["pixel_values"]).logits.double().log_softmax(-1) for model in (before, after))
            kl.append((old.exp() * (old - new)).sum(-1))
            moved.append((old.exp() - new.exp()).abs().sum(-1) / 2)
            right.append(torch.stack([rows_of.argmax(-1) == batch["labels"] for rows_of in (old, new)]))
    report("KL", torch.cat(kl), arguments.sample)
    report("total variation", torch.cat(moved), arguments.sample)
    names = data.features[label].names
    was, now = torch.cat(right, dim=1)
    for said, changed in (("lost", was & ~now), ("gained", now & ~was)):
        classes = [names[data[int(row)][label]] for row in changed.nonzero().flatten()]
        print(f"Of {len(was)} images, right before and after: {int(was.sum())}, {int(now.sum())}; {said}:", *classes)


def report(name: str, values: torch.Tensor, sample: int) -> None:
    """Print how values spread over images, and how their mean does over samples of images."""
    draw = torch.Generator().manual_seed(0)
    means = torch.stack([values[torch.randperm(len(values), generator=draw)[:sample]].mean() for _ in range(5000)])
    largest = ", ".join(f"{value:.2g}" for value in values.sort(descending=True).values[:3].tolist())
    print(f"{name}, {len(values)} images: mean {values.mean():.4f}, median {values.median():.4f}, largest {largest}")
    low, high = means.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    print(f"Its mean over {sample} of them, 90 % of draws: {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
