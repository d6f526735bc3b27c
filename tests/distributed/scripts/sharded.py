"""Training with weights sharded by FSDP2, on the CPU; run by ``two_ranks.py``.

accelerate drives FSDP on accelerators alone, though torch shards on the CPU as well: here it is told otherwise.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from hf_immunize.cli.train import run_train
from hf_immunize.errors import ArgumentError, NonFiniteError
from hf_immunize.files import _own_part


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


def refusal(action):
    """The message of what an action raises."""
    try:
        action()
    except (ArgumentError, NonFiniteError) as error:
        return str(error)


def through(folder, trainer, vit, options):
    """Evaluation, steps, an evaluation, a checkpoint, a push, and going on from one in the middle; saves both models.

    At last all weights are lost, and saved again.
    """
    options = options | {"save_strategy": "steps", "save_steps": 2}
    done = trainer(folder / "run", vit(), **options, hub_model_id=f"tester/{folder.name}")
    before = done.evaluate()
    done.train()
    metrics = done.evaluate()
    done.save_model(str(folder / "saved"))
    done.push_to_hub()
    in_parts = any(hasattr(value, "full_tensor") or hasattr(value, "ds_id") for value in done.model.parameters())
    forget()
    again = trainer(folder / "run", vit(), **options)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    resumed = again.evaluate()
    again.save_model(str(folder / "resumed"))
    with torch.no_grad():
        for value in again.model.parameters():
            _own_part(value).fill_(torch.nan)
    return {
        "in_parts": in_parts,
        "before": before,
        "metrics": metrics,
        "started": again.starting_metrics,
        "resumed": resumed,
        "lost": refusal(lambda: again.save_model(str(folder / "lost"))),
    }


def sharded(folder, trainer, vit, options):
    """All of it with FSDP2, and what is refused."""
    embeddings = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["ViTEmbeddings"]}}
    with fsdp_on_cpu():
        found = through(folder / "fsdp2", trainer, vit, options | {"fsdp": True})
        return found | {"refused": refusal(lambda: trainer(folder / "refused", vit(), **options | embeddings))}


def command(images, output, *more):
    """Words behind `hf-immunize train`."""
    words = f"""--model {images}/model --benign {images}/pets --harmful {images}/weapons --output_dir {output}
        --max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --report_to none --use_cpu
        --ddp_backend gloo --optim sgd --disable_tqdm True"""
    return [*words.split(), *map(str, more)]


def commands(folder, images):
    """`hf-immunize train` on weights that are whole, and on sharded ones, by as many processes."""
    run_train(command(images, folder / "whole_weights"))
    with fsdp_on_cpu():
        run_train(command(images, folder / "parts", "--fsdp", "full_shard"))
