"""Tables, JSON, the page, its figures and the short forms of an audit."""

import base64
import csv
import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from audit_sample import LAYERS, STEPS, attack, hostile_html, lost, make, named_data, sample_data, sample_html

from hf_immunize.audit.figures import draw_all
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import Utility, from_json, to_json
from hf_immunize.errors import DataError


TABLE = {"table", "tr", "th", "td"}
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


@pytest.fixture(scope="module")
def report():
    return AuditReport(sample_data())


@pytest.fixture(scope="module")
def tables(report):
    return report.tables()


@pytest.fixture(scope="module")
def page():
    return Page(sample_html())


def small_data(**kwargs):
    """An audit whose report is quickly drawn."""
    return make([one for s in ("immunized", "reference") for one in attack("ridge", "head_input", s, 0.4)], **kwargs)


# Tables


def test_every_measure_is_in_the_tables_with_its_interval_and_in_the_json(report, tables):
    curve = tables["curves"].query("attacker == 'gd_line_search' and subject == 'reference' and task == 'harmful'")
    assert list(curve["step"]) == STEPS and curve["accuracy"].is_monotonic_increasing
    assert (curve["low"] <= curve["accuracy"]).all() and (curve["seeds"] == 5).all()
    attacks = tables["attacks"].set_index(["attacker", "subject", "task", "layer"]).sort_index()
    row, other = (attacks.loc[("ridge", s, "harmful", "classifier")] for s in ("immunized", "reference"))
    assert row["gap"] == pytest.approx(other["accuracy"] - row["accuracy"])
    assert row["gap_low"] <= row["gap"] <= row["gap_high"] and row["reference_accuracy"] == other["accuracy"]
    none = attacks.loc[("momentum", "immunized", "harmful", "classifier")]
    assert (none["diverged"], none["note"]) == (5, "the loss is NaN")
    assert list(tables["outcomes"]["status"]) == [one.status for one in report.data.outcomes]
    assert tables["layers"]["layer"].iloc[-1] == "classifier" and set(LAYERS) <= set(tables["layers"]["layer"])
    assert set(tables["tasks"]["task"]) == {"benign", "unseen", "unrelated"}
    measures = json.loads(report.to_json())["measures"]
    assert {name: len(rows) for name, rows in measures.items()} == {
        name: len(table) for name, table in tables.items() if name != "outcomes"
    }


def test_the_headline_is_the_worst_case_beside_the_reference_and_finds_what_the_verdict_does(tables):
    headline = tables["headline"].set_index("access")
    assert list(headline.index) == ["head_input", "any_layer", "fine_tuning"]
    row = headline.loc["any_layer"]
    assert (row["attacker"], row["layer"]) == ("ridge", LAYERS[-1]) and math.isnan(row["steps_ratio"])
    assert row["accuracy"] == pytest.approx(0.53, abs=0.005) and row["low"] < row["accuracy"] < row["high"]
    assert row["gap"] == pytest.approx(row["reference_accuracy"] - row["accuracy"])
    assert headline.loc["fine_tuning", "steps_ratio"] == pytest.approx(10 / 3)
    none = AuditReport(make([])).tables()["headline"]
    assert set(none["finding"]) == {"not tested"} and none["accuracy"].isna().all()
    withheld = AuditReport(sample_data(utility=None)).tables()["headline"]
    assert list(withheld["finding"]) == ["no claim", "not prevented", "not prevented"]


# JSON


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1.5, None])
def test_nothing_is_lost_on_the_way_and_the_json_is_finite(value):
    data = dataclasses.replace(sample_data(rir={"rir": value, "bound": "lower"}), model='"</script>\n\u202e\x00')
    text = to_json(data)
    assert from_json(text) == data
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    odd = from_json(to_json(make([], rir={"rir": math.nan}, budget={"steps": np.int64(5), "rate": np.float32(0.5)})))
    assert math.isnan(odd.rir["rir"]) and odd.budget == {"steps": 5, "rate": 0.5}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "not JSON"),
        ("[]", "other content"),
        ('{"format": "else"}', "other content"),
        ('{"format": "hf_immunize.audit", "format_version": 99}', "found 99"),
        ('{"format": "hf_immunize.audit", "format_version": 2}', "'data'"),
        ('{"format": "hf_immunize.audit", "format_version": 2, "data": {"tasks": {}}}', "'outcomes'"),
        ('{"format": "hf_immunize.audit", "format_version": 2, "data": []}', "fields of an audit"),
        (to_json(make([]))[:200], "not JSON"),
    ],
)
def test_other_content_is_refused_with_what_was_found(text, found):
    with pytest.raises(DataError, match="Expected") as caught:
        AuditReport.from_json(text)
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"accuracy": None}, "None"), ({"accuracy": math.nan}, "nan"), ({"accuracy": 48.6}, "48.6")]
    + [({name: "victim"}, "victim") for name in ("status", "access", "subject", "task")]
    + [({"steps": [1, 2]}, "others"), ({"steps": [], "curve": [0.5]}, "others"), ({"status": "diverged"}, "diverged")],
)
def test_outcomes_that_contradict_themselves_are_refused(changes, found):
    run = dataclasses.replace(attack("gd_line_search", "head_input", "immunized", 0.4, half=10)[0], **changes)
    with pytest.raises(DataError, match="Expected") as caught:
        AuditReport(dataclasses.replace(make([]), outcomes=[run]))
    assert found in str(caught.value)
    for changes in ({"tasks": {}}, {"utility": Utility(100, 73.3)}):
        with pytest.raises(DataError, match="Expected"):
            AuditReport(make([], **changes))


