"""Head start and what is removed of it: the figures, and audits of models whose answer is known."""

import math
import sys
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
import transformers as hf
from attacked import rows_of, tiny_vit
from audit_sample import attack, lost, make, sample_data, with_random
from scipy import stats

from hf_immunize import audit
from hf_immunize.attacks.attacker import ProbeBudget, ProbeData
from hf_immunize.attacks.finetune import take_statistics
from hf_immunize.attacks.presets import ATTACKERS, find_preset
from hf_immunize.audit.head_start import costs, find_head_start, removed_share
from hf_immunize.audit.names import render, share
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import SUBJECTS, Utility
from hf_immunize.audit.run import _budget
from hf_immunize.audit.statistics import gap, of_class, steps_ratios, summarize
from hf_immunize.audit.verdict import CLAIMS, Kind, judge
from hf_immunize.features.extract import choose_views, extract_views, find_layers
from hf_immunize.hub.record import AuditRecord, from_plain
from hf_immunize.vision.bare import with_linear_head
from hf_immunize.vision.head import penultimate_features
from hf_immunize.vision.loading import random_copy


def read(accuracies, size):
    """An attack of which each seed reads so much."""
    mean = float(np.mean(accuracies))
    (one,) = summarize(make(attack("ridge", "head_input", "immunized", 0.5, seeds=1)))
    return replace(one, accuracies=dict(enumerate(accuracies)), mean=mean, test_size=size)


# ---- the figures


@pytest.mark.parametrize(
    ("before", "after", "floor", "removed"),
    [
        (0.9, 0.9, 0.3, 0.0),
        (0.9, 0.3, 0.3, 1.0),
        (0.9, 0.75, 0.3, 0.25),
        (0.9, 0.96, 0.3, -0.1),
        (0.9, 0.1, 0.3, 4 / 3),  # below what random weights read
    ],
)
def test_removed_is_the_share_of_the_head_start_and_clear_of_zero_exactly_where_the_gap_is(
    before, after, floor, removed
):
    for size in (100, 10_000):
        sides = [read([value] * 5, size) for value in (before, after, floor)]
        share, (low, high) = removed_share(*sides)
        assert share == pytest.approx(removed, abs=1e-9) and low <= share <= high
        _, (lost, most) = gap(sides[0], sides[1])
        assert (low > 0, high < 0) == (lost > 0, most < 0)


def test_the_interval_over_seeds_is_fiellers():
    """By his formula, for the ratio of two means of paired values."""
    generator = np.random.default_rng(3)
    before, after, floor = (m + generator.normal(0, 0.02, 6) for m in (0.8, 0.6, 0.3))
    above, below = before - after, before - floor
    (xx, xy), (_, yy) = np.cov(above, below) / 6
    t, x, y = stats.t.ppf(0.975, 5), above.mean(), below.mean()
    a, b, c = y * y - t * t * yy, x * y - t * t * xy, x * x - t * t * xx
    root = math.sqrt(b * b - a * c)
    _, found = removed_share(*(read(list(one), 10**9) for one in (before, after, floor)))
    assert found == pytest.approx(((b - root) / a, (b + root) / a), abs=1e-4)


def test_the_interval_over_images_covers_the_truth_nineteen_times_in_twenty():
    generator, truth, size = np.random.default_rng(0), (0.8, 0.65, 0.4), 150
    drawn = generator.binomial(size, truth, (400, 3)) / size
    found = [removed_share(*(read([value], size) for value in row))[1] for row in drawn]
    held = sum(low <= 0.375 <= high for low, high in found)
    assert 368 <= held <= 395  # 380 in the mean


@pytest.mark.parametrize(
    ("before", "floor", "size", "at_stake", "known"),
    [(0.99, 0.96, 1000, False, False), (0.9, 0.5, 1000, True, True), (0.6, 0.45, 20, True, False)],
)
def test_of_a_head_start_under_ten_points_or_not_clear_of_zero_no_share_is_known(before, floor, size, at_stake, known):
    found = find_head_start(*(read([value] * 3, size) for value in (before, 0.5, floor)))
    assert found.points == pytest.approx(before - floor) and found.hardly_any != at_stake
    assert (found.removed is not None) == (found.removed_interval is not None) == known


def test_of_more_seeds_on_the_model_than_random_copies_the_share_keeps_an_interval_and_of_few_no_claim():
    sides = [read(one, 1000) for one in ([0.9, 0.9, 0.9, 0.9, 0.91], [0.9] * 5, [0.40, 0.41, 0.39])]
    found = find_head_start(*sides)
    low, high = found.removed_interval
    assert low < found.removed < high < 0.1 and found.claimed
    few = find_head_start(*(read([value] * 2, 1000) for value in (0.9, 0.5, 0.45)))
    assert few.removed > 0.8 and not few.claimed


