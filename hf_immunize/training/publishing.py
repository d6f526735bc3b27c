"""What a Trainer tells the world of its model: the card, the push, and the pushes during training."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_immunize.errors import HubError, ImmunizationError
from hf_immunize.files import staged_directory
from hf_immunize.hub.card import CardOptions, write_card
from hf_immunize.hub.collect import describe_base_model, public_name
from hf_immunize.hub.outcomes import name_outcome, retried
from hf_immunize.hub.outgoing import check_private, refuse_links
from hf_immunize.hub.push import PushResult, files_to_push, push
from hf_immunize.hub.record import read_record
from hf_immunize.hub.validation import RECORD_NAME
from hf_immunize.hub.whole import check_loads_back
from hf_immunize.training.evidence import bare_record, make_record
from hf_immunize.training.saving import STATE
from hf_immunize.vision.adapters import without_wrapper


logger = logging.get_logger(__name__)
# What a run resumes from, beside the model and the Trainer's state. All else in a checkpoint's folder stays:
# training_args.bin, which holds local paths and the token, the list of files, which is of the state with its local
# paths, what callbacks and people put there, unfinished folders.
_RESUMED_FROM = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|immunization_(state|step)\.safetensors"
)


def create_model_card(
    trainer: Any,
    *,
    language: Any = None,
    license: str | None = None,
    tags: Any = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset_tags: Any = None,
    dataset: Any = None,
) -> None:
    """Write the card into the output folder, from the record of the Trainer's weights.

    Args:
        trainer: An `ImmunizationTrainer`.
        language: As the Trainer's.
        license: Likewise.
        tags: Likewise.
        model_name: Likewise.
        finetuned_from: Likewise.
        dataset_tags: Ids of datasets on the Hub.
        dataset: What to call the benign data.
    """
    record = make_record(trainer) or bare_record(trainer)
    if finetuned_from:
        record.base_model = describe_base_model(finetuned_from)
    if dataset and record.benign is not None:
        record.benign.name = ", ".join(public_name(name) for name in _listed(dataset))
    options = CardOptions(
        repo_id=trainer.hub_model_id,
        model_name=model_name,
        license=license,
        language=language,
        tags=_listed(tags),
        datasets=_listed(dataset_tags),
    )
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    write_card(trainer.args.output_dir, record, options)


def push_to_hub(
    trainer: Any,
    commit_message: str | None,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    **card: Any,
) -> PushResult | Future[PushResult] | None:
    """Save, write the card, and push what is allowed to leave.

    Args:
        trainer: An `ImmunizationTrainer`.
        commit_message: As the Trainer's.
        blocking: Likewise.
        token: Likewise.
        revision: Likewise.
        private: Likewise.
        **card: For `create_model_card`.

    Returns:
        What was pushed, or its future; None on other processes than the first.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token if token is not None else args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    card["tags"] = [*_listed(card.get("tags")), *_listed(getattr(trainer.model, "model_tags", None))]
    trainer.create_model_card(**card)
    trainer._finish_current_push()
    call = _push_call(trainer, commit_message or "End of training", token, revision, private)
    return call() if blocking else HfApi().run_as_future(call)


def push_from_checkpoint(trainer: Any, checkpoint: str) -> None:
    """Push in the midst of training, in the background. What goes wrong is said, and training goes on.

    With ``hub_strategy`` "checkpoint" or "all_checkpoints", what is needed to resume goes too, and nothing else of the
    checkpoint's folder; the local path in the Trainer's state does not, and links, tokens and paths are refused.

    Args:
        trainer: An `ImmunizationTrainer`.
        checkpoint: Folder of the checkpoint that was just written.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress
    if not args.hub_always_push and running is not None and not running.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    try:
        _copy_model(checkpoint, args.output_dir)
        trainer.create_model_card()
        step = trainer.state.global_step
        calls = [_push_call(trainer, f"Training in progress, step {step}", args.hub_token, args.hub_revision, None)]
    except (ImmunizationError, OSError) as error:
        logger.warning(f"The checkpoint {checkpoint} is saved, but was not pushed: {error}")
        return
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        path = "last-checkpoint" if last else Path(checkpoint).name
        calls.append(partial(_push_checkpoint_files, trainer, checkpoint, path, step))
    jobs = [HfApi().run_as_future(call) for call in calls]
    for job in jobs:
        job.add_done_callback(partial(_report, checkpoint))
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        running.jobs.extend(jobs)


def _push_call(trainer: Any, message: str, token: str | None, revision: str | None, private: bool | None) -> Any:
    folder, code = trainer.args.output_dir, type(without_wrapper(trainer.model)).__module__
    # Here, since a model that is loaded in the background would disturb the training.
    record = read_record(folder) if (Path(folder) / RECORD_NAME).is_file() else None
    check_loads_back(folder, files_to_push(folder, record), token, code.startswith("transformers_modules"))
    return partial(
        push,
        folder,
        trainer.hub_model_id,
        private=private if private is not None else trainer.args.hub_private_repo,
        revision=revision if revision is not None else trainer.args.hub_revision,
        token=token,
        commit_message=message,
        require_record=False,
        refresh_card=False,
        load_back=False,
    )


def _push_checkpoint_files(trainer: Any, checkpoint: str, path: str, step: int) -> Any:
    root = Path(checkpoint)
    api = HfApi(token=trainer.args.hub_token, library_name="hf_immunize")
    record = read_record(root) if (root / RECORD_NAME).is_file() else None
    resumed = [name for name in sorted(os.listdir(root)) if _RESUMED_FROM.fullmatch(name)]
    refuse_links(root, [*resumed, STATE])
    names = sorted({*files_to_push(root, record), *resumed})
    check_private(root, names, trainer.args.hub_token)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / STATE
        told.write_text(_without_path(root / STATE), encoding="utf-8")
        check_private(folder, [STATE], trainer.args.hub_token)
        state = told.read_bytes()

    def attempt() -> Any:
        operations = [CommitOperationAdd(f"{path}/{name}", str(root / name)) for name in names]
        operations.append(CommitOperationAdd(f"{path}/{STATE}", state))
        message = f"Training in progress, step {step}, checkpoint"
        return api.create_commit(
            trainer.hub_model_id, operations, commit_message=message, revision=trainer.args.hub_revision
        )

    return retried(attempt, f"push of a checkpoint to {trainer.hub_model_id}")


def _without_path(file: Path) -> str:
    """The Trainer's state without the local path in it."""
    state = json.loads(file.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    return json.dumps(state, indent=2)


def _copy_model(checkpoint: str, output_dir: str) -> None:
    source, target = Path(checkpoint), Path(output_dir)
    record = read_record(source) if (source / RECORD_NAME).is_file() else None
    names = files_to_push(source, record)
    with staged_directory(target) as staging:
        for name in names:
            shutil.copyfile(source / name, staging / name)
    stale = {RECORD_NAME, "model.safetensors.index.json", *(file.name for file in target.glob("model*.safetensors"))}
    for name in stale - set(names):
        (target / name).unlink(missing_ok=True)


def _report(checkpoint: str, job: Future[Any]) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        named = error if isinstance(error, ImmunizationError) else name_outcome(error, "push") or error
        kind = f" ({named.outcome})" if isinstance(named, HubError) else ""
        logger.warning(f"The checkpoint {Path(checkpoint).name} is saved, but was not pushed{kind}: {named}")


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
