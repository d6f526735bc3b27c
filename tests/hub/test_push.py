"""Pushing to a Hub on loopback, and every way in which that can fail."""

import json
import shutil
import time

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, USER
from huggingface_hub import HfApi, parse_eval_result_entries
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from hf_immunize.errors import ArgumentError, CardError, HubError, RecordError, WeightsError
from hf_immunize.hub.card import write_card
from hf_immunize.hub.push import check_private, push
from hf_immunize.hub.record import write_record


pytestmark = pytest.mark.hub
REPO = f"{USER}/immunized"
EXPECTED = {"README.md", "immunization.json", "config.json", "preprocessor_config.json", "model.safetensors"}


def local(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


STRANGERS = ["pytorch_model_fsdp_0/__0_0.distcp", "global_step4/mp_rank_00_model_states.pt", "zero_to_fp32.py"]
STRANGERS += ["pytorch_model_fsdp.bin", "checkpoint-4/model.safetensors", "training_args.bin", "notes.txt", "latest"]
STRANGERS += ["results.json", "optimizer.pt", "private.png", "of.a.format.to.come", "other.safetensors", ".env"]
STRANGERS += ["config.json.bak", "sub/config.json", "README.md.old"]


def test_repository_holds_exactly_the_allowed_files_and_the_figures_of_the_record(checkpoint, record, api, online):
    for name in STRANGERS:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"not for others")
    Image.new("RGB", (2, 2)).save(checkpoint / "spectra.png")
    record.figures = ["spectra.png"]
    write_record(checkpoint, record)
    before = local(checkpoint)
    expected = EXPECTED | {"spectra.png"}
    assert set(push(checkpoint, REPO, dry_run=True).files) == expected - {"README.md"}
    assert local(checkpoint) == before and not online.requests
    push(checkpoint, REPO, api=api)
    there = online.files(REPO)
    assert set(there) == expected | {".gitattributes"}
    assert {name: there[name] for name in expected} == {name: local(checkpoint)[name] for name in expected}


