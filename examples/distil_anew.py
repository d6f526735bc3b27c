"""A fresh network that learns from your classifier on benign images alone: against fine-tuning, if you can afford it.

It never sees a harmful image, and so lacks what your classifier learned of them; what the benign ones teach stays
(docs/threat-model.md says how much each is). It needs the images and the recipe that trained your classifier from
random weights, and as long; the accuracy of one that began from pretrained weights it will seldom reach. Whoever has
the old weights needs no others: this is for those that are not public. Flags as of `transformers.TrainingArguments`:

    python examples/distil_anew.py --model ./my-classifier --dataset ./pets --output_dir runs/anew \
        --num_train_epochs 60 --learning_rate 1e-3 --lr_scheduler_type cosine
    hf-immunize audit runs/anew --reference ./my-classifier --benign ./pets --harmful ./weapons \
        --attackers ridge,gd_line_search,last_stage,whole_network,lora_r8,ridge_start,every_block
"""

import random
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_immunize.audit.names import signed
from hf_immunize.audit.statistics import paired_utility
from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.sources import divide
from hf_immunize.training.checkpoints import load_weights


@dataclass
class ScriptArguments:
    """What to learn from, and on which images."""

    model: str = field(metadata={"help": "Folder or Hub id of the classifier to learn from."})
    dataset: str = field(metadata={"help": "Folder or Hub id of its benign images."})
    share: float = field(default=0.5, metadata={"help": "Of the loss that its outputs have; labels have the rest."})


class Student(Trainer):
    """Learns labels and, so large a share of its loss, a teacher's softened probabilities (arXiv:1503.02531)."""

    temperature = 2.0

    def __init__(self, *given, teacher, share, **options):
        super().__init__(*given, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated, it is to be divided
        self.teacher, self.share = teacher.eval().to(self.args.device), share

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        """``(1 − s)·CE(labels) + s·T²·KL(teacher ‖ student)`` of softmax(logits/T), mean over images."""
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            taught = self.teacher(pixel_values=inputs["pixel_values"]).logits
        said, wanted = (F.log_softmax(one / self.temperature, dim=1) for one in (outputs.logits, taught))
        apart = F.kl_div(said, wanted, log_target=True, reduction="batchmean") * self.temperature**2
        named = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=self.args.label_smoothing_factor)
        loss = (1 - self.share) * named + self.share * apart
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.model, resume_from_checkpoint)  # the Trainer's own passes over the names of a ViT's

    def _load_best_model(self):
        load_weights(self.model, self.state.best_model_checkpoint)


def mirrored_and_shifted(image):
    """At random, by up to an eighth of its sides: a fresh network needs more views than there are images."""
    across, down = (random.randint(-(side // 8), side // 8) for side in image.size)
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, across, 0, 1, down))


class Moved(Dataset):
    """Rows with their images moved, anew each time they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {**self.rows[index], "image": mirrored_and_shifted(self.rows[index]["image"])}


def main(words):
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses(words)
    if not 0 <= script.share <= 1:
        raise SystemExit(f"Expected a --share of the loss from 0 to 1, found {script.share}.")
    args.remove_unused_columns = False  # it would drop the images, which are no input of the model
    processor = AutoImageProcessor.from_pretrained(script.model)
    teacher = AutoModelForImageClassification.from_pretrained(script.model, dtype=torch.float32)
    parts = divide(script.dataset, name="benign images")  # held out where there is no test split, as an audit does it
    image, label = find_columns(parts.train)
    names, known = parts.train.features[label].names, [teacher.config.id2label[i] for i in range(teacher.num_labels)]
    if names != known:
        raise SystemExit(
            f"Expected the model's classes {known} in {script.dataset}, found {names}. Rename the folders."
        )
    train, test = (ImageRows(part, "benign images", image, label) for part in (parts.train, parts.test))

    set_seed(args.seed)
    student = AutoModelForImageClassification.from_config(teacher.config, dtype=torch.float32)
    options = {"data_collator": ImageCollator(processor), "processing_class": processor, "eval_dataset": test}
    trainer = Student(student, args, teacher=teacher, share=script.share, train_dataset=Moved(train), **options)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    found = [one.predict(test, metric_key_prefix="eval") for one in (trainer, Trainer(teacher, args, **options))]
    hits = [torch.as_tensor(one.predictions.argmax(-1) == one.label_ids) for one in found]
    benign = paired_utility(*hits)
    metrics = {**found[0].metrics, "eval_accuracy": benign.immunized, "eval_start_accuracy": benign.reference}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        low, high = benign.interval
        interval = f"{signed(low)} to {signed(high)}, {benign.size} images"
        print(f"Benign accuracy: {signed(benign.difference)} points ({interval}).")
        if high < 0:
            print("That is less than it learned from: train for more epochs, or by the recipe that trained that one.")
        else:
            print("What it no longer gives an attacker, hf-immunize audit says.")
    trainer.accelerator.end_training()  # of several processes, a group that is not destroyed can abort the exit
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