@pytest.mark.parametrize("name", ["/home/alice/secret/model", "~/secret/model", r"C:\Users\alice\model"])
def test_no_local_path_leaves_the_building(tmp_path, name):
    AuditReport(small_data(model=name, reference=name)).write(tmp_path)
    assert AuditReport.load(tmp_path).data.model == "model"
    assert not [file for file in tmp_path.iterdir() if "alice" in file.read_text(encoding="utf-8")]


# The page and its figures


def test_the_page_needs_nothing_but_itself_and_is_whole(report, page):
    assert page.named("script") == page.named("link") == page.named("iframe") == []
    (policy,) = [one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert len(page.named("table")) == len(page.named("caption")) >= 6
    # What is told to be read stands first, and what is pointed at is there.
    ids = [one["id"] for _, one in page.elements if one.get("id", "warnings") != "warnings"]
    assert ids[:3] == ["verdict", "headline", "utility"]
    assert {one["href"] for one in page.named("a")} <= {f"#{name}" for name in ids} and page.named("a")
    images = page.named("img")
    assert len(images) == 8 and all(len(one["alt"]) > 40 for one in images)
    assert {report.answer(), *report.verdict()} <= set(page.text)
    empty = AuditReport(make([], utility=None, reference=None, rir={}, machine={}, budget={}))
    assert Page(empty.to_html()).named("img") == []


def test_hostile_names_inject_nothing(page):
    found = Page(hostile_html())
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in page.elements}
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert all(one["src"].startswith("data:image/svg+xml;base64,") for one in found.named("img"))
    assert "{{ 7*7 }}" in "".join(found.text)
    style = [one.split("<style>")[1].split("</style>")[0] for one in (hostile_html(), sample_html())]
    assert style[0] == style[1]


