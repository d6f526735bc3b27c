"""An image classifier with the Trainer, from images in folders, in parquet files or on the Hub.

Flags as of `transformers.TrainingArguments`, such as ``--num_train_epochs 3``, or one YAML or JSON file of the same
names:

    --model google/vit-base-patch16-224 --dataset ./pets --output_dir runs/pets
    arguments.yaml
"""

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, set_seed
from transformers import Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    """What to train, and on which images."""

    model: str = field(metadata={"help": "Folder or Hub id of the model to start from."})
    dataset: str = field(metadata={"help": "Folder or Hub id of labelled images, with splits train and test."})


def load_images(source, split, processor):
    """One split, whose images become pixel values when they are read."""

    def prepare(rows):
        images = [image.convert("RGB") for image in rows.pop("image")]
        return {**rows, **processor(images, return_tensors="pt")}

    return load_dataset(source, split=split).with_transform(prepare)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(words):
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    from_file = len(words) == 1 and words[0].endswith((".yaml", ".yml", ".json"))
    script, args = parser.parse_yaml_file(words[0]) if from_file else parser.parse_args_into_dataclasses(words)
    args.remove_unused_columns = False  # it would drop the images, which are no input of the model
    set_seed(args.seed)

    processor = AutoImageProcessor.from_pretrained(script.model)
    train = load_images(script.dataset, "train", processor)
    names = train.features["label"].names
    model = AutoModelForImageClassification.from_pretrained(
        script.model,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # another number of classes gets a new head
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=load_images(script.dataset, "test", processor),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.accelerator.end_training()  # of several processes, a group that is not destroyed can abort the exit
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
