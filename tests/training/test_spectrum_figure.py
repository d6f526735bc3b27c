"""Figures are written at every evaluation, of the right spectra, and training does not notice."""

import os
import random

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from hf_immunize import SpectrumFigureCallback
from hf_immunize.errors import ArgumentError, CheckpointError, DataError
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.training import spectrum_figure
from hf_immunize.training.evaluation import accuracy
from hf_immunize.vision.head import penultimate_features


@pytest.fixture
def plain(tiny, images, tmp_path):
    """Make a plain Trainer that evaluates after each of two steps."""

    def make(callback, folder="run", model=None, **options):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
        }
        args = hf.TrainingArguments(**(defaults | options))
        data = {"train_dataset": images(16, 1), "eval_dataset": images(8, 3)}
        each = [] if callback is None else [callback]
        model = model or tiny("vit", hidden_dropout_prob=0.2)
        return hf.Trainer(model, args, **data, compute_metrics=accuracy, callbacks=each)

    return make


@pytest.fixture
def figures(images):
    """Make the callback, with data of both sides."""

    def make(**options):
        given = {"benign": images(24, 5), "harmful": images(24, 6, labels=False)}
        return SpectrumFigureCallback(**(given | options))

    return make


@pytest.fixture
def unpainted(monkeypatch):
    """Leave out the pixels, which take most of a second a figure."""
    monkeypatch.setattr(spectrum_figure, "save_figure", lambda figure, path: path.write_bytes(b""))


@pytest.fixture
def spectra(monkeypatch, unpainted):
    """The spectra of each figure that is drawn."""
    drawn = []
    draw = spectrum_figure.draw_spectra
    monkeypatch.setattr(spectrum_figure, "draw_spectra", lambda axes, each: (drawn.append(each), draw(axes, each)))
    return drawn


@pytest.fixture
def warnings(monkeypatch):
    """What the callback warns of."""
    said = []
    monkeypatch.setattr(spectrum_figure.logger, "warning", lambda message: said.append(message))
    monkeypatch.setattr(spectrum_figure.logger, "warning_once", lambda message: said.append(message))
    return said


def sigmas(model, rows):
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        return torch.linalg.svdvals(penultimate_features(model.eval(), pixels).double())


def logged(run, name):
    return {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}


def test_a_figure_is_written_and_can_be_opened(plain, figures, tmp_path):
    plain(figures()).train()
    with Image.open(tmp_path / "run" / "spectrum" / "spectrum.png") as image:
        assert image.format == "PNG" and image.width > image.height


def test_figures_of_all_steps_are_kept_if_asked_for(plain, figures, unpainted, tmp_path):
    plain(figures(output_dir=str(tmp_path / "here"), keep_all=True)).train()
    steps = [f"spectrum-{step:06d}.png" for step in (1, 2)]
    assert sorted(os.listdir(tmp_path / "here")) == [*steps, "starting_spectra.safetensors"]


def test_the_spectra_are_those_of_the_starting_and_of_the_present_weights(plain, figures, images, spectra):
    run = plain(figures())
    before = sigmas(run.model, images(24, 5))
    run.train()
    after = sigmas(run.model, images(24, 5))
    torch.testing.assert_close(spectra[-1]["benign", "before"], before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spectra[-1]["benign", "after"], after, rtol=1e-4, atol=1e-5)


def test_what_was_measured_is_in_the_log_history(plain, figures, images, unpainted):
    run = plain(figures())
    run.train()
    pixels = torch.stack([row["pixel_values"] for row in images(24, 6)])
    with torch.no_grad():
        expected = feature_conditioning(penultimate_features(run.model.eval(), pixels)).log10_kappa
    assert logged(run, "spectrum_harmful_log10_kappa")[2] == pytest.approx(expected, rel=1e-4)
    assert set(logged(run, "spectrum_log10_rir")) == {1, 2}


def test_harmful_images_alone_will_do(plain, figures, spectra):
    run = plain(figures(benign=None))
    run.train()
    assert set(spectra[-1]) == {("harmful", "before"), ("harmful", "after")}
    assert "spectrum_harmful_log10_kappa" in run.state.log_history[-2]


def test_without_images_the_curves_are_drawn_alone(plain, spectra, tmp_path):
    plain(SpectrumFigureCallback()).train()
    assert spectra == [] and os.listdir(tmp_path / "run" / "spectrum") == ["spectrum.png"]


def test_an_immunizing_run_has_its_figure(trainer, figures, spectra, tmp_path):
    run = trainer(eval_strategy="steps", eval_steps=1, callbacks=[figures()])
    run.train()
    assert (tmp_path / "run" / "spectrum" / "spectrum.png").is_file() and len(spectra) == 2


def test_several_evaluation_sets_are_measured_once(plain, figures, images, monkeypatch, unpainted):
    run = plain(figures(), max_steps=1)
    run.eval_dataset = {"a": images(4, 7), "b": images(4, 8)}
    times = []
    extract = spectrum_figure.extract
    monkeypatch.setattr(spectrum_figure, "extract", lambda *args, **rest: (times.append(1), extract(*args, **rest))[1])
    run.train()
    assert len(times) == 4  # two sides, before and after


def test_an_evaluation_before_training_shows_the_starting_spectra(plain, figures, spectra):
    plain(figures()).evaluate()
    assert set(spectra[-1]) == {("benign", "before"), ("harmful", "before")}


def test_images_are_processed_by_the_trainers_processor(plain, spectra):
    shades = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    run = plain(SpectrumFigureCallback(benign=[{"image": Image.fromarray(shade)} for shade in shades]), max_steps=1)
    run.callback_handler.processing_class = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    run.train()
    assert len(spectra[-1]["benign", "after"]) == 8


