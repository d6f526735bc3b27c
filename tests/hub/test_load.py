"""Loading with the record, from a folder and from the Hub."""

import json
import shutil
import time
import warnings

import pytest
import torch
from hub_server import USER
from transformers import AutoModelForImageClassification

from hf_immunize import load_immunized
from hf_immunize.errors import (
    ArgumentError,
    HubError,
    RecordError,
    RecordVersionError,
    WeightsChangedWarning,
    WeightsError,
)
from hf_immunize.hub.load import fetch
from hf_immunize.hub.push import push


REPO = f"{USER}/immunized"


def test_model_is_the_saved_one(checkpoint, record):
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightsChangedWarning)
        model, loaded = load_immunized(checkpoint)
    plain = AutoModelForImageClassification.from_pretrained(checkpoint)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert loaded == record


def test_changed_weights_are_warned_about(checkpoint, tamper):
    tamper(checkpoint)
    with pytest.warns(WeightsChangedWarning, match=r"model\.safetensors has changed"):
        load_immunized(checkpoint)


def test_record_of_a_newer_schema_is_refused(checkpoint):
    path = checkpoint / "immunization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": "2.0"}))
    with pytest.raises(RecordVersionError):
        load_immunized(checkpoint)


def test_truncated_record_is_refused(checkpoint):
    path = checkpoint / "immunization.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(RecordError, match="truncated"):
        load_immunized(checkpoint)


def test_checkpoint_without_record_is_refused(checkpoint):
    (checkpoint / "immunization.json").unlink()
    with pytest.raises(RecordError, match="carries no evidence"):
        load_immunized(checkpoint)


def test_pickled_weights_are_refused(checkpoint):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled"):
        load_immunized(checkpoint)


def test_damaged_weights_are_named(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"half")
    with pytest.warns(WeightsChangedWarning), pytest.raises(WeightsError):
        load_immunized(checkpoint)


def test_neither_folder_nor_repository_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="nowhere"):
        load_immunized(tmp_path / "nowhere")


@pytest.mark.hub
def test_what_was_pushed_is_fetched_whole(checkpoint, api):
    push(checkpoint, REPO, api=api)
    folder = fetch(REPO, api=api)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in checkpoint.iterdir()}
    assert load_immunized(folder)[1] == load_immunized(checkpoint)[1]


@pytest.mark.hub
def test_pickles_of_a_repository_are_not_fetched(checkpoint, api, online):
    push(checkpoint, REPO, api=api)
    files = online.files(REPO)
    files["pytorch_model.bin"], files["evil.py"] = files.pop("model.safetensors"), b"raise SystemExit"
    with pytest.raises(WeightsError, match="pickled"):
        fetch(REPO, api=api)
    assert not any(path.endswith((".bin", ".py")) for _, path in online.requests)


@pytest.mark.hub
@pytest.mark.parametrize(("status", "outcome"), [(401, "unauthorized"), (403, "forbidden"), (404, "not_found")])
def test_refusal_of_the_hub_has_a_name(status, outcome, api, online):
    online.fail("GET", "/api/models/", status, times=100)
    with pytest.raises(HubError) as failed:
        fetch(REPO, api=api)
    assert failed.value.outcome == outcome


@pytest.mark.hub
@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/"), ("GET", "/resolve/")])
def test_a_server_that_never_answers_is_left(method, path, checkpoint, api, online, impatient):
    push(checkpoint, REPO, api=api)
    online.fail(method, path, "silent", times=1000)
    started = time.monotonic()
    with pytest.raises(HubError) as failed:
        fetch(REPO, api=api)
    assert failed.value.outcome in ("timed_out", "unreachable")
    assert time.monotonic() - started < 60


@pytest.mark.hub
@pytest.mark.parametrize("page", [b"<html><body>Log in to the network</body></html>", b"", b"[]", b"{}"])
def test_another_answer_than_the_hubs_is_named(page, checkpoint, api, online):
    push(checkpoint, REPO, api=api)
    online.fail("GET", "/api/models/", page, times=1000)
    with pytest.raises(HubError) as failed:
        fetch(REPO, api=api)
    assert failed.value.outcome == "unreachable"


@pytest.mark.hub
def test_missing_repository_is_named(api):
    with pytest.raises(HubError, match="spelling") as failed:
        fetch("tester/nothing-here", api=api)
    assert failed.value.outcome == "not_found"


@pytest.mark.hub
def test_passing_trouble_is_waited_out(checkpoint, api, online):
    push(checkpoint, REPO, api=api)
    online.fail("GET", "/api/models/", 503)
    online.fail("GET", "/resolve/", "cut")
    assert (fetch(REPO, api=api) / "model.safetensors").is_file()
