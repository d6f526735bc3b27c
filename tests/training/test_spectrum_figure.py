"""Figures are written at every evaluation, of the right spectra, and training does not notice."""

import io
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_immunize import SpectrumFigureCallback
from hf_immunize.errors import ArgumentError, CheckpointError, DataError, MissingPackageError
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.training import spectrum_figure
from hf_immunize.vision.head import penultimate_features


@pytest.fixture
def figures(images):
    """Make the callback, with data of both sides."""

    def make(**options):
        given = {"benign": images(24, 5), "harmful": images(24, 6, labels=False)}
        return SpectrumFigureCallback(**(given | options))

    return make


@pytest.fixture
def spectra(monkeypatch):
    """The spectra of each figure that is drawn, without the pixels, which take most of a second a figure."""
    drawn = []
    draw = spectrum_figure.draw_spectra
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b""))
    monkeypatch.setattr(spectrum_figure, "draw_spectra", lambda axes, each: (drawn.append(each), draw(axes, each)))
    return drawn


def test_a_missing_matplotlib_is_named_before_any_training(figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="plots"):
        figures()


def sigmas(model, rows):
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        return torch.linalg.svdvals(penultimate_features(model.eval(), pixels).double())


def logged(run, name):
    return {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_figure_and_the_log_are_of_the_starting_and_of_the_present_weights_in_full_precision(
    bf16, plain, figures, images, spectra, tmp_path
):
    run = plain(figures(), bf16=bf16)
    before = sigmas(run.model, images(24, 5))
    run.train()
    model = type(run.model)(run.model.config)  # without autocast
    model.load_state_dict(run.model.state_dict())
    close(spectra[-1]["benign", "before"], before)
    close(spectra[-1]["benign", "after"], sigmas(model, images(24, 5)))
    pixels = torch.stack([row["pixel_values"] for row in images(24, 6)])
    with torch.no_grad():
        expected = feature_conditioning(penultimate_features(model.eval(), pixels)).log10_kappa
    assert logged(run, "spectrum_harmful_log10_kappa")[2] == pytest.approx(expected, rel=1e-4)
    assert set(logged(run, "spectrum_log10_rir")) == {1, 2}
    assert sorted(os.listdir(tmp_path / "run" / "spectrum")) == ["spectrum.png", "starting_spectra.safetensors"]


def test_either_side_may_be_left_out(plain, figures, spectra):
    run = plain(figures(benign=None))
    run.train()
    assert set(spectra[-1]) == {("harmful", "before"), ("harmful", "after")}


@pytest.mark.parametrize(("given", "kept"), [({}, 24), ({"benign": None}, 0)])
def test_features_are_kept_only_where_steps_of_a_probe_are_logged(given, kept, figures, plain):
    callback = figures(**given)
    run = plain(callback, max_steps=1)
    run.train()
    assert sum(len(rows) for _, rows in callback._references["harmful"].by_image) == kept
    assert bool(logged(run, "spectrum_harmful_probing_steps")) == bool(kept)


def test_an_immunizing_run_has_its_figure_which_can_be_opened(trainer, figures, tmp_path):
    trainer(eval_strategy="steps", eval_steps=2, callbacks=[figures()]).train()
    with Image.open(tmp_path / "run" / "spectrum" / "spectrum.png") as image:
        assert image.format == "PNG" and image.width > image.height


def test_trackers_that_keep_pictures_have_the_figure_of_each_evaluation(plain, figures, tmp_path, monkeypatch):
    logged = []
    trackio = SimpleNamespace(log=logged.append, Image=lambda pixels: pixels)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    run = plain(figures(), eval_strategy="steps", eval_steps=1)
    run.args.report_to = ["tensorboard", "trackio"]
    run.train()
    shown = EventAccumulator(str(tmp_path / "run" / "runs" / "spectra")).Reload().Images("spectra")
    steps = [one["train/global_step"] for one in logged]
    assert [one.step for one in shown] == steps and steps[:2] == [1, 2]
    with Image.open(io.BytesIO(shown[-1].encoded_image_string)) as last:
        assert np.array_equal(np.asarray(last), logged[-1]["spectra"])


def test_a_sample_is_drawn_from_all_over_the_set_and_processed_by_the_trainers_processor(images, plain, spectra):
    (chosen,) = SpectrumFigureCallback(benign=images(100), max_samples=20)._data.values()
    assert len(chosen) == 20 and max(chosen.indices) > 60 and {i % 2 for i in chosen.indices} == {0, 1}
    shades = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    run = plain(SpectrumFigureCallback(benign=[{"image": Image.fromarray(shade)} for shade in shades]), max_steps=1)
    run.callback_handler.processing_class = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    run.train()
    assert len(spectra[-1]["benign", "after"]) == 8


class Noisy(list):
    """Images with augmentations of every generator."""

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(())
        return {"pixel_values": super().__getitem__(index)["pixel_values"] + noise}


def test_training_goes_on_as_if_nothing_had_been_drawn(plain, figures, images, spectra):
    weights = []
    for callback in (None, figures(benign=Noisy(images(24, 5)))):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        run = plain(callback)
        run.train()
        weights.append((dict(run.model.state_dict()), random.random(), np.random.rand(), torch.rand(())))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


# ---- interrupted and resumed ----


def resumed(plain, callback, tmp_path, **options):
    run = plain(callback, restore_callback_states_from_checkpoint=True, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    return run


def test_a_resumed_run_keeps_the_starting_spectra(plain, figures, images, spectra, tiny, tmp_path):
    # Not a ViT, whose blocks a plain Trainer does not resume.
    run = plain(figures(), model=tiny("resnet"))
    before = sigmas(run.model, images(24, 5))
    run.train()
    spectra.clear()
    again = resumed(plain, figures(), tmp_path, model=tiny("resnet"))
    assert len(spectra) == 1
    close(spectra[-1]["benign", "before"], before)
    assert logged(again, "spectrum_log10_rir") == pytest.approx(logged(run, "spectrum_log10_rir"), nan_ok=True)


def test_starting_spectra_that_are_lost_or_of_other_images_are_left_out(
    plain, figures, images, spectra, warnings, tmp_path
):
    plain(figures()).train()
    for make, kept in ((lambda: figures(benign=images(24, 9)), {("harmful", "before")}), (figures, set())):
        if not kept:
            (tmp_path / "run" / "spectrum" / "starting_spectra.safetensors").unlink()
        warnings.clear()
        again = resumed(plain, make(), tmp_path)
        assert set(spectra[-1]) == {("benign", "after"), ("harmful", "after")} | kept
        assert "starting spectra" in " ".join(warnings) and "spectrum_log10_rir" not in again.state.log_history[-2]


# ---- what goes wrong ----


def test_a_figure_that_cannot_be_written_does_not_end_the_run_but_starting_spectra_do(
    plain, figures, warnings, monkeypatch, tmp_path
):
    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    run = plain(figures())
    run.train()
    assert run.state.global_step == 2 and "No space left" in warnings[0]
    assert os.listdir(tmp_path / "run" / "spectrum") == ["starting_spectra.safetensors"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "spectrum").write_text("")
    run = plain(figures(), folder=tmp_path / "full")
    with pytest.raises(CheckpointError):
        run.train()
    assert run.state.global_step == 0


def test_features_that_are_lost_cost_the_spectra_and_not_the_run(plain, figures, warnings, spectra, at):
    def kill(state, control, model):
        for parameter in model.vit.layernorm.parameters():
            parameter.data.fill_(float("nan"))

    run = plain([figures(), at("on_step_end", kill)])
    run.train()
    assert run.state.global_step == 2 and spectra == [] and "step 1" in warnings[0]


def test_what_cannot_be_drawn_is_refused_at_once(plain, figures, monkeypatch):
    for options in ({}, {"max_samples": 0}, {"batch_size": 0}, {"benign": []}, {"benign": [{"text": "no image"}]}):
        with pytest.raises(DataError if "benign" in options else ArgumentError):
            SpectrumFigureCallback(**options)
    monkeypatch.setattr(spectrum_figure, "sharded_weights", lambda: True)
    with pytest.raises(ArgumentError, match="sharded"):
        plain(figures()).train()