def test_a_sample_is_drawn_from_all_over_the_set(images):
    rows = images(100)
    (chosen,) = SpectrumFigureCallback(benign=rows, max_samples=20)._data.values()
    assert len(chosen) == 20 and max(chosen.indices) > 60 and {i % 2 for i in chosen.indices} == {0, 1}


# ---- training does not notice ----


class Noisy(torch.utils.data.Dataset):
    """Images with augmentations of every generator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(())
        return {"pixel_values": self.rows[index]["pixel_values"] + noise}


def test_training_goes_on_as_if_nothing_had_been_drawn(plain, figures, images, unpainted):
    weights = []
    for callback in (None, figures(benign=Noisy(images(24, 5)))):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        run = plain(callback, folder=f"run-{callback is None}")
        run.train_dataset = [{"labels": i % 2} | row for i, row in enumerate(images(16, 1))]
        run.train()
        weights.append((dict(run.model.state_dict()), random.random(), np.random.rand(), torch.rand(())))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_modules_keep_their_modes(plain, figures, unpainted):
    run = plain(figures())
    run.model.train()
    run.model.vit.embeddings.eval()
    before = {name: module.training for name, module in run.model.named_modules()}
    run.callback_handler.on_evaluate(run.args, run.state, run.control, {})
    assert {name: module.training for name, module in run.model.named_modules()} == before


def test_under_mixed_precision_the_spectra_are_those_of_full_precision(plain, figures, images, spectra):
    run = plain(figures(), bf16=True, max_steps=1)
    run.train()
    model = type(run.model)(run.model.config)
    model.load_state_dict(run.model.state_dict())
    torch.testing.assert_close(spectra[-1]["harmful", "after"], sigmas(model, images(24, 6)), rtol=1e-4, atol=1e-5)


# ---- interrupted and resumed ----


@pytest.mark.parametrize("given_back", [False, True])
def test_a_resumed_run_keeps_the_starting_spectra(given_back, plain, figures, images, spectra, tiny, tmp_path):
    # Not a ViT, whose blocks a plain Trainer does not resume.
    run = plain(figures(), model=tiny("resnet"))
    before = sigmas(run.model, images(24, 5))
    run.train()
    spectra.clear()
    resumed = plain(figures(), model=tiny("resnet"), restore_callback_states_from_checkpoint=given_back)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(spectra) == 1
    torch.testing.assert_close(spectra[-1]["benign", "before"], before, rtol=1e-4, atol=1e-5)
    assert logged(resumed, "spectrum_log10_rir") == pytest.approx(logged(run, "spectrum_log10_rir"), nan_ok=True)


def test_starting_spectra_of_other_images_are_left_out(plain, figures, images, spectra, warnings, tmp_path):
    plain(figures()).train()
    resumed = plain(figures(benign=images(24, 9)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert set(spectra[-1]) == {("benign", "after"), ("harmful", "before"), ("harmful", "after")}
    assert "are of other images" in warnings[-1] and "spectrum_log10_rir" not in resumed.state.log_history[-2]


def test_it_is_said_when_the_starting_spectra_are_lost(plain, figures, spectra, warnings, tmp_path):
    plain(figures()).train()
    (tmp_path / "run" / "spectrum" / "starting_spectra.safetensors").unlink()
    plain(figures()).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert set(spectra[-1]) == {("benign", "after"), ("harmful", "after")} and "found no such file" in warnings[0]


def test_a_new_run_in_the_same_folder_has_starting_spectra_of_its_own(plain, figures, images, spectra):
    plain(figures()).train()
    second = plain(figures())
    second.model.vit.layernorm.bias.data.mul_(3.0)
    before = sigmas(second.model, images(24, 5))
    second.train()
    torch.testing.assert_close(spectra[-1]["benign", "before"], before, rtol=1e-4, atol=1e-5)


# ---- what goes wrong ----


def test_a_figure_that_cannot_be_written_does_not_end_the_run(plain, figures, warnings, monkeypatch, tmp_path):
    def full(figure, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spectrum_figure, "save_figure", full)
    run = plain(figures())
    run.train()
    assert run.state.global_step == 2 and "Passing over the figure of step 1" in warnings[0]
    assert os.listdir(tmp_path / "run" / "spectrum") == ["starting_spectra.safetensors"]


def test_starting_spectra_that_cannot_be_written_are_an_error_before_the_first_step(plain, figures, tmp_path):
    (tmp_path / "file").write_text("")
    run = plain(figures(output_dir=str(tmp_path / "file" / "below")))
    with pytest.raises(CheckpointError, match="Expected to write"):
        run.train()
    assert run.state.global_step == 0


def test_features_that_are_lost_cost_the_spectra_and_not_the_run(plain, figures, warnings, spectra):
    class Kill(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for parameter in model.vit.layernorm.parameters():
                parameter.data.fill_(float("nan"))

    run = plain(figures())
    run.add_callback(Kill())
    run.train()
    assert run.state.global_step == 2 and spectra == [] and "No spectra in the figure of step 1" in warnings[0]


@pytest.mark.parametrize("options", [{"max_samples": 0}, {"batch_size": 0}])
def test_impossible_numbers_are_refused_at_once(options):
    with pytest.raises(ArgumentError, match="at least 1"):
        SpectrumFigureCallback(**options)


@pytest.mark.parametrize("rows", [[], [{"text": "no image"}]])
def test_data_without_images_are_refused_at_once(rows):
    with pytest.raises(DataError):
        SpectrumFigureCallback(benign=rows)


def test_images_are_refused_where_weights_are_sharded(plain, figures, monkeypatch):
    monkeypatch.setattr(spectrum_figure, "sharded_weights", lambda: True)
    with pytest.raises(ArgumentError, match="Leave benign= and harmful= out"):
        plain(figures()).train()
