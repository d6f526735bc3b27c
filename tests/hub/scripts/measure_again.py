"""Fetch, load, verify, tamper, verify; run by tests/hub/test_end_to_end.py."""

import json
import shutil
import sys
import warnings
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_immunize import load_immunized, verify


def main():
    repo, folder = sys.argv[1], Path(sys.argv[2])
    data = {name: str(folder / name) for name in ("benign", "harmful")}
    report = {"objective": load_immunized(repo)[1].method.objective}
    report["agrees"] = verify(repo, **data, reference=folder / "base", progress=False).outcome
    tampered = folder / "tampered"
    shutil.copytree(snapshot_download(repo), tampered)
    weights = bytearray((tampered / "model.safetensors").read_bytes())
    weights[-2] ^= 0x40
    (tampered / "model.safetensors").write_bytes(bytes(weights))
    found = verify(tampered, **data, progress=False)
    report["differs"], report["reasons"] = found.outcome, found.reasons
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_immunized(tampered)
    report["warnings"] = [warning.category.__name__ for warning in caught]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
