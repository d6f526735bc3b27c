"""Cards: read back by `huggingface_hub`, true to the record, and closed to whatever names try."""

import re

import pytest
import yaml
from hub_server import card_problems
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_immunize.errors import CardError
from hf_immunize.hub.card import (
    CardOptions,
    eval_results,
    plain,
    record_rows,
    render_card,
    slug,
    summary_sentence,
    write_card,
)
from hf_immunize.hub.record import (
    AttackRecord,
    AuditRecord,
    BaseModelRecord,
    ConditioningRecord,
    DataRecord,
    ImmunizationRecord,
    MethodRecord,
    MetricRecord,
    ProbingRecord,
    RatioRecord,
    SideRecord,
)
from hf_immunize.text import printable


def features(log10_kappa, **more):
    return ConditioningRecord(log10_kappa, rank=4, num_samples=10, dim=8, **more)


def record_of(name="pets", harmful="weapons", base="user/vit", attacker="ridge", licence="mit", remark="A remark."):
    return ImmunizationRecord(
        MethodRecord("kappa", "last_stage", 3, 0),
        BaseModelRecord(base, on_hub=True),
        benign=DataRecord(name, on_hub=True, split="test", train_size=20, size=10),
        harmful=DataRecord(harmful, classes=[harmful], train_size=20, size=10),
        metric=MetricRecord("accuracy", 0.88, 0.9),
        benign_features=SideRecord(features(3.0), features(3.2)),
        harmful_features=SideRecord(features(4.0), features(7.25, is_bound=True, reference_rank=6)),
        ratios={"exact": RatioRecord(3.05, 3.25, 0.2, "lower")},
        audit=AuditRecord("quick", 1, {"head_input": AttackRecord(attacker, 0.81, 0.85, 0.25)}),
        image_processor="ViTImageProcessor",
        software={"torch": "2.13.0"},
        license=licence,
        remarks=[remark],
    )


def rendered(record, **options):
    return ModelCard(str(render_card(record, CardOptions(**options))))


def test_metadata_is_what_the_hub_accepts_and_the_results_read_back():
    for record in (record_of(name="user/pets"), record_of(name="user/data", harmful="user/data")):
        card = rendered(record)
        found = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert list(found.values()) == [0.88, pytest.approx(3.05), 0.81]
        assert any("bound from below" in name for name in found)
        assert card.data.eval_results == eval_results(record)
        assert {result.dataset_config for result in card.data.eval_results} == {"benign", "harmful"}
        assert card_problems(str(card)) == []
        assert {"model-immunization", "hf-immunize"} <= set(card.data.tags)
        assert (card.data.base_model, card.data.license) == ("user/vit", "mit")
        assert card.data.datasets == [record.benign.name]


def test_rows_keep_the_direction_of_bounds():
    record = record_of()
    rows = {name: cells for name, *cells in record_rows(record)}
    assert rows["RIR (exact, the paper's)"] == ["1", "≥ 1,122"]
    assert rows["log10 κ of harmful features"] == ["4.00", "≥ 7.25"]
    assert rows["(i), growth of harmful κ"] == ["1", "≥ 1,778"]


def test_ratio_that_is_no_number_or_beyond_floats_still_reads_back():
    record = record_of()
    for ratio, cell in (
        (RatioRecord(None, bound="undetermined"), "undetermined"),
        (RatioRecord(400.0, 400.0, 0.0), "1.7e+308"),
    ):
        record.ratios = {"exact": ratio, "intercept": ratio}
        assert [row[2] for row in record_rows(record) if row[0].startswith("RIR")] == [cell, cell]
        assert rendered(record).data.eval_results == eval_results(record)
    record.metric = MetricRecord("loss", 0.25)
    assert record_rows(record)[0] == ("benign loss", "–", "0.25")


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ({"eval_rir": 0.313, "eval_accuracy": 0.238}, ["nothing", "24.0 points", "harmful_weight="]),
        ({"eval_rir": 1.2}, ["nothing", "trainable="]),
        # With an intercept, where both are known.
        ({"eval_rir": 50.0, "eval_intercept_rir": 1.2}, ["nothing", "trainable="]),
        ({"eval_rir": 1.2, "eval_intercept_rir": 50.0}, []),
        ({"eval_rir": 50.0, "eval_accuracy": 0.3}, ["cost 17.8 points", "harmful_weight="]),
        ({"eval_rir": 50.0}, []),
    ],
)
def test_the_last_sentence_says_what_failed_and_what_to_do(after, found):
    text = summary_sentence({"eval_accuracy": 0.478}, {"eval_accuracy": 0.478} | after)
    last = text[text.rindex("fine-tuning.") :]
    assert all(words in last for words in found) and ("This run" in last) == bool(found)


