"""What two processes do whose metrics differ; run by ``two_ranks.py``."""

import torch
import transformers as hf
from matplotlib.figure import Figure

from hf_immunize import BenignUtilityCallback, SpectrumFigureCallback, TargetRIRCallback


def rows(count, seed):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]


def run(folder, *callbacks, rir=None):
    """A run whose accuracy falls below the limit at step 3, but on the second process alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2))

    def scripted(prediction):
        step = trainer.state.global_step
        falls = step >= 3 and trainer.args.process_index == 1
        return {"accuracy": 0.5 if falls else 0.9, "log10_rir": float(falls and 4.0)}

    args = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    data = {"train_dataset": rows(40, 1), "eval_dataset": rows(8, 2)}
    trainer = hf.Trainer(model, args, **data, compute_metrics=scripted, callbacks=list(callbacks))
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {"step": trainer.state.global_step, "sum": float(weights.double().sum()), "rank": args.process_index}


def callbacks(folder):
    Figure.savefig = lambda figure, path, **options: path.write_bytes(b"")  # pixels take a second a figure
    figure = SpectrumFigureCallback(benign=rows(12, 3), harmful=rows(12, 4))
    return {
        "restore": run(folder / "restore", BenignUtilityCallback(action="restore"), figure),
        "target": run(folder / "target", TargetRIRCallback()),
    }
