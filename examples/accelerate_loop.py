"""Immunization in a loop of your own, with accelerate and without a Trainer.

    accelerate launch examples/accelerate_loop.py --model runs/pets --benign ./pets --harmful ./weapons \
        --output_dir runs/immunized

`ImmunizationStep` turns a pair of batches into a loss; all else is yours. The model is one that has learned the benign
task already; labels are not needed, since by default the benign loss is distillation of the model as it was.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_immunize import FeatureFactor, ImmunizationStep, Method, relative_immunization_ratio
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.pairs import BatchSizes, PairedCollator, PairedDataset
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.features.extract import extract
from hf_immunize.vision.scope import select_trainable


def parse(words):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--benign", required=True, help="Folder, parquet file or Hub id of images with a test split.")
    parser.add_argument("--harmful", required=True, help="Images of the harmful task, likewise.")
    parser.add_argument("--output_dir", required=True, help="Where the checkpoint and metrics.json go.")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32, help="Images of each side, process and micro-batch.")
    parser.add_argument("--accumulation", type=int, default=1, help="Micro-batches of an optimizer step.")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="Needed for several processes on a machine without a GPU.")
    return parser.parse_args(words)


def load_rows(source, split):
    return ImageRows(load_image_dataset(source, split), f"{source} ({split})", "image")


def measure(model, rows, processor, accelerator):
    """The factor of a data set's features, from which κ and RIR are read; each process folds its share."""
    own, whole = FeatureFactor(), FeatureFactor()
    with accelerator.split_between_processes(list(range(len(rows)))) as share:
        for batch in extract(model, torch.utils.data.Subset(rows, share), processor, progress=False):
            own.update(batch.features.cpu())
    for state in gather_object([own.state_dict()] if share else []):
        whole.merge(FeatureFactor.from_state_dict(state))
    return whole


def main(words):
    options = parse(words)
    set_seed(options.seed)
    accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=options.accumulation)
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModelForImageClassification.from_pretrained(options.model).to(accelerator.device)

    # What is trainable, and what is minimized. The step keeps the model as it is now, to distil from.
    moving = select_trainable(model, "last_stage")
    step = ImmunizationStep(model, Method(), moving=moving)

    tests = {side: load_rows(getattr(options, side), "test") for side in ("benign", "harmful")}
    before = {side: measure(model, rows, processor, accelerator) for side, rows in tests.items()}

    sizes = BatchSizes(benign=options.batch_size, harmful=options.batch_size)
    pairs = PairedDataset(load_rows(options.benign, "train"), load_rows(options.harmful, "train"), batch_sizes=sizes)
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=options.batch_size,
        sampler=pairs.make_sampler(options.seed),
        collate_fn=PairedCollator(ImageCollator(processor)),
        drop_last=True,  # κ of a short batch is another quantity
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=options.learning_rate
    )
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if len(loader) == 0:
        sys.exit(
            f"Expected a full batch of {options.batch_size}, found {len(pairs)} benign images. Lower --batch_size."
        )

    done = 0  # optimizer steps; the same for all micro-batches of one
    for epoch in range(options.epochs):
        pairs.set_epoch(epoch)
        wrapped.train()
        for batch in loader:
            with accelerator.accumulate(wrapped):
                result = step(wrapped, batch, done)
                accelerator.backward(result.loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                logged = {name: round(float(value.detach()), 4) for name, value in result.logged.items()}
                accelerator.print(f"step {done}: {logged}")

    model = accelerator.unwrap_model(wrapped)
    after = {side: measure(model, rows, processor, accelerator) for side, rows in tests.items()}
    ratio = relative_immunization_ratio(
        harmful=after["harmful"],
        harmful_reference=before["harmful"],
        benign=after["benign"],
        benign_reference=before["benign"],
    )
    for side in tests:
        now = after[side].conditioning(before[side].conditioning())
        accelerator.print(f"{side}: {before[side].conditioning()} before, {now} now")
    accelerator.print(f"{ratio}. This is of probing by gradient descent; no attack was made.")
    metrics = {"steps": done, "processes": accelerator.num_processes}
    metrics |= {"rir": ratio.rir, "rir_bound": ratio.bound, **{f"last_{k}": v for k, v in logged.items()}}
    if accelerator.is_main_process:
        model.save_pretrained(options.output_dir)
        processor.save_pretrained(options.output_dir)
        Path(options.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
