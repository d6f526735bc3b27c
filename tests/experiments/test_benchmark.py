"""A method of one's own, a function or a folder, becomes a row of the benchmark, once."""

import json

import pytest
from folders import tiny_classifier

from examples import benchmark
from examples.benchmark import find_method, main, shown
from hf_immunize.errors import ArgumentError


METHOD = '''
import torch

def halved(model, benign, harmful, processor):
    """Half as large features: nothing that an attacker would mind."""
    with open("called", "a") as file:
        file.write(f"{sorted(harmful.features)} {len(set(harmful['label']))} {model.training}\\n")
    with torch.no_grad():
        model.vit.layernorm.weight /= 2
        model.vit.layernorm.bias /= 2
    return model

def scaled(model, benign, harmful, processor, *, factor=1):
    with open("factor", "a") as file:
        file.write(str(factor))
    return model
'''


@pytest.fixture
def words(tiny, images, tmp_path, monkeypatch):
    """A command without its method, typed beside a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_methods.py").write_text(METHOD)
    found = ["--backbone", "tiny", "--task", "arms", "--settings", tiny(), "--data_path", str(images)]
    return [*found, "--attackers", "ridge,last_stage", "--attack_steps", "3", "--attack_seeds", "1"]


def test_a_function_and_a_folder_become_rows_which_are_not_made_again(words, tmp_path, monkeypatch, capsys):
    own = tiny_classifier(tmp_path / "mine", ("cat", "dog", "hen"))
    command = ["--method", "my_methods:halved", str(own), "examples.field_methods:unchanged", *words]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/benchmark/rows.jsonl").read_text().splitlines()]
    assert [row["title"] for row in rows] == ["halved", "mine", "unchanged"]
    assert (tmp_path / "called").read_text() == "['image', 'label'] 3 False\n"
    said = capsys.readouterr().out
    for row in rows:
        assert {(one["attacker"], one["access"]) for one in row["attackers"]} >= {("ridge", "head_input")}
        assert row["benign"]["interval"] and row["removed"].keys() == {"head_input", "any_layer", "fine_tuning"}
        assert shown(row) in said and str(tmp_path) not in json.dumps(row)
    for one in rows[2]["attackers"]:  # of the model itself
        assert one["immunized"] == one["reference"] and one["removed"] in (None, 0)
    # Nothing runs anew, and what was audited is not asked for again.
    (start,) = (tmp_path / "runs/benchmark/shared/head_start").iterdir()
    assert '"immunized"' not in (start / "audit" / "outcomes.jsonl").read_text()  # attacked once, as the reference
    monkeypatch.setattr(benchmark, "audit", lambda *given, **options: pytest.fail("audited again"))
    assert main(command) == 0 and capsys.readouterr().out == "".join(shown(row) + "\n" for row in rows)
    assert len((tmp_path / "runs/benchmark/rows.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "called").read_text().count("\n") == 1


def test_attackers_have_no_more_labelled_images_than_they_are_given(words, tmp_path, monkeypatch):
    sizes, run = [], benchmark.audit
    spied = lambda *given, **options: sizes.append(len(options["harmful"][0])) or run(*given, **options)  # noqa: E731
    monkeypatch.setattr(benchmark, "audit", spied)
    assert main(["--method", "examples.field_methods:unchanged", *words, "--attack_images", "5"]) == 0
    row = json.loads((tmp_path / "runs/benchmark/rows.jsonl").read_text())
    assert set(sizes) == {5} and row["key"]["attack_images"] == 5 and "--attack_images 5" in row["command"]


def test_of_two_runs_that_make_the_same_row_one_writes_it(words, tmp_path, monkeypatch, capsys):
    command, rows = ["--method", "examples.field_methods:unchanged", *words], tmp_path / "runs/benchmark/rows.jsonl"
    assert main(command) == 0
    written, measure = rows.read_text(), benchmark.measures
    rows.unlink()

    def after_another(report):
        rows.write_text(written)
        return measure(report)

    monkeypatch.setattr(benchmark, "measures", after_another)
    assert main(command) == 0
    assert rows.read_text() == written and shown(json.loads(written)) in capsys.readouterr().out


@pytest.mark.parametrize("text", ["nowhere", "no_such_module:f", "math:no_such_function", ":f"])
def test_what_is_no_method_is_refused_by_name(text):
    with pytest.raises(ArgumentError, match=f"found '{text}'"):
        find_method(text)


def test_a_method_that_fails_leaves_no_row_and_the_others_run(words, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(benchmark, "make_row", lambda text, *given: made.append(text) or find_method(text))
    monkeypatch.setattr(benchmark, "shown", lambda row: "a row")
    assert main(["--method", "no_such:thing", "my_methods:halved", *words]) == 1
    said = capsys.readouterr()
    assert made == ["no_such:thing", "my_methods:halved"] and said.out == "a row\n" and "no_such:thing" in said.err


def test_set_gives_a_method_the_keywords_that_it_names_and_no_others(words, tmp_path, capsys):
    command = ["--method", "my_methods:scaled", *words]
    assert main([*command, "--set", "facto=4"]) == 1
    assert "takes --set facto," in capsys.readouterr().err and not (tmp_path / "factor").exists()
    assert main([*command, "--set", "factor=4"]) == 0
    assert (tmp_path / "factor").read_text() == "4"
