"""No token and no local path leaves, in whatever form a file holds it."""

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from hf_immunize.errors import ArgumentError
from hf_immunize.hub.push import check_private


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
    "optimizer.pt": lambda path, text: torch.save({"note": text, "state": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_token_is_found_in_every_form(name, tmp_path):
    FORMS[name](tmp_path / name, "nothing of the kind")
    check_private(tmp_path, [name])
    for text in (HUB, "the-one-of-this-push"):
        FORMS[name](tmp_path / name, text)
        with pytest.raises(ArgumentError, match="a token") as refused:
            check_private(tmp_path, [name], "the-one-of-this-push")
        assert text not in str(refused.value)


@pytest.mark.parametrize("name", list(FORMS))
def test_local_path_is_found_in_every_form(name, tmp_path):
    FORMS[name](tmp_path / name, "/home/alice/models/x")
    with pytest.raises(ArgumentError, match="/home/alice"):
        check_private(tmp_path, [name])


@pytest.mark.parametrize("text", OTHERS)
def test_other_well_known_secrets_are_found(text, tmp_path):
    (tmp_path / "README.md").write_text(f"key={text}\n")
    with pytest.raises(ArgumentError, match="a token"):
        check_private(tmp_path, ["README.md"])


@pytest.mark.parametrize(
    "line",
    [
        "Trained from /home/alice/base.",
        "`/Users/alice/Pictures`",
        "[model](file:///home/alice/base)",
        r"C:\\Users\\alice\\base",
        "D:/data/alice",
        '{"base_model_name_or_path": "/data/alice/base"}',
        '{"base_model_name_or_path": "~/base"}',
        '{"_name_or_path": "../base"}',
        '{"base_model_name_or_path": "runs/of/mine"}',
        '{"base_model_name_or_path": "C:\\\\base"}',
    ],
)
def test_local_paths_are_refused(line, tmp_path):
    (tmp_path / "README.md").write_text(f"# Mine\n\n{line}\n")
    with pytest.raises(ArgumentError, match="local path"):
        check_private(tmp_path, ["README.md"])


def test_any_path_of_this_machine_is_refused(tmp_path):
    folder = tmp_path / "card"
    folder.mkdir()
    (tmp_path / "base").mkdir()
    (folder / "README.md").write_text(f"From {tmp_path}/base, of course.\n")
    with pytest.raises(ArgumentError, match=str(tmp_path)):
        check_private(folder, ["README.md"])


def test_source_that_is_a_folder_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "user" / "base").mkdir(parents=True)
    path = tmp_path / "adapter_config.json"
    path.write_text('{"base_model_name_or_path": "user/base"}')
    check_private(tmp_path, [path.name])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="user/base"):
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