# What lies beyond the window's right edge, or within a box that scrolls or cuts; and the narrowest figure.
LOOK = """<script>document.title = JSON.stringify([document.documentElement.scrollWidth - innerWidth,
  [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth
    || (e.clientWidth && e.scrollWidth > e.clientWidth + 1)).map(e => e.outerHTML.slice(0, 80)),
  Math.min(...[...document.querySelectorAll('.figures:not(.many) img')].map(e => e.clientWidth))])</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "media"), [(1280, "screen"), (1060, "screen"), (500, "screen"), (688, "print")])
@pytest.mark.parametrize("made", [sample_html, hostile_html])
def test_a_browser_shows_the_whole_page_at_any_width(tmp_path, made, width, media):
    page = tmp_path / "page.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", made()).replace("</body>", f"{LOOK}</body>")
    page.write_text(re.sub("@media (screen|print)", lambda m: f"@media {'all' if m[1] == media else 'speech'}", text))
    words = ["--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", f"--window-size={width},900"]
    command = ["chromium", *words, "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    over, beyond, figure = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    assert over <= 0 and beyond == [] and figure >= 0.9 * min(width, 1060)


@pytest.mark.parametrize("data", [sample_data(), make([]), named_data("<b>&</b>", sample_data())])
def test_a_notebook_shows_the_answer_and_nothing_that_is_not_escaped(data):
    report = AuditReport(data)
    view = Page(report._repr_html_())
    assert report.answer() in "".join(view.text) and {tag for tag, _ in view.elements} <= {"p", "b", *TABLE}
    assert len(view.named("tr")) == 4


def draw(data):
    return draw_all(data, AuditReport(data).tables())


def parsed(picture):
    return ElementTree.fromstring(base64.b64decode(picture.uri.removeprefix("data:image/svg+xml;base64,")))


def one_seed():
    kinds = (("ridge", "head_input", None), ("ridge", "any_layer", None), ("whole_network", "fine_tuning", 10))
    return [one for name, access, half in kinds for one in attack(name, access, "immunized", 0.4, half=half, seeds=1)]


def test_every_section_has_its_figures_that_load_nothing_and_tell_their_numbers():
    pictures = draw(sample_data())
    sections = [one.section for one in pictures]
    counts = {"headline": 1, "curves": 6, "layers": 1}
    assert {name: sections.count(name) for name in sections} == counts
    for picture in pictures:
        links = [value for node in parsed(picture).iter() for key, value in node.items() if key.endswith("href")]
        assert links and all(link.startswith("#") for link in links)
        assert picture.caption.endswith(".") and "%" in picture.alt
    assert "Probes at any layer: after immunization 53.0%, before immunization 53.0%" in pictures[0].alt
    # Each layer has bars of its own, however alike the long names.
    layers = [f"encoder.blocks.{i}.intermediate.fc2.weights (pooled)" for i in range(3)]
    data = make([one for layer in layers for one in attack("ridge", "any_layer", "immunized", 0.3, layer=layer)])
    assert draw(data)[-1].alt.count("after") == 3
    data = make(one_seed())
    assert draw(data) == draw(data) and draw(make([])) == []


@pytest.mark.parametrize("name", ["$\\frac{", "$x$", "a\nb\x00", "<script>", "汽车", "--><b>", "W" * 300])
def test_no_name_breaks_a_figure(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in draw(named_data(name, make(one_seed()))):
            parsed(picture)


# The short forms and files


def test_the_card_is_plain_json_of_the_agreed_form_and_the_summary_plain_text(report):
    card = report.for_card()
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert list(card) == ["preset", "preset_version", "strongest", "utility", "verdict"]
    assert list(card["strongest"]) == ["head_input", "any_layer", "fine_tuning"]
    expected = ["attacker", "layer", "accuracy", "reference_accuracy", "chance", "random_accuracy"]
    expected += ["removed", "removed_interval"]
    assert all(list(one) == expected for one in card["strongest"].values())
    assert list(card["utility"]) == ["size", "immunized", "reference", "difference", "interval"]
    assert card["utility"]["interval"] == [-0.019, 0.003]
    card = AuditReport(make(attack("ridge", "head_input", "immunized", 0.4), utility=None)).for_card()
    assert card["strongest"]["fine_tuning"] is None and card["utility"] is None
    assert card["strongest"]["head_input"]["reference_accuracy"] is None
    text = report.summary()
    assert "Probes at any layer: 53.0% (before immunization 53.0%, chance 1.0%)" in text and len(text) < 4000
    assert all(line.isprintable() for line in text.split("\n"))


def test_what_is_written_is_read_back_and_is_whole_or_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"Expected the audit\.json"):
        AuditReport.load(tmp_path)
    report = AuditReport(small_data())
    report.write(tmp_path)
    assert AuditReport.load(tmp_path).data == AuditReport.load(tmp_path / "audit.json").data == report.data
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(files) == {"report.html", "audit.json", *(f"{name}.csv" for name in report.tables())}
    monkeypatch.setattr(AuditReport, "to_json", lambda self: "\ud800")  # which cannot be written
    with pytest.raises(UnicodeEncodeError):
        AuditReport(make([])).write(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


STARTS = ["=", "+", "-", "@", "\t=", "\r=", "\n=", "\r\n=", "_=", "\u200b=", "\ufeff=", "＝", "＋", "－", "＠"]


@pytest.mark.parametrize("start", [start.replace("_", " ") for start in STARTS])
def test_no_cell_of_a_table_is_a_formula_and_no_row_breaks(tmp_path, start):
    name = f"{start}cmd|' /C calc'!A0\r+1\n@x\"\u2028\x85-1"
    AuditReport(make([lost(name, "diverged", name, layer=name), lost("y", "skipped", name)])).write(tmp_path)
    for table in ("outcomes.csv", "attacks.csv"):
        text = (tmp_path / table).read_bytes().decode("utf-8")
        assert len(text.splitlines()) == 3
        for cell in [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]:
            # As a spreadsheet may: without what does not show, and full-width signs as their plain ones.
            shown = unicodedata.normalize("NFKC", cell).strip("\u200b\ufeff \t\r\n")
            assert not shown.startswith(("=", "+", "-", "@"))


@pytest.mark.parametrize("name", ["\x1b[2J\x07", "\u202eevil", "\x9b31m", "a\rb", "\x00"])
def test_no_name_ends_a_report_or_acts_on_what_shows_it(tmp_path, name):
    runs = [lost("x", "diverged", "y"), *one_seed()]
    report = AuditReport(named_data(name, make(runs)))
    report.write(tmp_path)
    assert report.for_card() and AuditReport.load(tmp_path).data == report.data
    shown = [report.summary(), *report.verdict()]
    shown += [file.read_bytes().decode("utf-8") for file in tmp_path.iterdir() if file.suffix != ".json"]
    for text in shown:
        text.encode("utf-8")
        assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]


def test_no_table_has_a_column_without_values():
    tables = re.findall("<table>.*?</table>", sample_html(), re.DOTALL)
    for table in tables:
        heads = re.findall(r'<th scope="col"[^>]*>([^<]+)<', table)
        assert set(heads[1:]) == set(re.findall(r'data-head="([^"]+)"', table))
    assert len(tables) > 4
