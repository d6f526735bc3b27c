import base64
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
from audit_sample import attack, make, sample_data

from hf_immunize.audit.figures import draw_all, draw_curves, draw_spectra
from hf_immunize.audit.report import make_tables
from hf_immunize.audit.result import FeatureSpectrum


def draw(data):
    return draw_all(data, make_tables(data))


def parsed(picture):
    return ElementTree.fromstring(base64.b64decode(picture.uri.removeprefix("data:image/svg+xml;base64,")))


@pytest.fixture(scope="module")
def pictures():
    return draw(sample_data())


def test_every_section_has_its_figures(pictures):
    sections = [one.section for one in pictures]
    assert {name: sections.count(name) for name in sections} == {
        "headline": 1,
        "curves": 6,
        "layers": 1,
        "fine_tuning": 1,
        "spectra": 2,
    }


def test_every_figure_is_an_image_that_loads_nothing(pictures):
    for picture in pictures:
        links = [
            value for node in parsed(picture).iter() for name, value in node.attrib.items() if name.endswith("href")
        ]
        assert links and all(link.startswith("#") for link in links)


def test_every_figure_tells_its_numbers_in_words(pictures):
    assert "Probes at any layer: immunized 53.0%, reference 53.0%" in pictures[0].alt
    assert all(one.caption.endswith(".") and one.alt for one in pictures)


def test_the_same_audit_draws_the_same_figures():
    data = make(attack("ridge", "head_input", "immunized", 0.4))
    assert draw(data) == draw(data)


def test_without_numbers_there_is_no_figure():
    assert draw(make([])) == []


def test_an_attacker_is_drawn_where_it_reads_most():
    runs = [
        *attack("lora_r8", "fine_tuning", "immunized", 0.2, half=10, layer="last"),
        *attack("lora_r8", "fine_tuning", "immunized", 0.4, half=10, layer="all"),
    ]
    data = make(runs)
    (picture,) = draw_curves(make_tables(data)["attacks"], make_tables(data)["curves"], 0.01)
    assert "immunized 40." in picture.alt or "immunized 39." in picture.alt


@pytest.mark.parametrize("name", ["$\\frac{", "$x$", "a\nb\x00", "<script>", "汽车", "--><b>", "W" * 300])
def test_no_name_breaks_a_figure(name):
    runs = [one for s in ("immunized", "reference") for one in attack("ridge", "any_layer", s, 0.4, layer=name)]
    runs += attack(name, "fine_tuning", "immunized", 0.4, half=10, layer=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in draw(make(runs)):
            parsed(picture)


def test_a_spectrum_of_zeros_is_left_out():
    assert draw_spectra([FeatureSpectrum("immunized", "harmful", [0.0, 0.0], 10, 0, 0.0, False)], "harmful") is None


def test_one_seed_draws_a_curve_without_interval():
    data = make(attack("gd_line_search", "head_input", "immunized", 0.4, half=10, seeds=1))
    assert len(draw_curves(make_tables(data)["attacks"], make_tables(data)["curves"], 0.01)) == 1


def test_one_seed_is_drawn_without_intervals():
    runs = [
        *attack("ridge", "head_input", "immunized", 0.4, seeds=1),
        *attack("ridge", "any_layer", "immunized", 0.4, seeds=1, layer="stem"),
        *attack("whole_network", "fine_tuning", "immunized", 0.4, seeds=1, half=10),
    ]
    assert [one.section for one in draw(make(runs))] == ["headline", "curves", "layers", "fine_tuning"]
