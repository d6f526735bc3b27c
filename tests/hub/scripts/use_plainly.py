"""Use a pushed model without hf_immunize; run by tests/hub/test_end_to_end.py."""

import json
import sys

from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline


sys.modules["hf_immunize"] = None
repo = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(repo)
processor = AutoImageProcessor.from_pretrained(repo)
image = Image.new("RGB", (8, 8), (200, 10, 10))
outputs = model(**processor(image, return_tensors="pt"))
found = pipeline("image-classification", model=repo)(image)
folder = snapshot_download(repo)
print(json.dumps({"shape": list(outputs.logits.shape), "labels": sorted(r["label"] for r in found), "folder": folder}))