@pytest.mark.parametrize(
    ("before", "after", "nothing"), [(10_000, 10_000, True), (249, 10_000, False), (249, 250, True)]
)
def test_a_probe_counts_as_slowed_from_twice_its_steps_on_also_where_they_did_not_suffice(before, after, nothing):
    steps = {"eval_harmful_probing_steps": after, "eval_harmful_probing_is_lower_bound": float(after == 10_000)}
    text = summary_sentence({"eval_harmful_probing_steps": before}, {"eval_intercept_rir": 1.2} | steps)
    assert ("achieved nothing" in text) == nothing


def test_steps_that_the_start_does_not_suffice_with_either_are_no_slowing():
    record = record_of()
    for before, told in ((249, True), (10_000, False)):
        record.harmful_features.probing = ProbingRecord(before, None, 10_000)
        (row,) = [row for row in record_rows(record) if row[0] == "steps of a harmful probe"]
        said = [row[2], rendered(record).text, record._repr_html_()]
        assert [("no slowing can be told" in text) for text in said] == [not told] * 3 and ("≥" in row[2]) == told


def test_an_attacker_who_is_helped_is_not_one_of_whom_something_is_removed():
    record = record_of()
    for removed, ends, found in ((0.5, [0.4, 0.6], 0), (-0.26, [-0.3, -0.1], 1), (-0.26, [-0.3, 0.1], 0)):
        attack = record.audit.strongest["head_input"]
        attack.random_accuracy, attack.removed, attack.removed_interval = 0.3, removed, ends
        text = rendered(record).text
        assert text.count("helps the attacker") == found and ("removed 50.0%" in text) == (removed > 0)
        assert ("| none (-26.0%) |" in text) == (removed < 0)


CHANGE = {"eval_accuracy_change": -0.2, "eval_accuracy_change_low": -0.31, "eval_accuracy_change_high": -0.09}
COMPONENTS = {"eval_harmful_probing_steps": 900.0, "eval_harmful_probing_of_components": 1.0}
BOUNDS = {"eval_rir_is_lower_bound": 1.0, "eval_rir_is_upper_bound": 1.0}


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({"eval_accuracy": 0.9}, {"eval_accuracy": 0.5, "eval_rir": 0.2}, ["0.2 times", "-40.0 points"]),
        ({}, {"eval_accuracy": 0.9, "eval_rir": None, **BOUNDS}, ["undetermined", "not measured before"]),
        ({}, {}, ["ratio of condition numbers was not measured", "accuracy was not measured"]),
        ({}, {"eval_rir": 5.0, "eval_rir_is_upper_bound": True}, ["at most 5"]),
        (
            {"eval_harmful_probing_steps": 30.0},
            COMPONENTS,
            ["leading components of the harmful images takes 900 steps"],
        ),
        # Paired over images, it is known also where the starting weights had no evaluation of their own.
        ({}, {"eval_accuracy": 0.7} | CHANGE, ["from 90.0%", "-20.0 points", "-31.0 to -9.0", "cost 20.0 points"]),
    ],
)
def test_the_first_sentence_says_what_was_found(before, after, found):
    text = summary_sentence(before, after)
    assert [words for words in found if words not in text] == []


def test_a_notebook_shows_what_a_record_measured():
    record, empty = record_of(), ImmunizationRecord(MethodRecord("kappa", "all", 0, 0), BaseModelRecord("x"))
    assert [words for words in ("user/vit", "0.88", "≥ 7.25", "≥ 3.05") if words not in record._repr_html_()] == []
    assert "<td>" not in empty._repr_html_()