HALVES = {"random": (0.3, 300), "reference": (0.8, 10), "immunized": (0.8, 1000)}


def curves(attacker):
    return [
        one
        for subject, (best, half) in HALVES.items()
        for one in attack(attacker, "head_input", subject, best, half=half)
    ]


@pytest.mark.parametrize(("attacker", "counted"), [("adamw", "steps"), ("few_images", "images")])
def test_cost_is_what_it_takes_to_reach_what_random_weights_do_with_their_whole_budget(attacker, counted):
    data = make(curves(attacker))
    (one,) = costs(data)
    random = [run for run in data.outcomes if run.subject == "random"]
    first = [run.steps[run.curve.index(max(run.curve))] for run in random]
    assert one.target == pytest.approx(0.3, abs=0.02) and one.random_steps == pytest.approx(np.mean(first))
    assert (one.counted, one.reference_steps, one.immunized_steps, one.is_bound) == (counted, 10, 1000, False)
    assert costs(make(curves(attacker)[5:])) == []


def test_labelled_images_are_no_steps_and_never_the_strongest_attack():
    summaries = summarize(make(curves("few_images")))
    assert steps_ratios(make(curves("few_images"))) == []
    assert all(one.closed_form and not one.budget for one in summaries)
    assert of_class(summaries, "immunized", "harmful", "head_input") == []


# ---- what is said of it


BROKEN = Utility(2000, 0.31, 0.75, -0.44, (-0.46, -0.42))


@pytest.mark.parametrize(
    ("data", "kind", "claimed"),
    [
        (with_random(0.30), Kind.REDUCED, True),
        (with_random(0.486), Kind.NOT_PREVENTED, True),
        (with_random(0.6), Kind.HELPED, True),
        (with_random(0.30, floor=0.45), Kind.NO_HEAD_START, False),
        (with_random(0.6, floor=0.45), Kind.HELPED, False),  # what the weights gave before is not what they give now
        (with_random(0.05, utility=BROKEN), Kind.WITHHELD, False),
        (with_random(0.40, utility=None), Kind.WITHHELD, False),
        (with_random(0.6, utility=BROKEN), Kind.HELPED, True),
    ],
)
def test_the_headline_of_a_class_is_what_is_removed_where_benign_accuracy_lets_it_be_claimed(data, kind, claimed):
    report = AuditReport(data)
    found = next(one for one in judge(data) if one.access == "head_input")
    row = report.tables()["headline"].set_index("access").loc["head_input"]
    assert (found.kind, row["finding"], bool(row["removed_claimed"])) == (kind, kind.value, claimed)
    assert row["head_start"] == pytest.approx(row["reference_accuracy"] - row["random_accuracy"])
    card = report.for_card()["strongest"]["head_input"]
    said = report.summary(), " ".join(report.verdict())
    if claimed:
        assert card["removed"] == row["removed"] and card["removed_interval"][0] < row["removed"]
        assert all(f"{abs(row['removed']):.0%}" in text for text in said)
        # A share below zero is not one that is removed.
        assert all(("helps the attacker: " in text) == (kind is Kind.HELPED) for text in said)
        assert kind is not Kind.HELPED or f"none ({share(row['removed'])})" in report.to_html()
    assert claimed or card["removed"] is card["removed_interval"] is None
    record = from_plain(AuditRecord, report.for_card(), "audit")
    assert record.strongest["head_input"].removed == card["removed"]


@pytest.mark.parametrize(
    ("ran_on", "floor"),
    [
        (("reference", "immunized"), None),  # what it reads from random weights may be as much
        (("reference",), 0.05),
        (("immunized",), None),  # as much may be read from the reference
        (("random",), 0.05),
        (("random", "reference"), 0.05),
        (("random", "immunized"), None),
        (("random", "reference", "immunized"), 0.7),
    ],
)
def test_a_head_start_is_of_attackers_that_ran_on_all_three_models(ran_on, floor):
    for failed in ([], [lost("mlp", "diverged", "the loss is NaN", subject=s) for s in SUBJECTS if s not in ran_on]):
        more = [one for subject in ran_on for one in attack("mlp", "head_input", subject, 0.7)]
        data = with_random(0.3)
        data = replace(data, outcomes=[*data.outcomes, *more, *failed])
        found = next(one for one in judge(data) if one.access == "head_input")
        row = AuditReport(data).tables()["headline"].set_index("access").loc["head_input"]
        assert (found.start is None) == (floor is None) == bool(np.isnan(row["head_start"]))
        assert found.kind is not Kind.HELPED
        if floor is not None:
            assert found.start.random.mean == pytest.approx(floor, abs=0.01)
            assert found.start.points == pytest.approx(found.reference.mean - found.start.random.mean)


