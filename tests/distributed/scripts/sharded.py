"""Training with weights sharded by FSDP2, on the CPU; run by ``two_ranks.py``.

accelerate drives FSDP on accelerators alone, though torch shards on the CPU as well: here it is told otherwise.
"""

from contextlib import contextmanager
from unittest import mock

import transformers as hf
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from hf_immunize.errors import ArgumentError


@contextmanager
def fsdp_on_cpu():
    """Within, accelerate shards on the CPU too."""
    plain = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    forget()
    with mock.patch.object(AcceleratorState, "__init__", with_plugin):
        yield
    forget()


def forget():
    """Begin with a new state, but the process group that there is."""
    PartialState._shared_state.clear()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def full(model):
    """Whole trainable weights, on every process."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().flatten().tolist()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def refusal(action):
    """The message of what an action raises."""
    try:
        action()
    except ArgumentError as error:
        return str(error)


def sharded(folder, trainer, vit, options):
    """Steps, an evaluation, a checkpoint, and going on from it."""
    layers = {"transformer_layer_cls_to_wrap": ["ViTLayer"]}
    options = options | {"fsdp": True, "fsdp_config": layers, "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1}
    with fsdp_on_cpu():
        done = trainer(folder / "sharded", vit(), **options)
        refused = [refusal(done.evaluate)]
        done.train()
        metrics = done.evaluate()
        done.save_model(str(folder / "sharded_model"))
        weights = full(done.model)
        is_sharded = any(hasattr(value, "full_tensor") for value in done.model.parameters())
        refused.append(refusal(lambda: trainer(folder / "refused", vit(), fsdp=True)))
        refused.append(refusal(lambda: trainer(folder / "refused", vit(), **options | {"fsdp_config": {}})))
        forget()
        again = trainer(folder / "sharded", vit(), **options)
        again.train(resume_from_checkpoint=str(folder / "sharded" / "checkpoint-1"))
        resumed = full(again.model)
    saved = hf.ViTForImageClassification.from_pretrained(folder / "sharded_model")
    return {
        "is_sharded": is_sharded,
        "weights": weights,
        "saved": {name: value.flatten().tolist() for name, value in saved.named_parameters() if name in weights},
        "resumed": resumed,
        "refused": refused,
        "metrics": {name: value for name, value in metrics.items() if "kappa" in name or "rir" in name},
    }
