"""Use a pushed model without hf_immunize; run by tests/hub/test_end_to_end.py."""

import json
import re
import sys

from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline


def main():
    sys.modules["hf_immunize"] = None
    repo = sys.argv[1]
    card = ModelCard.load(repo)
    assert AutoModelForImageClassification.from_pretrained(repo).config.num_labels == 2
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    found = pipeline("image-classification", model=repo)(image)
    # The code of the card works as it stands.
    names = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
    outputs = names["model"](**names["processor"](image, return_tensors="pt"))
    report = {"shape": list(outputs.logits.shape), "labels": sorted(r["label"] for r in found)}
    print(json.dumps(report | {"folder": snapshot_download(repo)}))


if __name__ == "__main__":
    main()
