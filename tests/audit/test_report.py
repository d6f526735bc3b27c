import csv
import dataclasses
import io
import json
import os
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from audit_sample import attack, lost, make, sample_data

from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import FeatureSpectrum, TaskSummary, Utility
from hf_immunize.errors import CheckpointError, DataError


HOSTILE = "</td></style><script>alert('x')</script><img src=x onerror=alert(1)>\n\"' {{ 7*7 }} {% raw %} javascript:x"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def hostile_data():
    """An audit in which every string from outside is hostile."""
    data = sample_data(model=HOSTILE, reference=HOSTILE, preset=HOSTILE, budget={HOSTILE: HOSTILE}, warnings=[HOSTILE])
    changed = {"attacker": HOSTILE, "layer": HOSTILE, "precision": HOSTILE, "note": HOSTILE}
    return dataclasses.replace(
        data,
        tasks={name: dataclasses.replace(task, dataset=HOSTILE) for name, task in data.tasks.items()},
        machine={HOSTILE: HOSTILE},
        outcomes=[dataclasses.replace(one, **changed, settings={HOSTILE: HOSTILE}) for one in data.outcomes],
        spectra=[FeatureSpectrum(HOSTILE, "harmful", [1.0, 0.5], 10, 2, 0.6, False)],
    )


@pytest.fixture(scope="module")
def report():
    return AuditReport(sample_data())


@pytest.fixture(scope="module")
def html(report):
    return report.to_html()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def hostile():
    return AuditReport(hostile_data()).to_html()


def small_data(**kwargs):
    """An audit whose report is quickly drawn."""
    return make([one for s in ("immunized", "reference") for one in attack("ridge", "head_input", s, 0.4)], **kwargs)


# The page