def test_an_audit_without_random_weights_says_what_it_said():
    headline = AuditReport(sample_data()).tables()["headline"]
    assert headline["removed"].isna().all() and all(one.start is None for one in judge(sample_data()))


def test_copies_with_random_weights_are_in_the_budget_where_one_was_attacked():
    budget = _budget(find_preset("quick"), None) | {"random_copies": 91}
    made = sample_data(budget=budget), with_random(0.3, budget=budget)
    assert ["91" in render("budget.html.jinja", data=data) for data in made] == [False, True]


# ---- models whose answer is known


SIZE = 16


def crosses(rows, seed):
    """Images of two patterns, each with a sign: whether the signs agree is harmful, the first sign is benign.

    No linear function of the pixels tells whether they agree.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rows, 2), generator=generator) * 2.0 - 1
    pixels = 2 * signs @ patterns() + 0.3 * torch.randn(rows, 3 * SIZE**2, generator=generator)
    return pixels.view(rows, 3, SIZE, SIZE), (signs.prod(dim=1) > 0).long(), (signs[:, 0] > 0).long()


def patterns():
    drawn = torch.randn(3 * SIZE**2, 2, generator=torch.Generator().manual_seed(17))
    return torch.linalg.qr(drawn).Q.mT


def untrained(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=SIZE, patch_size=SIZE, num_labels=2, **sizes)).eval()


@torch.no_grad()
def knowing():
    """Weights set by hand: dimensions 0 to 3 are ±(a + b) and ±(a − b) of the signs, 4 and 5 their absolute values."""
    model = untrained(0)
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.fill_(1.0)
    first, second = patterns()
    rows = torch.stack([first + second, first - second, -first - second, second - first])
    model.vit.embeddings.patch_embeddings.projection.weight[:4] = rows.view(4, 3, SIZE, SIZE)
    block, last = model.vit.layers
    block.mlp.fc1.weight[:4, :4] = torch.eye(4)
    block.mlp.fc2.weight[4, [0, 2]] = block.mlp.fc2.weight[5, [1, 3]] = 1.0
    # The class token reads the patch, evenly.
    last.attention.v_proj.weight.copy_(torch.eye(16))
    last.attention.o_proj.weight.copy_(torch.eye(16))
    model.classifier.weight[1, :2] = 10.0
    return model


@torch.no_grad()
def immunized_at_the_head():
    model = knowing()
    model.vit.layernorm.weight[4:] = 0.0
    return model


@torch.no_grad()
def collapsed():
    model = knowing()
    model.vit.layernorm.weight.zero_()
    return model


@pytest.fixture(scope="module")
def audits():
    made = {"the reference itself": knowing, "random": lambda: untrained(99)}
    made |= {"at the head": immunized_at_the_head, "collapsed": collapsed}
    return {name: audit_of(model()) for name, model in made.items()}


def audit_of(model):
    chosen = find_preset("quick").only(["ridge", "last_stage", "restore_swap"]).changed(seeds=3)
    tuning = replace(chosen.tuning_budget, steps=40, trial_steps=10, optimizers={"adamw": (3e-3,)}, evaluations=2)
    preset = replace(chosen, max_layers=3, restoring=(), tuning_budget=tuning)
    sides = [crosses(120, 0), crosses(300, 1)]
    harmful, benign = (tuple(rows_of(side[0], side[label]) for side in sides) for label in (1, 2))
    data = {"harmful": harmful, "benign": benign, "reference": knowing()}
    return audit(model, **data, preset=preset, progress=False)


def removed(report):
    return report.tables()["headline"].set_index("access")[["removed", "removed_low", "removed_high", "head_start"]]


def test_much_is_at_stake_of_weights_that_know_what_pixels_do_not_tell(audits):
    assert (removed(audits["the reference itself"])["head_start"] > 0.3).all()


def test_every_layer_is_read_from_random_weights_too_and_pixels_are_none(audits):
    layers = audits["the reference itself"].tables()["layers"]
    assert layers["random_accuracy"].notna().all() and not layers["layer"].str.contains("pixels").any()


def test_of_the_reference_itself_nothing_is_removed(audits):
    found = removed(audits["the reference itself"])
    assert (found["removed"] == 0).all() and (found["removed_low"] <= 0).all() and (found["removed_high"] >= 0).all()


def test_of_random_weights_all_is_removed(audits):
    found = removed(audits["random"])
    assert ((found["removed_low"] <= 1) & (found["removed_high"] >= 1) & (found["removed"] > 0.7)).all()


def test_immunized_at_the_head_nothing_is_removed_at_any_layer(audits):
    found = removed(audits["at the head"])["removed"]
    assert found["any_layer"] == 0 and found["head_input"] > 0.7


def test_of_a_model_whose_benign_accuracy_collapsed_this_is_said_first_and_nothing_claimed(audits):
    found = judge(audits["collapsed"].data)
    assert found[0].kind is Kind.BROKEN and not {one.kind for one in found} & CLAIMS
    assert removed(audits["collapsed"]).loc["head_input", "removed"] > 0.7
    assert audits["collapsed"].for_card()["strongest"]["head_input"]["removed"] is None


@torch.no_grad()
def test_hidden_units_are_read_that_a_block_does_not_let_out():
    model, sides = knowing(), [crosses(120, 0), crosses(300, 1)]
    model.vit.layers[0].mlp.fc2.weight.zero_()
    layers = find_layers(model, sides[0][0], 8)
    views, _ = choose_views(layers, 420, 10_000, 2**30, True)
    train, test = (extract_views(model, [side[0]], views).views for side in sides)
    data = {name: ProbeData(train[name], sides[0][1], test[name], sides[1][1], 2) for name in train}
    read = {name: ATTACKERS["ridge"].run(one, ProbeBudget(), 0).accuracy for name, one in data.items()}
    inside = {name: read.pop(name) for name in list(read) if "fc2" in name}
    assert list(inside) == [f"input of vit.layers.{i}.mlp.fc2 (pooled)" for i in (0, 1)]
    assert max(inside.values()) > 0.95 and max(read.values()) < 0.7


def test_copies_are_of_one_kind_with_weights_of_their_seed():
    model = untrained(0)
    states = [random_copy(model, seed).state_dict() for seed in (1, 1, 2)]
    assert states[0].keys() == model.state_dict().keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "vit.layers.0.mlp.fc1.weight"
    assert not torch.equal(states[0][name], states[2][name])
    assert not torch.equal(states[0][name], model.state_dict()[name])
    torch.manual_seed(1)  # as a model may have been drawn that is then trained
    assert not torch.equal(states[0][name], type(model)(model.config).state_dict()[name])
    headed = with_linear_head(hf.ViTModel(model.config), 3, "cls")
    drawn = random_copy(headed, 1)
    assert drawn.state_dict().keys() == headed.state_dict().keys()
    name = name.replace("vit", "backbone")
    assert not torch.equal(drawn.state_dict()[name], headed.state_dict()[name])


@pytest.mark.parametrize("name", families.BUILDERS)
def test_images_pass_through_random_weights_of_every_family(name):
    """Without statistics of images, BatchNorm lets nothing through a deep network: there would be no floor."""
    drawn, pixels = random_copy(families.BUILDERS[name](), 5), torch.randn(40, 3, 32, 32)
    take_statistics(drawn, pixels, 0)
    with torch.no_grad():
        assert penultimate_features(drawn, pixels[:8]).std(dim=0).mean() > 1e-3


class Particular(hf.ViTForImageClassification):
    """A class that its config alone does not build."""

    def __init__(self, config, secret):
        super().__init__(config)


@pytest.mark.parametrize("built", [False, True])
def test_without_a_sound_copy_the_audit_goes_on_and_says_what_it_lacks(built, monkeypatch, tiny_preset, harmful):
    model, reference = (Particular(tiny_vit().config, 1).eval() for _ in range(2))
    preset = replace(tiny_preset.only(["ridge", "bias_only"]), random_copies=2)
    if built:  # with weights that overflow
        drawn = tiny_vit()
        drawn.vit.layernorm.bias.data.fill_(torch.inf)
        for name, one in (("random_copy", lambda model, seed: drawn), ("can_copy", lambda model: True)):
            monkeypatch.setattr(sys.modules["hf_immunize.audit.run"], name, one)
    found = audit(model, harmful=harmful, reference=reference, preset=preset, progress=False).data
    assert not [one for one in found.outcomes if one.subject == "random"]
    assert sum("random" in one or "config" in one for one in found.warnings) == 1 + built
