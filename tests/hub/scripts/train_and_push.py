"""Train, immunize and push a tiny ViT with the real client; run by tests/hub/test_end_to_end.py."""

import json
import sys
from pathlib import Path

import datasets
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_immunize import ImmunizationArguments, ImmunizationTrainer


def main():
    folder, repo = Path(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    model = ViTForImageClassification(config)
    model.vit.layernorm.bias.data.normal_()
    model.save_pretrained(folder / "base")
    benign, harmful = (datasets.load_from_disk(str(folder / name)) for name in ("benign", "harmful"))
    trainer = ImmunizationTrainer(
        ViTForImageClassification.from_pretrained(folder / "base"),
        ImmunizationArguments(
            str(folder / "run"),
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_log10_rir",
            greater_is_better=True,
            push_to_hub=True,
            hub_model_id=repo,
            hub_strategy="end",
            objective="kappa",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=benign,
        harmful_dataset=harmful,
        eval_dataset=benign,
        harmful_eval_dataset=harmful,
        processing_class=ViTImageProcessorPil(size={"height": 8, "width": 8}),
    )
    trainer.evaluate()
    trainer.train()
    pushes = [trainer.push_to_hub(), trainer.push_to_hub()]
    print(json.dumps({"changed": [push.changed for push in pushes], "best": trainer.state.best_metric}))


if __name__ == "__main__":
    main()
