"""What two processes do whose metrics differ; run by ``two_ranks.py``."""

import torch
import transformers as hf
from matplotlib.figure import Figure

from hf_immunize import BenignUtilityCallback, SpectrumFigureCallback, TargetRIRCallback


def run(folder, plain, vit, rows, *callbacks):
    """A run whose accuracy falls below the limit at step 3, but on the second process alone."""

    def scripted(prediction):
        step = trainer.state.global_step
        falls = step >= 3 and trainer.args.process_index == 1
        return {"accuracy": 0.5 if falls else 0.9, "log10_rir": float(falls and 4.0)}

    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    args = plain(folder, max_steps=5, per_device_train_batch_size=4, eval_on_start=True, **each)
    data = {"train_dataset": rows(40, 1), "eval_dataset": rows(8, 2)}
    trainer = hf.Trainer(vit(), args, **data, compute_metrics=scripted, callbacks=list(callbacks))
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {"step": trainer.state.global_step, "sum": float(weights.double().sum()), "rank": args.process_index}


def callbacks(folder, *made):
    Figure.savefig = lambda figure, path, **options: path.write_bytes(b"")  # pixels take a second a figure
    rows = made[-1]
    figure = SpectrumFigureCallback(benign=rows(12, 3), harmful=rows(12, 4))
    return {
        "restore": run(folder / "restore", *made, BenignUtilityCallback(action="restore"), figure),
        "target": run(folder / "target", *made, TargetRIRCallback()),
    }