def test_benign_accuracy_goes_to_the_benchmark_that_is_named_and_to_no_other(checkpoint, record, api, online):
    push(checkpoint, REPO, api=api, benchmark="user/pets:test")
    (entry,) = parse_eval_result_entries(yaml.safe_load(online.files(REPO)[".eval_results/user_pets.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("user/pets", "test")
    assert entry.value == pytest.approx(record.metric.after, abs=1e-4)
    for wrong in ("pets", "user/../pets", "user/pets:a b", "user/pets\nx: y"):
        with pytest.raises(ArgumentError, match="benchmark"):
            push(checkpoint, REPO, dry_run=True, benchmark=wrong)
    record.metric = None
    write_record(checkpoint, record)
    with pytest.raises(ArgumentError, match="accuracy"):
        push(checkpoint, REPO, dry_run=True, benchmark="user/pets")


def test_figures_of_a_record_are_pictures_by_name_and_content(checkpoint, record):
    path = checkpoint / "immunization.json"
    whole = json.loads(path.read_text())
    for name in ("training_args.bin", "id_rsa", "figure.svg", "x.png.txt"):
        (checkpoint / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        path.write_text(json.dumps(whole | {"figures": [name]}))
        with pytest.raises(RecordError, match="figures"):
            push(checkpoint, REPO, dry_run=True)
        record.figures = [name]
        with pytest.raises(RecordError, match="figures"):
            record.to_json()
    record.figures = ["spectra.png"]
    write_record(checkpoint, record)
    for content in (b"", b"-- a key --", b"\x89PNG\r\n\x1a\nhalf", b"\xff\xd8\xff\xe0 a JPEG's"):
        (checkpoint / "spectra.png").write_bytes(content)
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


def test_linked_cards_are_not_written_through(checkpoint, record, tmp_path):
    (tmp_path / "elsewhere").write_text("Not for others.\n")
    (checkpoint / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match="symbolic link"):
        write_card(checkpoint, record)
    assert (checkpoint / "README.md").is_symlink()


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


@pytest.mark.parametrize(
    ("method", "path", "trouble"),
    [
        ("PUT", "/lfs/", "cut"),
        ("POST", "/commit/", "cut"),
        ("POST", "/api/repos/create", 429),
        ("POST", "/commit/", 500),
    ],
)
def test_passing_trouble_is_waited_out_and_weights_are_sent_only_as_often(
    method, path, trouble, checkpoint, api, online
):
    online.fail(method, path, trouble)
    assert push(checkpoint, REPO, api=api).changed
    assert max(online.uploads().values()) == (2 if method == "PUT" else 1)


OUTCOMES = {400: "rejected", 401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict"}
OUTCOMES |= {429: "rate_limited", 500: "server_error"}


def test_lasting_trouble_has_a_name(checkpoint, api, online):
    for status, outcome in OUTCOMES.items():
        online.fail("POST", "/commit/", status, times=4)
        with pytest.raises(HubError) as failed:
            push(checkpoint, REPO, api=api)
        assert failed.value.outcome == outcome
        online.faults.clear()


def test_refusals_of_the_hub_have_a_name(checkpoint, online, api, monkeypatch):
    wrong, nowhere = HfApi(endpoint=online.url, token="hf_wrong"), HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    calls = [(REPO, wrong, "unauthorized"), ("somebody/else", api, "forbidden"), (REPO, nowhere, "unreachable")]
    for repo, client, outcome in [*calls, (REPO, api, "offline")]:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", outcome == "offline")
        with pytest.raises(HubError) as failed:
            push(checkpoint, repo, api=client)
        assert failed.value.outcome == outcome


def test_private_is_made_and_not_pushed_to_a_public_repository(checkpoint, api, online):
    push(checkpoint, REPO, private=True, api=api)
    assert online.repos[REPO].private
    online.repos[REPO].private = False
    with pytest.raises(HubError, match="public") as failed:
        push(checkpoint, REPO, private=True, api=api)
    assert failed.value.outcome == "conflict"


def test_a_branch_is_made_weights_of_an_earlier_push_go_and_pushing_again_makes_no_commit(checkpoint, api, online):
    first = push(checkpoint, REPO, revision="v1", api=api)
    assert "model.safetensors" in online.files(REPO, "v1") and "model.safetensors" not in online.files(REPO)
    second = push(checkpoint, REPO, revision="v1", api=api)
    assert (first.changed, second.changed, second.commit) == (True, False, first.commit)
    files = online.files(REPO, "v1")
    files["pytorch_model.bin"] = files["model-00001-of-00002.safetensors"] = b"old"
    files["mine.txt"] = b"stays"
    push(checkpoint, REPO, revision="v1", api=api)
    assert set(online.files(REPO, "v1")) == EXPECTED | {".gitattributes", "mine.txt"}


def without_record(checkpoint):
    (checkpoint / "immunization.json").unlink()


def pickled(checkpoint):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")


def with_token(checkpoint):
    (checkpoint / "README.md").write_text(f"my token is {TOKEN}\n")


def with_path(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": "/home/alice/models/x"}))


def with_broken_card(checkpoint):
    (checkpoint / "README.md").write_text("---\ntags: [a\nlicense: : mit\n---\n\nMy text.\n")


@pytest.mark.parametrize(
    ("spoil", "error", "named"),
    [
        ("tamper", RecordError, r"model\.safetensors has changed"),
        (without_record, RecordError, "no evidence"),
        (pickled, WeightsError, "pickled"),
        (with_token, ArgumentError, r"a token in README\.md"),
        (with_path, ArgumentError, r"local path /home/alice.* in config\.json"),
        (with_broken_card, CardError, "YAML"),
    ],
)
def test_what_may_not_leave_is_refused_before_anything_is_sent(spoil, error, named, checkpoint, api, online, tamper):
    spoil = tamper if spoil == "tamper" else spoil
    spoil(checkpoint)
    before = local(checkpoint)
    with pytest.raises(error, match=named) as refused:
        push(checkpoint, REPO, api=api)
    assert TOKEN not in str(refused.value)
    assert not online.requests
    assert spoil is not with_broken_card or local(checkpoint) == before


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
def test_page_in_place_of_an_answer_is_named(page, checkpoint, api, online):
    for method, path in STEPS:
        online.fail(method, path, page, times=1000)
        with pytest.raises(HubError) as failed:
            push(checkpoint, REPO, api=api)
        assert failed.value.outcome == "unreachable"
        online.faults.clear()


def test_impossible_names_are_refused(checkpoint):
    for name in ("../x", "a/b/c", "user/na me", "", "https://huggingface.co/user/x"):
        with pytest.raises(ArgumentError, match="user/name"):
            push(checkpoint, name, dry_run=True)


# ---- no token and no local path leaves, in whatever form a file holds it ----

HUB = "hf_" + "abcdefghijklmnopqrst0123456789"
OTHERS = ["ghp_" + 36 * "a", "github_pat_" + 40 * "b", "sk-proj-" + 40 * "c", "AKIA" + 16 * "D"]
OTHERS += ["xoxb-" + 24 * "1", "glpat-" + 20 * "e", "-----BEGIN OPENSSH PRIVATE KEY-----"]


def in_header(path, text):
    save_file({"weight": torch.zeros(2)}, path, {"note": text})


def in_picture(path, text, where="plain"):
    info = PngInfo()
    if where in ("plain", "packed"):
        info.add_text("Comment", text, zip=where == "packed")
    elif where == "international":
        info.add_itxt("Comment", text, zip=True)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    if where == "behind":
        path.write_bytes(path.read_bytes() + text.encode())


def in_exif(path, text):
    exif = Image.Exif()
    exif[0x010E] = text
    Image.new("RGB", (4, 4)).save(path, exif=exif)


def spelled(text, form):
    return "".join(form.format(ord(character)) for character in text)


FORMS = {
    "README.md": lambda path, text: path.write_text(f"My token: {text}.\n"),
    "LICENSE": lambda path, text: path.write_text(text, encoding="utf-16"),
    "LICENSE.txt": lambda path, text: path.write_text(text, encoding="utf-32-be"),
    "LICENSE.md": lambda path, text: path.write_bytes(b"\xff\x00\xfe broken " + text.encode()),
    "config.json": lambda path, text: path.write_text('{"note": "' + spelled(text, r"\u{:04x}") + '"}'),
    "adapter_config.json": lambda path, text: path.write_text('{"a": ["' + text.replace("/", r"\/") + '"]}'),
    "hex.md": lambda path, text: path.write_text('note: "' + spelled(text, r"\x{:02x}") + '"'),
    "html.md": lambda path, text: path.write_text(spelled(text, "&#{};")),
    "address.md": lambda path, text: path.write_text("x?token=" + spelled(text, "%{:02X}")),
    "model.safetensors": in_header,
    "plain.png": in_picture,
    "packed.png": lambda path, text: in_picture(path, text, "packed"),
    "international.png": lambda path, text: in_picture(path, text, "international"),
    "behind.png": lambda path, text: in_picture(path, text, "behind"),
    "photo.jpg": in_exif,
}


@pytest.mark.parametrize("name", list(FORMS))
def test_tokens_and_paths_are_found_in_every_form(name, tmp_path):
    FORMS[name](tmp_path / name, "nothing of the kind")
    check_private(tmp_path, [name])
    own, path = "the-one-of-this-push", "/home/alice/models/x"
    for text, found in ((HUB, "a token"), (own, "a token"), (path, "/home/alice")):
        FORMS[name](tmp_path / name, text)
        with pytest.raises(ArgumentError, match=found) as refused:
            check_private(tmp_path, [name], own)
        assert text == path or text not in str(refused.value)


def test_pixels_are_no_words(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    names = ["noise.png", "noise.jpg", "noise.webp"]
    for name in names:
        Image.fromarray(pixels).save(tmp_path / name)
    check_private(tmp_path, names)


SECRET = [f"key={text}" for text in OTHERS]
PATHS = ["Trained from /home/alice/base.", "`/Users/alice/Pictures`", "[model](file:///home/alice/base)"]
PATHS += [r"C:\\Users\\alice\\base", "D:/data/alice", '{"base_model_name_or_path": "/data/alice/base"}']
PATHS += ['{"base_model_name_or_path": "~/base"}', '{"_name_or_path": "../base"}', '{"name_or_path": "runs/of/mine"}']
PATHS += ['{"base_model_name_or_path": "C:\\\\base"}']


@pytest.mark.parametrize(("found", "lines"), [("a token", SECRET), ("local path", PATHS)])
def test_other_well_known_secrets_and_local_paths_are_refused(found, lines, tmp_path):
    for line in lines:
        (tmp_path / "README.md").write_text(f"# Mine\n\n{line}\n")
        with pytest.raises(ArgumentError, match=found):
            check_private(tmp_path, ["README.md"])


def test_what_is_a_path_on_this_machine_is_refused(tmp_path, monkeypatch):
    (tmp_path / "user" / "base").mkdir(parents=True)
    path = tmp_path / "adapter_config.json"
    for text, found in ((f'"from {tmp_path}/user"', str(tmp_path)), ('{"name_or_path": "user/base"}', "user/base")):
        path.write_text(text)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ArgumentError, match=found):
            check_private(tmp_path / "user", ["../adapter_config.json"])
    monkeypatch.chdir("/")
    check_private(tmp_path, [path.name])


@pytest.mark.parametrize(
    "line",
    [
        "See https://example.org/home/alice and [this](/docs/index) or either/or 1/2/3.",
        "#!/usr/bin/env python",
        "<b>bold</b>/<i>x</i>",
        "python train.py --output_dir ~/runs /tmp/no-such-folder",
        "The ratio 10:/20, at 12:30, s3://bucket/home/x, hf://datasets/user/name@main/x.",
        "sk-learn, hf_immunize, hf_hub_download, risk-classification-of-everything-there-is-on-earth",
        '{"_name_or_path": "google/vit-base-patch16-224"}',
        '{"base_model_name_or_path": "gpt2", "name_or_path": ""}',
        '{"base_model_name_or_path": null}',
    ],
)
def test_what_is_no_secret_passes(line, tmp_path):
    (tmp_path / "README.md").write_text(line)
    check_private(tmp_path, ["README.md"])
