import hashlib
import json

import pytest

from hf_immunize.errors import WeightsError
from hf_immunize.hub.weights import changed_weights, hash_weights, weight_files


def shards(folder, *names):
    for name in names:
        (folder / name).write_bytes(name.encode())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


def test_hash_is_sha256(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert hash_weights(tmp_path) == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_shards_are_those_of_the_index(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards(tmp_path, *names)
    (tmp_path / "model-00001-of-00009.safetensors").write_bytes(b"old")
    assert weight_files(tmp_path) == names


def test_missing_shard_is_named(tmp_path):
    shards(tmp_path, "model-00001-of-00001.safetensors")
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00001-of-00001"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3])
def test_index_that_points_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="index"):
        weight_files(tmp_path)


def test_pickled_weights_alone_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        weight_files(tmp_path)


def test_each_kind_of_change_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    phrases = changed_weights(tmp_path, {"model.safetensors": "0" * 64, "gone.safetensors": "0" * 64})
    assert phrases == ["model.safetensors has changed", "gone.safetensors is missing"]
    assert changed_weights(tmp_path, hash_weights(tmp_path)) == []
    assert changed_weights(tmp_path, {}) == ["model.safetensors is not in the record"]
