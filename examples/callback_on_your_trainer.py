"""Immunization beside a Trainer that is a subclass of someone else's: `ImmunizationCallback`.

The Trainer below has a loss of its own. It stays as it is, and keeps the benign task; the callback adds the gradient
of the regularizers, and of distillation, to each of its steps. `SpectrumFigureCallback` measures κ of both tasks.

    python examples/callback_on_your_trainer.py --model runs/pets --benign ./pets --harmful ./weapons \
        --output_dir runs/immunized

The model is one that has learned the benign task already. Flags as of `transformers.TrainingArguments`, or one YAML
or JSON file of the same names.
"""

import sys
from dataclasses import dataclass, field

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_immunize import ImmunizationCallback, SpectrumFigureCallback
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.vision.scope import select_trainable


class FocalTrainer(Trainer):
    """Someone else's Trainer: images that are classified well already count less (Lin et al., ICCV 2017)."""

    # Of a mean, the Trainer would take the gradient as many times too large as it accumulates steps.
    loss_is_scaled_for_ga = False
    gamma = 2.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over images of ``-(1 - p)^γ log p``, p being the probability of the true class."""
        outputs = model(pixel_values=inputs["pixel_values"])
        log_p = outputs.logits.log_softmax(-1).gather(1, inputs["labels"].unsqueeze(1))
        loss = -((1 - log_p.exp()) ** self.gamma * log_p).mean()
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


@dataclass
class ScriptArguments:
    """What to immunize, and on which images."""

    model: str = field(metadata={"help": "Folder or Hub id of a model that has learned the benign task."})
    benign: str = field(metadata={"help": "Folder, parquet file or Hub id of labelled images with a test split."})
    harmful: str = field(metadata={"help": "Images of the harmful task, likewise; labels are not needed."})


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(words):
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    from_file = len(words) == 1 and words[0].endswith((".yaml", ".yml", ".json"))
    script, args = parser.parse_yaml_file(words[0]) if from_file else parser.parse_args_into_dataclasses(words)
    args.remove_unused_columns = False
    set_seed(args.seed)

    processor = AutoImageProcessor.from_pretrained(script.model)
    model = AutoModelForImageClassification.from_pretrained(script.model)
    select_trainable(model, "last_stage")  # the callback trains what requires a gradient

    train, test = (
        ImageRows(load_image_dataset(script.benign, split), f"benign {split}", "image", "label")
        for split in ("train", "test")
    )
    harmful, harmful_test = (load_image_dataset(script.harmful, split) for split in ("train", "test"))
    trainer = FocalTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=ImageCollator(processor),
        processing_class=processor,
        compute_metrics=accuracy,
        callbacks=[
            ImmunizationCallback(harmful, processing_class=processor),
            SpectrumFigureCallback(benign=test, harmful=harmful_test),
        ],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    return trainer.state.log_history


if __name__ == "__main__":
    main(sys.argv[1:])