def test_the_page_needs_nothing_but_itself(page):
    assert page.named("script") == page.named("link") == page.named("iframe") == []
    assert all(one["src"].startswith("data:image/svg+xml;base64,") for one in page.named("img"))
    (policy,) = [one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_every_figure_has_words_for_those_who_do_not_see_it(page):
    assert len(page.named("img")) == 11
    assert all(len(one["alt"]) > 40 for one in page.named("img"))


def test_every_table_has_a_caption_and_headers(page):
    assert len(page.named("table")) == len(page.named("caption")) >= 7
    assert all(one.get("scope") in ("col", "row", "rowgroup") for one in page.named("th"))


def test_every_row_has_as_many_cells_as_its_table_has_headers(page):
    widths = []
    for tag, attributes in page.elements:
        if tag == "table":
            widths.append([])
        elif tag == "tr":
            widths[-1].append(0)
        elif tag in ("td", "th"):
            widths[-1][-1] += int(attributes.get("colspan", 1))
    assert all(len(set(rows)) == 1 for rows in widths)


def test_the_page_has_a_language_a_title_and_a_viewport(page):
    assert page.named("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert "Audit of org/immunized-mobilenet" in page.text


def test_the_page_tells_the_verdict_and_what_its_words_mean(report, page):
    assert all(one in page.text for one in report.verdict())
    assert any("at least 10 times the steps" in one for one in page.text)


# Table, columns of its numbers and their intervals, and what heads them on the page.
MEASURES = [
    (
        "curves",
        ["step", "accuracy", "low", "high"],
        "accuracy against steps, mean and interval over seeds and test images.",
    ),
    ("steps", ["immunized_steps", "reference_steps", "ratio", "low", "high"], "Ratio"),
    ("headline", ["accuracy", "low", "high", "gap", "gap_low", "gap_high"], "Gap, points"),
    ("deviation", ["signed", "signed_low", "signed_high"], "Signed"),
    ("deviation", ["absolute", "absolute_low", "absolute_high"], "Absolute"),
    ("attacks", ["seconds", "seconds_low", "seconds_high"], "Seconds"),
    ("tasks", ["accuracy", "low", "high", "gap", "steps_ratio"], "Steps ratio"),
]


@pytest.mark.parametrize(("table", "columns", "heading"), MEASURES)
def test_every_measure_is_in_the_tables_the_json_and_the_page(report, page, table, columns, heading):
    rows = json.loads(report.to_json())["measures"][table]
    frame = report.tables()[table]
    assert any(all(row[name] is not None for name in columns) for row in rows)
    assert len(rows) == len(frame) and set(columns) <= set(frame.columns)
    assert any(heading in text for text in page.text)


def test_steps_to_given_accuracies_have_a_table_of_their_own():
    runs = [one for s in ("immunized", "reference") for one in attack("adamw", "head_input", s, 0.4, half=10)]
    html = AuditReport(make(runs, accuracies=[0.2])).to_html()
    assert "Steps to accuracies that were given" in html


def test_a_page_can_be_made_of_next_to_nothing():
    report = AuditReport(make([], utility=None, reference=None, rir={}, machine={}, budget={}))
    assert Page(report.to_html()).named("img") == []


def test_hostile_names_inject_nothing(hostile, page):
    found = Page(hostile)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in page.elements}
    for _, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert all(one["src"].startswith("data:image/svg+xml;base64,") for one in found.named("img"))
    assert "{{ 7*7 }}" in "".join(found.text)


def test_hostile_names_leave_the_style_sheet_alone(hostile, html):
    assert hostile.split("<style>")[1].split("</style>")[0] == html.split("<style>")[1].split("</style>")[0]


# The short forms


def test_the_card_is_plain_json_of_the_agreed_form(report):
    card = report.for_card()
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert list(card) == ["preset", "preset_version", "strongest", "utility", "verdict"]
    assert list(card["strongest"]) == ["head_input", "any_layer", "fine_tuning"]
    expected = ["attacker", "layer", "accuracy", "reference_accuracy", "chance"]
    assert all(list(one) == expected for one in card["strongest"].values())
    assert card["utility"]["interval"] == [-0.019, 0.003]


def test_the_card_has_nothing_for_what_was_not_tested():
    card = AuditReport(make(attack("ridge", "head_input", "immunized", 0.4), utility=None)).for_card()
    assert card["strongest"]["fine_tuning"] is None and card["utility"] is None
    assert card["strongest"]["head_input"]["reference_accuracy"] is None


def test_the_summary_is_short_plain_text(report):
    text = report.summary()
    assert "Probes at any layer: 53.0% (reference 53.0%, chance 1.0%)" in text
    assert len(text) < 4000
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_summary_of_hostile_names_acts_on_no_terminal():
    data = dataclasses.replace(hostile_data(), model="\x1b[2J\x07model")
    assert all(line.isprintable() for line in AuditReport(data).summary().split("\n"))


# Files


def test_what_is_written_is_read_back(tmp_path):
    report = AuditReport(small_data())
    report.write(tmp_path / "audit")
    assert AuditReport.load(tmp_path / "audit").data == report.data
    assert AuditReport.load(tmp_path / "audit" / "audit.json").data == report.data


def test_page_json_and_tables_are_written(tmp_path):
    report = AuditReport(small_data())
    report.write(tmp_path)
    tables = {f"{name}.csv" for name in report.tables()}
    assert set(os.listdir(tmp_path)) == {"report.html", "audit.json"} | tables
    with open(tmp_path / "outcomes.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(report.data.outcomes)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    report = AuditReport(small_data())
    (tmp_path / "report.html").write_text("before")

    written = Path.write_text

    def limited(self, *args, **kwargs):
        if self.name == "audit.json":
            raise OSError(28, "No space left on device")
        return written(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", limited)
    with pytest.raises(CheckpointError):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == "before"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    "start",
    [
        "=",
        "+",
        "-",
        "@",
        "\t=",
        "\r=",
        "\n=",
        "\r\n=",
        " =",
        "\u200b=",
        "\ufeff=",
        "\uff1d",
        "\uff0b",
        "\uff0d",
        "\uff20",
    ],
)
def test_no_cell_of_a_table_is_a_formula_and_no_row_breaks(tmp_path, start):
    name = f"{start}cmd|' /C calc'!A0\r+1\n@x\"\u2028\x85-1"
    runs = [lost(name, "diverged", name, layer=name), lost("y", "skipped", name)]
    AuditReport(make(runs)).write(tmp_path)
    for table in ("outcomes.csv", "attacks.csv"):
        text = (tmp_path / table).read_bytes().decode("utf-8")
        assert len(text.splitlines()) == 3
        for row in csv.reader(io.StringIO(text, newline="")):
            for cell in row:
                # As a spreadsheet may: without what does not show, and full-width signs as their plain ones.
                shown = unicodedata.normalize("NFKC", cell).strip("\u200b\ufeff \t\r\n")
                assert not shown.startswith(("=", "+", "-", "@"))


NAMES = ["\ud800", "a\udcffb", "\x1b[2J\x1b]0;x\x07", "\u202eevil", "\x9b31m", "a\rb", "\x00"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_ends_a_report_or_acts_on_what_shows_it(tmp_path, name):
    runs = [lost(name, "diverged", name, layer=name), *attack(name, "any_layer", "immunized", 0.4, layer=name)]
    runs += attack("adamw", "head_input", "immunized", 0.4, half=10, layer=name, note=name, settings={name: name})
    data = make(
        runs, model=name, reference=name, preset=name, warnings=[name], machine={name: name}, budget={name: name}
    )
    data.tasks["harmful"] = dataclasses.replace(data.tasks["harmful"], dataset=name)
    report = AuditReport(data)
    report.write(tmp_path)
    assert report.for_card() and AuditReport.load(tmp_path).data == report.data
    shown = [report.summary(), *report.verdict()]
    shown += [file.read_bytes().decode("utf-8") for file in tmp_path.iterdir() if file.suffix != ".json"]
    for text in shown:
        text.encode("utf-8")
        assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]


def test_hostile_names_can_be_written(tmp_path):
    data = small_data(model="a\ud800b")
    data.tasks["harmful"] = TaskSummary("harmful", "\ud800", 1, 1, 2, 0.5)
    AuditReport(data).write(tmp_path)
    assert AuditReport.load(tmp_path).data.model == "ab"


def test_a_folder_without_an_audit_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Expected the audit\.json"):
        AuditReport.load(tmp_path)


def test_no_local_path_leaves_the_building(tmp_path):
    AuditReport(small_data(model="/home/alice/models/x", reference="/home/alice/base")).write(tmp_path)
    for file in tmp_path.iterdir():
        assert "alice" not in file.read_text(encoding="utf-8")


def test_a_report_of_numbers_that_contradict_themselves_is_refused():
    with pytest.raises(DataError, match="between 0 and 1"):
        AuditReport(make([], utility=Utility(100, 73.3)))
