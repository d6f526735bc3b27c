"""Loading with the record, from a folder and from the Hub."""

import hashlib
import json
import shutil
import warnings

import pytest
import torch
from hub_server import USER
from transformers import AutoModelForImageClassification

from hf_immunize import load_immunized
from hf_immunize.errors import (
    ArgumentError,
    HubError,
    RecordVersionError,
    WeightsChangedWarning,
    WeightsError,
)
from hf_immunize.hub.load import changed_weights, fetch, hash_weights, retried, weight_files
from hf_immunize.hub.push import push


REPO = f"{USER}/immunized"


def test_model_is_the_saved_one(checkpoint, record):
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightsChangedWarning)
        model, loaded = load_immunized(checkpoint)
    plain = AutoModelForImageClassification.from_pretrained(checkpoint)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert loaded == record


def change(checkpoint, **fields):
    path = checkpoint / "immunization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_cannot_be_loaded_is_named(checkpoint, tamper, tmp_path):
    tamper(checkpoint)
    with pytest.warns(WeightsChangedWarning, match=r"model\.safetensors has changed"):
        load_immunized(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"half")
    with pytest.warns(WeightsChangedWarning), pytest.raises(WeightsError):
        load_immunized(checkpoint)
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled"):
        load_immunized(checkpoint)
    change(checkpoint, schema_version="2.0")
    with pytest.raises(RecordVersionError):
        load_immunized(checkpoint)
    with pytest.raises(ArgumentError, match="nowhere"):
        load_immunized(tmp_path / "nowhere")


@pytest.mark.hub
def test_what_was_pushed_is_fetched_whole_and_pickles_and_code_are_not(checkpoint, api, online):
    push(checkpoint, REPO, api=api)
    folder = fetch(REPO)
    assert {path.name for path in folder.iterdir()} == {path.name for path in checkpoint.iterdir()}
    assert load_immunized(folder)[1] == load_immunized(checkpoint)[1]
    online.repos[REPO].commit(
        {"pytorch_model.bin": b"x", "evil.py": b"raise SystemExit", "config.json": b"{}"}, "main"
    )
    with pytest.raises(WeightsError, match="safetensors"):
        weight_files(fetch(REPO))
    assert not any(path.endswith((".bin", ".py")) for _, path in online.requests)


@pytest.mark.hub
def test_missing_repository_is_named_and_passing_trouble_waited_out(checkpoint, api, online):
    with pytest.raises(HubError, match="spelling") as failed:
        fetch("tester/nothing-here")
    assert failed.value.outcome == "not_found"
    push(checkpoint, REPO, api=api)
    online.fail("GET", "/api/models/", 503)
    online.fail("GET", "/resolve/", "cut")
    assert (fetch(REPO) / "model.safetensors").is_file()


# ---- trying again ----


def failing(times, outcome):
    calls = []

    def call():
        calls.append(None)
        if len(calls) <= times:
            raise HubError("no", outcome)
        return len(calls)

    return call


def test_passing_trouble_alone_is_tried_again_with_growing_waits_and_not_for_ever(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    for outcome in ("rate_limited", "server_error", "unreachable"):
        assert retried(failing(3, outcome), "push") == 4
        assert waits == [1, 2, 4]
        with pytest.raises(HubError):
            retried(failing(4, outcome), "push")
        waits.clear()
    for outcome in ("unauthorized", "forbidden", "not_found", "conflict", "rejected", "timed_out", "offline"):
        with pytest.raises(HubError):
            retried(failing(1, outcome), "push")
    assert not waits


def test_faults_of_this_machine_keep_their_own_name(online, monkeypatch):
    with pytest.raises(KeyError):
        retried({}.popitem, "push")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_api.get_session", full)
    with pytest.raises(OSError, match="No space") as failed:
        fetch(REPO)
    assert not isinstance(failed.value, HubError)


# ---- weight files ----


def index(folder, *names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


def test_shards_are_those_of_the_index_which_points_nowhere_else(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*names, "model-00001-of-00009.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
    index(tmp_path, *names)
    assert hash_weights(tmp_path) == dict.fromkeys(names, hashlib.sha256(b"weights").hexdigest())
    (tmp_path / names[1]).unlink()
    for name, found in ((names[1], names[1]), *((x, "index") for x in ("../x.safetensors", "/etc/x", "x.bin", 3))):
        index(tmp_path, name)
        with pytest.raises(WeightsError, match=found):
            weight_files(tmp_path)


def test_each_kind_of_change_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    phrases = changed_weights(tmp_path, {"model.safetensors": "0" * 64, "gone.safetensors": "0" * 64})
    assert phrases == ["model.safetensors has changed", "gone.safetensors is missing"]
    assert changed_weights(tmp_path, hash_weights(tmp_path)) == []
    assert changed_weights(tmp_path, {}) == ["model.safetensors is not in the record"]
