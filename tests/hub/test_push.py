"""Pushing to a Hub on loopback, and every way in which that can fail."""

import json
import shutil
import time

import huggingface_hub
import pytest
from hub_server import READ_ONLY, TOKEN, USER
from huggingface_hub import HfApi
from PIL import Image

from hf_immunize.errors import ArgumentError, CardError, HubError, RecordError, WeightsError
from hf_immunize.hub.card import write_card
from hf_immunize.hub.push import push
from hf_immunize.hub.record import read_record, write_record


pytestmark = pytest.mark.hub
REPO = f"{USER}/immunized"
EXPECTED = {"README.md", "immunization.json", "config.json", "preprocessor_config.json", "model.safetensors"}


def local(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


SHARDED = ["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp"]
SHARDED += ["global_step4/mp_rank_00_model_states.pt", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
SHARDED += ["latest", "zero_to_fp32.py", "pytorch_model_fsdp.bin", "checkpoint-4/model.safetensors"]
UNKNOWN = ["training_args.bin", "notes.txt", "results.json", "optimizer.pt", "private.png", "of.a.format.to.come"]
UNKNOWN += ["other.safetensors", "config.json.bak", "sub/config.json", "README.md.old", ".env"]


@pytest.mark.parametrize("name", [*SHARDED, *UNKNOWN])
def test_only_what_is_listed_leaves_whatever_else_lies_there(name, checkpoint):
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_bytes(b"not for others")
    assert set(push(checkpoint, REPO, dry_run=True).files) == EXPECTED - {"README.md"}


def test_repository_holds_exactly_the_allowed_files(checkpoint, api, online):
    for name in ("training_args.bin", "notes.txt", "results.json", "optimizer.pt", "private.png"):
        (checkpoint / name).write_bytes(b"not for others")
    push(checkpoint, REPO, api=api)
    there = online.files(REPO)
    assert set(there) == EXPECTED | {".gitattributes"}
    assert {name: there[name] for name in EXPECTED} == {name: local(checkpoint)[name] for name in EXPECTED}


def test_figure_of_the_record_is_pushed(checkpoint, record):
    Image.new("RGB", (2, 2)).save(checkpoint / "spectra.png")
    record.figures = ["spectra.png"]
    write_record(checkpoint, record)
    assert "spectra.png" in push(checkpoint, REPO, dry_run=True).files


@pytest.mark.parametrize(
    "name", ["training_args.bin", "id_rsa", "optimizer.pt", "notes.txt", "figure.svg", "x.png.txt"]
)
def test_figures_of_a_record_are_pictures_by_name(name, checkpoint, record):
    (checkpoint / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    path = checkpoint / "immunization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"figures": [name]}))
    with pytest.raises(RecordError, match="figures"):
        push(checkpoint, REPO, dry_run=True)
    record.figures = [name]
    with pytest.raises(RecordError, match="figures"):
        record.to_json()


@pytest.mark.parametrize("content", [b"", b"-- a key --", b"\x89PNG\r\n\x1a\nhalf", b"\xff\xd8\xff\xe0 a JPEG's"])
def test_figures_of_a_record_are_pictures_by_content(content, checkpoint, record):
    (checkpoint / "spectra.png").write_bytes(content)
    record.figures = ["spectra.png"]
    write_record(checkpoint, record)
    with pytest.raises(RecordError, match=r"spectra\.png"):
        push(checkpoint, REPO, dry_run=True)


LINKED = ["README.md", "LICENSE", "config.json", "immunization.json", "model.safetensors", "spectra.png"]


@pytest.mark.parametrize("name", LINKED)
def test_links_out_of_the_folder_are_refused_before_anything_is_read(name, checkpoint, record, tmp_path, api, online):
    record.figures = ["spectra.png"]
    write_record(checkpoint, record)
    Image.new("RGB", (2, 2)).save(checkpoint / "spectra.png")
    elsewhere = tmp_path / "elsewhere"
    if (checkpoint / name).exists():
        shutil.move(checkpoint / name, elsewhere)
    else:
        elsewhere.write_text("Not for others.\n")
    (checkpoint / name).symlink_to(elsewhere)
    before = local(checkpoint)
    with pytest.raises(ArgumentError, match="symbolic link"):
        push(checkpoint, REPO, api=api)
    assert local(checkpoint) == before
    assert (checkpoint / name).is_symlink()
    assert not online.requests


def test_linked_shard_is_refused(checkpoint, tmp_path):
    shutil.move(checkpoint / "model.safetensors", tmp_path / "elsewhere")
    (checkpoint / "other.safetensors").symlink_to(tmp_path / "elsewhere")
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')
    with pytest.raises(ArgumentError, match=r"other\.safetensors"):
        push(checkpoint, REPO, dry_run=True, require_record=False)


def test_linked_card_is_not_copied_into_a_new_one(checkpoint, record, tmp_path):
    (tmp_path / "elsewhere").write_text("Not for others.\n")
    (checkpoint / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match="symbolic link"):
        write_card(checkpoint, record)
    assert (checkpoint / "README.md").is_symlink()


def test_links_of_the_hubs_own_cache_are_followed(checkpoint, tmp_path):
    cache = tmp_path / "models--user--model"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert set(push(snapshot, REPO, dry_run=True).files) == EXPECTED - {"README.md"}
    (tmp_path / "secret").write_text("Not for others.\n")
    (blobs / "LICENSE").symlink_to(tmp_path / "secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/LICENSE")
    with pytest.raises(ArgumentError, match="symbolic link"):
        push(snapshot, REPO, dry_run=True)


def test_dry_run_lists_without_network_or_change(checkpoint):
    before = local(checkpoint)
    result = push(checkpoint, REPO, dry_run=True)
    assert set(result.files) == EXPECTED - {"README.md"}
    assert local(checkpoint) == before


def test_pushing_again_makes_no_commit(checkpoint, api, record):
    first = push(checkpoint, REPO, api=api)
    assert read_record(checkpoint) == record
    second = push(checkpoint, REPO, api=api)
    assert (first.changed, second.changed, second.commit) == (True, False, first.commit)


def test_upload_that_is_cut_leaves_the_repository_and_the_next_push_is_whole(checkpoint, api, online):
    online.fail("PUT", "/lfs/", "cut", times=100)
    before = local(checkpoint)
    with pytest.raises(HubError) as cut:
        push(checkpoint, REPO, api=api)
    assert cut.value.outcome == "unreachable"
    assert set(online.files(REPO)) == {".gitattributes"}
    assert before.items() <= local(checkpoint).items()
    online.faults.clear()
    push(checkpoint, REPO, api=api)
    assert set(online.files(REPO)) == EXPECTED | {".gitattributes"}


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_what_is_cut_once_is_tried_again_and_sends_the_weights_only_as_often(method, path, checkpoint, api, online):
    online.fail(method, path, "cut")
    assert push(checkpoint, REPO, api=api).changed
    assert max(online.uploads().values()) == (2 if method == "PUT" else 1)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/", "/preupload/"])
def test_passing_trouble_is_waited_out(status, path, checkpoint, api, online):
    online.fail("POST", path, status, **{"Retry-After": 1})
    assert push(checkpoint, REPO, api=api).changed


OUTCOMES = {400: "rejected", 401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict"}
OUTCOMES |= {429: "rate_limited", 500: "server_error"}


@pytest.mark.parametrize("status", list(OUTCOMES))
def test_lasting_trouble_has_a_name(status, checkpoint, api, online):
    online.fail("POST", "/commit/", status, times=100)
    with pytest.raises(HubError) as failed:
        push(checkpoint, REPO, api=api)
    assert failed.value.outcome == OUTCOMES[status]


@pytest.mark.parametrize(
    ("repo", "token", "outcome"),
    [(REPO, "hf_wrong", "unauthorized"), (REPO, READ_ONLY, "forbidden"), ("somebody/else", TOKEN, "forbidden")],
)
def test_refusals_of_the_hub_have_a_name(repo, token, outcome, checkpoint, online):
    with pytest.raises(HubError) as failed:
        push(checkpoint, repo, api=HfApi(endpoint=online.url, token=token))
    assert failed.value.outcome == outcome


def test_no_network_is_one_sentence(checkpoint, online):
    with pytest.raises(HubError, match="connection") as failed:
        push(checkpoint, REPO, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    assert failed.value.outcome == "unreachable"


def test_offline_is_said(checkpoint, api, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE") as failed:
        push(checkpoint, REPO, api=api)
    assert failed.value.outcome == "offline"


def test_private_is_made_and_not_pushed_to_a_public_repository(checkpoint, api, online):
    push(checkpoint, REPO, private=True, api=api)
    assert online.repos[REPO].private
    online.repos[REPO].private = False
    with pytest.raises(HubError, match="public") as failed:
        push(checkpoint, REPO, private=True, api=api)
    assert failed.value.outcome == "conflict"


def test_branch_is_made(checkpoint, api, online):
    push(checkpoint, REPO, revision="v1", api=api)
    assert "model.safetensors" in online.files(REPO, "v1")
    assert "model.safetensors" not in online.files(REPO)


def test_weights_of_an_earlier_push_are_removed(checkpoint, api, online):
    push(checkpoint, REPO, api=api)
    online.files(REPO)["pytorch_model.bin"] = online.files(REPO)["model-00001-of-00002.safetensors"] = b"old"
    online.files(REPO)["mine.txt"] = b"stays"
    push(checkpoint, REPO, api=api)
    assert set(online.files(REPO)) == EXPECTED | {".gitattributes", "mine.txt"}


def test_weights_other_than_the_recorded_are_refused(checkpoint, api, online, tamper):
    tamper(checkpoint)
    with pytest.raises(RecordError, match=r"model\.safetensors has changed"):
        push(checkpoint, REPO, api=api)
    assert REPO not in online.repos


def test_checkpoint_without_record_is_refused(checkpoint, api):
    (checkpoint / "immunization.json").unlink()
    with pytest.raises(RecordError, match="no evidence"):
        push(checkpoint, REPO, api=api)


def test_pickled_weights_are_refused(checkpoint, api):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled"):
        push(checkpoint, REPO, api=api)


def test_token_in_a_file_is_refused_and_not_repeated(checkpoint, api, online):
    (checkpoint / "README.md").write_text(f"my token is {TOKEN}\n")
    with pytest.raises(ArgumentError, match=r"a token in README\.md") as refused:
        push(checkpoint, REPO, api=api)
    assert TOKEN not in str(refused.value)
    assert not online.requests


def test_local_path_in_a_file_is_refused(checkpoint, api, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"teacher": "/home/alice/models/x"}))
    with pytest.raises(ArgumentError, match=r"local path /home/alice in config\.json"):
        push(checkpoint, REPO, api=api)


def test_card_edited_into_invalid_yaml_is_named_and_left(checkpoint, api, online):
    broken = "---\ntags: [a\nlicense: : mit\n---\n\nMy text.\n"
    (checkpoint / "README.md").write_text(broken)
    with pytest.raises(CardError, match="Repair it by hand"):
        push(checkpoint, REPO, api=api)
    assert (checkpoint / "README.md").read_text() == broken
    assert not online.requests


def test_metadata_that_the_hub_refuses_is_named(checkpoint, api):
    (checkpoint / "README.md").write_text("---\nlicense: no-such-licence\n---\n\nMy text.\n")
    with pytest.raises(CardError, match="license"):
        push(checkpoint, REPO, api=api)


STEPS = [("POST", "/api/repos/create"), ("GET", "/api/models/"), ("POST", "/preupload/")]
STEPS += [("POST", "/info/lfs/objects/batch"), ("POST", "/commit/")]
PAGES = [b"<html><body>Log in to the network</body></html>", b"", b"[]", b"{}"]


@pytest.mark.parametrize(("method", "path"), [*STEPS, ("PUT", "/lfs/")])
def test_server_that_never_answers_is_left(method, path, checkpoint, api, online, impatient):
    online.fail(method, path, "silent", times=1000)
    started = time.monotonic()
    with pytest.raises(HubError) as failed:
        push(checkpoint, REPO, api=api)
    assert failed.value.outcome == "timed_out"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("method", "path"), STEPS)
def test_page_in_place_of_an_answer_is_named(method, path, page, checkpoint, api, online):
    online.fail(method, path, page, times=1000)
    with pytest.raises(HubError) as failed:
        push(checkpoint, REPO, api=api)
    assert failed.value.outcome == "unreachable"


@pytest.mark.parametrize("name", ["../x", "a/b/c", "user/na me", "", "https://huggingface.co/user/x"])
def test_impossible_names_are_refused(name, checkpoint):
    with pytest.raises(ArgumentError, match="user/name"):
        push(checkpoint, name, dry_run=True)
