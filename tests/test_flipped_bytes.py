"""A byte that is no longer what was written never gives other numbers: they are computed again, or refused."""

import json
from dataclasses import asdict

import pytest
import torch
from families import BUILDERS

from hf_immunize.audit.journal import Journal
from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ImmunizationError
from hf_immunize.features.cache import TrunkCache, open_or_write
from hf_immunize.features.trunk import split_trunk
from hf_immunize.vision.scope import select_trainable


def trunk(folder):
    torch.manual_seed(0)
    model = BUILDERS["resnet"]().eval()
    split = split_trunk(model, select_trainable(model, "last_stage"), (3, 32, 32))
    pixels = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pixels)]

    def read():
        cache = TrunkCache(model, split, images, folder / "trunk", batch_size=3, progress=False)
        (rows,) = open_or_write(cache)
        return {str(i): [rows[i]["pixel_values"].tolist(), rows[i]["labels"]] for i in range(len(rows))}

    return read


def journal(folder):
    kept = Journal(folder, "mark", [])
    for seed in range(4):
        kept.add(Outcome("ridge", "input", "immunized", "harmful", "head", seed, "float64", accuracy=0.1 * seed))
    return lambda: {key: asdict(outcome) for key, outcome in Journal(folder, "mark", []).outcomes.items()}


KINDS = {"trunk cache": trunk, "journal": journal}


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_number_is_read(kind, tmp_path):
    read = KINDS[kind](tmp_path)
    written = read()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    whole = {path: path.read_bytes() for path in files}
    assert written and files
    for path in files:
        for part in range(25):
            offset = part * (len(whole[path]) - 1) // 24
            for each, content in whole.items():
                each.write_bytes(content)
            damaged = bytearray(whole[path])
            damaged[offset] ^= 1 << part % 8
            path.write_bytes(damaged)
            try:
                found = read()
            except ImmunizationError:
                continue
            # What is missing is computed again.
            other = [name for name in found if json.dumps(found[name]) != json.dumps(written.get(name))]
            assert not other, (path.name, offset)