def test_fewer_images_than_dimensions_describe_the_sample_alone():
    record, said = record_of(), "describes this sample"
    assert said not in rendered(record).text
    record.harmful_features.after.dim = record.harmful_features.after.num_samples + 1
    assert said in rendered(record).text


def test_attackers_are_named_and_access_that_was_not_tried_too():
    text = rendered(record_of()).text
    assert re.search(r"81\.0% with the strongest attacker tried, ridge \(\D*85\.0%", text)
    assert "| the classifier's input | ridge | 81.0% | 85.0% | – | – | 25.0% |" in text
    assert "all weights (fine-tuning) were not tried" in text
    record = record_of()
    record.audit = None
    for objective in ("dead_relu", "silence", "concentration"):
        record.method.objective = objective
        text = rendered(record).text
        assert "holds no audit" in text
        assert ("statistics of its batch" in text) == (objective != "concentration")


def test_without_figures_it_says_so_and_code_names_the_repository_or_a_folder():
    card = rendered(ImmunizationRecord(MethodRecord("kappa", "all", 0, 0), BaseModelRecord("x")))
    assert "was not measured" in card.text
    assert card.data.eval_results is None
    for repo_id, place in (("user/model", "user/model"), ("x'); evil('", "path/to/this/folder")):
        assert f'from_pretrained("{place}")' in rendered(record_of(), repo_id=repo_id).text


def test_sections_metadata_and_results_of_the_user_stay(tmp_path):
    write_card(tmp_path, record_of())
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    other = eval_results(record_of())[0]
    other.dataset_config, other.dataset_type, other.metric_value = None, "cifar10", 0.5
    card.data.eval_results.append(other)
    card.data.license, card.data.tags = "bsd-3-clause", [*card.data.tags, "mine"]
    card.text = f"# My own words\n\nBefore \\1 it.\n{card.text}\n## Contact\n\nAfter it.\n"
    card.save(path)
    write_card(tmp_path, record_of(name="other pets"), CardOptions(language="en"))
    renewed = ModelCard.load(path)
    assert renewed.text.startswith("# My own words\n\nBefore \\1 it.")
    assert renewed.text.rstrip().endswith("## Contact\n\nAfter it.")
    assert "benign data: other pets" in renewed.text and "benign data: pets" not in renewed.text
    assert renewed.data.eval_results == [*eval_results(record_of(name="other pets")), other]
    assert (renewed.data.license, renewed.data.language, renewed.data.tags[-1]) == ("bsd-3-clause", ["en"], "mine")


def test_card_without_our_part_is_kept_whole_and_writing_again_changes_nothing(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\nText.\n")
    write_card(tmp_path, record_of())
    before = path.read_bytes()
    assert b"# Mine\n\nText." in before
    write_card(tmp_path, record_of())
    assert path.read_bytes() == before


def test_text_of_the_user_stays_where_a_mark_is_lost(tmp_path):
    path = tmp_path / "README.md"
    for mark in ("begin. Written", "end -->"):
        path.unlink(missing_ok=True)
        write_card(tmp_path, record_of())
        text = path.read_text().replace("<!-- hf-immunize: begin", "Mine before.\n<!-- hf-immunize: begin")
        lines = ["Mine within." if f"<!-- hf-immunize: {mark}" in line else line for line in text.split("\n")]
        path.write_text("\n".join(lines) + "\nMine after.\n")
        for name in ("first", "second", "third"):
            write_card(tmp_path, record_of(name=name))
        text = path.read_text()
        assert [words for words in ("Mine before.", "Mine within.", "Mine after.") if words not in text] == []
        assert "data: third" in text and "data: first" not in text and "data: second" not in text


UNREADABLE = ["Größe".encode("latin-1"), b"---\ntags: [a\nx: : y\n---\n", b"---\njust text\n---\n"]
UNREADABLE += [b"---\n- a\n- list\n---\n", b"---\nmodel-index: [{name: x}]\n---\n", b"---\nmodel-index: 3\n---\n"]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_cards_are_named_and_left(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    with pytest.raises(CardError):
        write_card(tmp_path, record_of())
    assert (tmp_path / "README.md").read_bytes() == text


# ---- names from outside ----

NASTY = [
    "x\n---\nlicense: mit\n---\n# Owned",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c\n|---|\n| x |",
    "[click](http://e.vil)",
    "![x](http://e.vil/p.png)",
    "[x]: http://e.vil 'y'",
    "'\": {y: *z} &a !!python/object:os.system",
    "`code` ```\nrm -rf /\n```",
    "**bold** __x__ ~~y~~ $z$",
    "https://e.vil www.e.vil me@e.vil mailto:me@e.vil",
    "<!-- hf-immunize: end -->",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "&lt;b&gt; &#60;script&#62;",
    "\u202egnp.exe \u200b \ufeff \x00 \x1b[31m",
    "\ud83d half",
    "- item\n1. item\n> quote\n    code\n# heading\n===",
    "\\| \\[x\\](y) \\<b>",
    "null",
    "1.5",
    "2020-01-01",
    "",
]
nasty = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=30),
    st.text(alphabet="-#|<>[]()!`*_:&{}'\"\\\n\r\t ~$@/.%=+0a\u2028\u0085", max_size=30),
)


