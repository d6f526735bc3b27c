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
from hf_immunize.hub.card import CardOptions, eval_results, licence_fields, render_card, write_card
from hf_immunize.hub.record import (
    AttackRecord,
    AuditRecord,
    BaseModelRecord,
    ConditioningRecord,
    DataRecord,
    ImmunizationRecord,
    MethodRecord,
    MetricRecord,
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


def test_every_result_reads_back():
    record = record_of()
    assert ModelCard(str(render_card(record))).data.eval_results == eval_results(record)


def test_results_hold_accuracy_kappa_ratio_and_attack():
    found = {result.metric_type: result.metric_value for result in eval_results(record_of())}
    expected = {"log10_kappa", "rir", "log10_rir", "log10_harmful_ratio", "log10_benign_ratio", "accuracy"}
    assert set(found) == expected
    assert found["log10_rir"] == pytest.approx(3.05)


def test_results_of_one_data_set_for_both_tasks_stay_apart():
    record = record_of(name="user/data", harmful="user/data")
    found = rendered(record).data.eval_results
    assert found == eval_results(record)
    assert {result.dataset_config for result in found} == {"benign", "harmful"}


def test_metadata_is_what_the_hub_accepts():
    assert card_problems(str(render_card(record_of()))) == []


def test_metadata_names_method_base_data_and_licence():
    data = rendered(record_of(name="user/pets")).data
    assert {"model-immunization", "hf-immunize"} <= set(data.tags)
    assert (data.base_model, data.datasets, data.license) == ("user/vit", ["user/pets"], "mit")


def test_bounds_keep_their_direction():
    text = rendered(record_of()).text
    assert "| RIR (exact) | 1 | ≥ 1,122 |" in text
    assert "| log10 κ of harmful features | 4.00 | ≥ 7.25 |" in text


def test_undetermined_ratio_is_no_number():
    record = record_of()
    record.ratios["exact"] = RatioRecord(None, bound="undetermined")
    card = rendered(record)
    assert "| RIR (exact) | 1 | undetermined |" in card.text
    assert "log10_rir" not in {result.metric_type for result in card.data.eval_results}


def test_ratio_beyond_floats_still_reads_back():
    record = record_of()
    record.ratios["exact"] = RatioRecord(400.0, 400.0, 0.0)
    assert rendered(record).data.eval_results == eval_results(record)


def test_strongest_attacker_is_named():
    text = rendered(record_of()).text
    assert "the strongest attacker tried (ridge) reaches 81.0% of the harmful task" in text
    assert "| the classifier's input | ridge | 81.0% | 85.0% | 25.0% |" in text


def test_access_that_was_not_attacked_is_said():
    assert "all weights (fine-tuning) was not tried" in rendered(record_of()).text


def test_without_an_audit_it_says_so():
    record = record_of()
    record.audit = None
    assert "No audit was made" in rendered(record).text


def test_without_figures_it_says_that_nothing_was_measured():
    record = ImmunizationRecord(MethodRecord("kappa", "all", 0, 0), BaseModelRecord("x"))
    card = rendered(record)
    assert "was not measured" in card.text
    assert card.data.eval_results is None


def test_code_names_the_repository():
    assert 'from_pretrained("user/model")' in rendered(record_of(), repo_id="user/model").text


def test_user_sections_and_metadata_stay(tmp_path):
    write_card(tmp_path, record_of())
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    card.data.license, card.data.tags = "bsd-3-clause", [*card.data.tags, "mine"]
    card.text = f"# My own words\n\nBefore \\1 it.\n{card.text}\n## Contact\n\nAfter it.\n"
    card.save(path)
    write_card(tmp_path, record_of(name="other pets"))
    renewed = ModelCard.load(path)
    assert renewed.text.startswith("# My own words\n\nBefore \\1 it.")
    assert renewed.text.rstrip().endswith("## Contact\n\nAfter it.")
    assert "other pets" in renewed.text
    assert "benign data: pets" not in renewed.text
    assert renewed.data.license == "bsd-3-clause"
    assert "mine" in renewed.data.tags


def test_results_of_others_stay(tmp_path):
    write_card(tmp_path, record_of())
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    other = eval_results(record_of())[0]
    other.dataset_config, other.dataset_type, other.metric_value = None, "cifar10", 0.5
    card.data.eval_results.append(other)
    card.save(path)
    write_card(tmp_path, record_of())
    assert ModelCard.load(path).data.eval_results == [*eval_results(record_of()), other]


def test_card_without_our_part_is_kept_whole(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nText.\n")
    write_card(tmp_path, record_of())
    assert "# Mine\n\nText." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("renewals", [1, 2, 3])
def test_text_of_the_user_stays_where_a_mark_is_lost(renewals, tmp_path):
    path = tmp_path / "README.md"
    for mark in ("begin. Written", "end -->"):
        path.unlink(missing_ok=True)
        write_card(tmp_path, record_of())
        text = path.read_text().replace("<!-- hf-immunize: begin", "Mine before.\n<!-- hf-immunize: begin")
        lines = ["Mine within." if f"<!-- hf-immunize: {mark}" in line else line for line in text.split("\n")]
        path.write_text("\n".join(lines) + "\nMine after.\n")
        for number in range(renewals):
            write_card(tmp_path, record_of(name=f"renewed {number}"))
        text = path.read_text()
        assert [words for words in ("Mine before.", "Mine within.", "Mine after.") if words not in text] == []
        assert f"renewed {renewals - 1}" in text
        assert "renewed 0" not in text or renewals == 1


def test_card_in_another_encoding_is_named_and_left(tmp_path):
    (tmp_path / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(CardError):
        write_card(tmp_path, record_of())
    assert (tmp_path / "README.md").read_bytes() == "Größe".encode("latin-1")


def test_writing_again_changes_nothing(tmp_path):
    write_card(tmp_path, record_of())
    before = (tmp_path / "README.md").read_bytes()
    write_card(tmp_path, record_of())
    assert (tmp_path / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    "metadata", ["tags: [a\nx: : y", "just text", "- a\n- list", "model-index: [{name: x}]", "model-index: 3"]
)
def test_unreadable_metadata_is_named_and_left(tmp_path, metadata):
    text = f"---\n{metadata}\n---\n\nMine.\n"
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(CardError, match="Repair it"):
        write_card(tmp_path, record_of())
    assert (tmp_path / "README.md").read_text() == text


def test_licence_of_ones_own_is_other():
    card = rendered(record_of(licence="My licence: v2\nevil: yes"))
    assert (card.data.license, card.data.license_name) == ("other", "my-licence-v2-evil-yes")
    assert card_problems(str(card)) == []


def test_licence_identifier_is_kept():
    assert licence_fields("cc-by-nc-4.0") == ("cc-by-nc-4.0", None)


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
    "true",
    "1.5",
    "~",
    "2020-01-01",
    "",
    " ",
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


@settings(max_examples=150, deadline=None)
@given(name=nasty, harmful=nasty, base=nasty, attacker=nasty, licence=nasty, remark=nasty)
@example(*NASTY[:6])
@example(*NASTY[6:12])
@example(*NASTY[12:18])
def test_names_change_nothing_but_words(name, harmful, base, attacker, licence, remark):
    record = record_of(name, harmful, base, attacker, licence, remark)
    text = str(render_card(record, CardOptions(repo_id=name, model_name=base, tags=[harmful])))
    card = ModelCard(text)
    allowed = {
        "library_name",
        "pipeline_tag",
        "tags",
        "license",
        "license_name",
        "model-index",
        "datasets",
        "base_model",
    }
    metadata = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert set(metadata) <= allowed
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


def test_an_objective_that_hides_says_what_brings_it_back():
    from hf_immunize.hub.card import not_stopped

    assert "statistics of its batch" in not_stopped(None, "silence")
    assert "statistics of its batch" not in not_stopped(None, "concentration")