def shape(text):
    """The structure of a Markdown text: kinds of blocks and spans, without their words."""
    kinds = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        kinds.append(token.type)
        kinds += [child.type for child in token.children or [] if child.type not in ("text", "text_special", "entity")]
    return kinds


PLAIN_SHAPE = shape(rendered(record_of()).text)


@settings(max_examples=60, deadline=None)
@given(name=nasty, harmful=nasty, base=nasty, attacker=nasty, licence=nasty, remark=nasty)
@example(*NASTY[:6])
@example(*NASTY[6:12])
@example(*NASTY[12:18])
def test_names_change_nothing_but_words(name, harmful, base, attacker, licence, remark):
    record = record_of(name, harmful, base, attacker, licence, remark)
    text = str(render_card(record, CardOptions(repo_id=name, model_name=base, tags=[harmful])))
    card = ModelCard(text)
    allowed = {"library_name", "pipeline_tag", "tags", "license", "license_name", "model-index", "datasets"}
    metadata = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert set(metadata) <= allowed | {"base_model"}
    assert [problem for problem in card_problems(text) if "license" not in problem and "tags" not in problem] == []
    names = {result.dataset_config: result.dataset_name for result in card.data.eval_results}
    assert names["benign"] == (printable(name) or "benign images")
    assert names["harmful"] == (printable(harmful) or "harmful images")
    assert card.data.eval_results == eval_results(record)
    # An empty name leaves no text; apart from that every block and span is where a harmless name has it.
    if all(printable(value) for value in (name, harmful, base, attacker, remark)):
        assert shape(card.text) == PLAIN_SHAPE
    assert not re.search(r"<(?!!-- hf-immunize: (begin\. Written|end -->))[a-zA-Z!/]", card.text)
    assert "://" not in card.text.replace(printable("arXiv:"), "")
    found = re.findall(r"<(?!/?(?:p|b|table|tr|th|td)>)|&(?!\w+;|#\d+;)", record._repr_html_())
    assert found == []


def test_text_is_plain_and_what_was_written_to_the_eye():
    for text in ("https://evil.example", "HTTPS://E.x", "www.evil.example", "WWW.e.x", "a@b.cc"):
        assert not any(mark in plain(text).lower() for mark in ("://", "www.", "@"))
    for text in ("Golden retriever 2", "scikit-learn digits 0 to 4", "日本語", "naïve café"):
        assert plain(text) == text
    for text in ("a*b*c", "<b>x</b>", "1. x", "- x", "# x", "x|y", "`x`", "\\*x", "&amp;", "~x~"):
        inline = next(one for one in MarkdownIt("commonmark").parse(f"- {plain(text)}") if one.type == "inline")
        assert "".join(child.content for child in inline.children) == text
    assert slug("a b/../c") == "a-b-c"
