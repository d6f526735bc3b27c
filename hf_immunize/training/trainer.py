"""`ImmunizationTrainer`: steps that see benign and harmful images, evaluations that report κ and RIR."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator, StreamedRows
from hf_immunize.data.pairs import PairedCollator, PairedDataset, degenerate_sides
from hf_immunize.errors import ArgumentError, CheckpointError, DataError
from hf_immunize.features.cache import TrunkCache, open_or_write
from hf_immunize.features.extract import Measurement, of_side, run_batches, spectral_metrics
from hf_immunize.features.ranks import launched
from hf_immunize.features.trunk import TrunkSplit, split_trunk
from hf_immunize.files import check_writable, remove_leftovers, staged_directory
from hf_immunize.hub.load import CARD_NAME, named_outcomes
from hf_immunize.hub.record import RECORD_NAME
from hf_immunize.training import checkpoints, checks, evaluation, record
from hf_immunize.training.arguments import TRUNK_OBSTACLES, ImmunizationArguments, Method
from hf_immunize.training.choice import draw_sample
from hf_immunize.training.distillation import StartedRows
from hf_immunize.training.step import ImmunizationStep, RunningMeans
from hf_immunize.vision.head import HeadInput, without_wrapper
from hf_immunize.vision.loading import describe_adapter, difference_on_loading, plain_names
from hf_immunize.vision.scope import select_trainable


logger = logging.get_logger(__name__)


# Of starting features and logits that each process keeps in memory: 2 GiB. Of more, they are computed in every step.
_MOST_VALUES = 2**29


class _Guard(TrainerCallback):
    """Refuses an optimizer step of a subclass that goes past the method's loss, before it changes anything."""

    def __init__(self, trainer: ImmunizationTrainer) -> None:
        self._trainer, self._calls = trainer, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._calls = self._trainer._step.calls

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._step.calls == self._calls:
            raise ArgumentError(
                f"Expected {type(self._trainer).__name__} to use this Trainer's loss, found that it does not. In its "
                "compute_loss, call super().compute_loss(model, inputs, return_outputs=True) and add to the loss; the "
                "benign images are inputs['benign']."
            )


class ImmunizationTrainer(Trainer):
    r"""A `transformers.Trainer` that immunizes an image classifier against a harmful task.

    Minimizes ``benign loss + Σ benign_weight·R_benign(Z_P) + Σ harmful_weight·R_harmful(Z_H)`` with Z the classifier's
    inputs: with ``objective="kappa"``, Eq. 9 of Zheng et al. 2025 (arXiv:2505.23760). All else is the Trainer's.

    Weights of half precision are turned into float32, in which they are trained, measured and saved.

    Under gradient accumulation the mean of the micro-batches' regularizers is minimized, since κ is not additive; over
    processes the whole batch counts. Under FSDP2 and DeepSpeed each keeps a whole frozen copy of the starting model,
    and no κ is measured in half precision.

    Args:
        model: An image classifier with one linear head (`AutoModelForImageClassification`).
        args: `ImmunizationArguments`.
        train_dataset: Benign data: a `datasets.Dataset` with an image column, or any map-style dataset whose items
            hold ``pixel_values``; with labels, where ``benign_loss`` is "task" or "both". Streamed, it needs
            ``max_steps``.
        harmful_dataset: Harmful data, stored or streamed; labels are needed by ``objective="imma"`` alone.
        distillation_dataset: Any images, without labels, stored or streamed, on which the model shall stay what it was
            as well; the more varied, the better benign accuracy is kept.
        eval_dataset: Benign data with labels, stored or streamed; `eval_loss` and `eval_accuracy` are of these.
        harmful_eval_dataset: Harmful data on which κ and RIR are measured, stored or streamed.
        processing_class: Image processor that turns images into ``pixel_values``.
        data_collator: A collator of your own for either side; it then gets the datasets' own items.
        compute_metrics: Defaults to the accuracy.
        **kwargs: Anything else a Trainer takes.

    Raises:
        ArgumentError, DataError, HeadError, ScopeError: Before anything runs; each says what to do.
        NonFiniteError: In training, with the term and the step, when a loss term is NaN or infinite.

    Example:
        >>> import tempfile, torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4, num_labels=2)
        >>> benign = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(16)]
        >>> harmful = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(16)]
        >>> args = ImmunizationArguments(tempfile.mkdtemp(), max_steps=2, report_to="none", disable_tqdm=True,
        ...                              per_device_train_batch_size=8, use_cpu=True, logging_strategy="no")
        >>> trainer = ImmunizationTrainer(ViTForImageClassification(config), args, train_dataset=benign,
        ...     harmful_dataset=harmful, eval_dataset=benign, harmful_eval_dataset=harmful)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> sorted(k for k in trainer.evaluate() if k.endswith("rir"))  # doctest: +ELLIPSIS
        {'eval_loss': ...}
        ['eval_intercept_log10_rir', 'eval_intercept_rir', 'eval_log10_rir', 'eval_rir']
    """

    # The loss is a per-batch mean: the Trainer divides it by the accumulation steps, and must not guess about it.
    loss_is_scaled_for_ga = False
    data_collator: Any
    model: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: ImmunizationArguments | None = None,
        *,
        train_dataset: Any = None,
        harmful_dataset: Any = None,
        distillation_dataset: Any = None,
        eval_dataset: Any = None,
        harmful_eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else ImmunizationArguments()
        checks.check_arguments(args)
        checks.check_sharding(args)
        checks.check_batches(args, args.world_size)
        model = None if model is None else checks.as_classifier(model, args)
        # A user's own collator gets the datasets' own items.
        self._reads_images = data_collator is None
        # What goes into immunization.json; names of data that the data sets do not know can be set on it.
        self.evidence = record.Evidence()
        checks.check_reporting(args)
        super().__init__(
            model,
            args,
            data_collator=PairedCollator(data_collator or ImageCollator(processing_class)),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or evaluation.Accuracy(),
            **kwargs,
        )
        # Only now is it known what `accelerate launch` asks for.
        checks.check_sharding(args, self.accelerator, harmful_eval_dataset)
        checks.check_shardable(self.model, self.accelerator)
        # Nearly every image model's forward takes **kwargs, from which the Trainer concludes that the loss is a sum
        # over `num_items_in_batch`; it is a mean.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Guard(self))
        self._means = RunningMeans()
        self._set_scope(self.model)
        self._sides: tuple[Any, Any, Any] | None = None
        if train_dataset is not None:
            self._take_training_data(train_dataset, harmful_dataset, distillation_dataset)
        checks.check_best_metric(args, harmful_eval_dataset)
        self._take_evaluation_data(eval_dataset, harmful_eval_dataset)
        # Through the starting weights and through the latest, by metric prefix ("harmful" for the harmful set).
        self._references: dict[str, Measurement] = {}
        self._latest: dict[str, Measurement] = {}
        self._trunk: TrunkSplit | None = None
        self._measured_again: set[str] = set()
        self._resumed = False
        self._mean_loss = evaluation.MeanLoss()
        self._evaluation: evaluation.Evaluation | None = None

    def _set_scope(self, model: PreTrainedModel) -> None:
        checks.check_classifier(model)
        self._plain_names = plain_names(model, self.args.head_module)
        self._moving = select_trainable(model, self.args.trainable, self.args.head_module)
        checks.check_checkpointing(model, self.args)
        self._step = self.create_step(model)

    @property
    def warning(self) -> str:
        """Why the run may reach little, as far as it was seen before its first step; else empty."""
        return "" if self._step.choice is None else self._step.choice.warning

    @property
    def choices(self) -> dict[str, str]:
        """What the run works with and why, by option: objective, head, scope and batch sizes."""
        args, found = self.args, self._step.choice
        share = None if found is None else found.separability
        sides = "" if share is None else f"; {share:.0%} of a sample are separable at the classifier's input"
        head = "by name" if args.head_module else "the only linear layer that gives the logits"
        same = "by default as many as benign ones" if args.harmful_batch_size is None else "as asked"
        return {
            "objective": f"{args.objective}{sides}",
            "head_module": f"{self._step.head_name}: {head}",
            "trainable": f"{len(self._moving)} parameters: trainable={args.trainable!r}",
            "harmful_batch_size": f"{args.batch_sizes.harmful}: {same}",
        }

    def create_step(self, model: PreTrainedModel) -> ImmunizationStep:
        """What computes the loss of a pair of batches; override it to minimize something of your own."""
        return ImmunizationStep(
            model,
            Method.of(self.args),
            moving=self._moving,
            freeze_batchnorm=self.args.freeze_batchnorm,
            head_module=self.args.head_module,
        )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the Trainer's, with the scope set on the model, which is another in each run or trial."""
        model = checks.as_classifier(super().call_model_init(trial), self.args)
        self._set_scope(model)
        self._references = {}  # those known are of the model before
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, which learns a trial's settings only after it has made the trial's model."""
        super()._hp_search_setup(trial)
        if trial is not None:
            self._set_scope(self.model)
            self._pair_sides()

    # ---- data ----

    def _rows(self, dataset: Any, name: str, labels: str = "needed") -> Any:
        if dataset is None or (not self._reads_images and name != "train_dataset"):
            return dataset
        if not self._reads_images:
            return checks.side_rows(dataset, name, self.args, None, raw=True)
        return checks.image_rows(dataset, name, self.args, self.model.config, labels)

    def _take_training_data(self, benign: Any, harmful: Any, distillation: Any) -> None:
        if harmful is None:
            raise DataError("Expected harmful_dataset=, found none. Images suffice, without labels.")

        def side(dataset: Any, name: str) -> Any:
            if dataset is None:
                return None
            return checks.side_rows(dataset, name, self.args, self.model.config, raw=not self._reads_images)

        labels = "needed" if Method.of(self.args).needs_labels else "optional"
        rows = self._rows(benign, "train_dataset", labels)
        self._sides = rows, side(harmful, "harmful_dataset"), side(distillation, "distillation_dataset")
        self._pair_sides()

    def _pair_sides(self) -> None:
        if self._sides is not None:
            benign, harmful, distillation = self._sides
            self.train_dataset = checks.paired_rows(benign, harmful, self.args, distillation)

    def _take_evaluation_data(self, benign: Any, harmful: Any) -> None:
        self._harmful_eval = self._rows(harmful, "harmful_eval_dataset", labels="own")
        if isinstance(benign, dict):
            self.eval_dataset = {name: self._rows(data, f"eval_dataset {name}") for name, data in benign.items()}
        else:
            self.eval_dataset = self._rows(benign, "eval_dataset")
        self.evidence.remarks += degenerate_sides(self._sides, (self.eval_dataset, self._harmful_eval))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The dataset passes on the epoch, which accelerate announces to it alone when resuming on several processes.
        shuffle = getattr(self.args, "train_sampling_strategy", "random") != "sequential"
        return (train_dataset or self.train_dataset).make_sampler(self._data_seed, shuffle)

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; with `cache_trunk`, of activations at the entry of the trainable part."""
        given = self.train_dataset, self.data_collator
        if self.train_dataset is None or self.args.cache_trunk == "no":
            return super().get_train_dataloader()
        try:
            # Here, since the weights of a checkpoint are loaded by now.
            self.train_dataset = self._cached_pairs()
            self.data_collator = PairedCollator(default_collate)
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = given

    def _cached_pairs(self) -> PairedDataset:
        """Pairs with stored activations of the frozen trunk in place of images; each process computes a share."""
        args, pairs = self.args, self.train_dataset
        sides = {side: getattr(pairs, side) for side in ("benign", "harmful", "distillation")}
        sides = {side: rows for side, rows in sides.items() if rows is not None}
        for side, rows in sides.items():
            if isinstance(rows, StreamedRows):
                raise ArgumentError(
                    f"Expected cache_trunk='no' with streamed {side} images, found {args.cache_trunk!r}: what is "
                    "stored must be known as a whole. Store the data set, or train without the cache."
                )
        split = self._split_trunk()
        folder = Path(args.trunk_cache_dir or Path(args.output_dir) / "_trunk")
        everyone = launched()
        options: dict[str, Any] = {
            "processor": self.processing_class,
            "collate": None if self._reads_images else self.data_collator.inner,
            "dtype": args.cache_trunk,
            "batch_size": 2 * args.train_batch_size,  # as many as a step, of both sides, has room for
            "num_workers": args.dataloader_num_workers,
            "progress": not args.disable_tqdm and everyone.first,
            "processes": everyone,
        }
        caches = [
            TrunkCache(self.model, split, rows, folder / side, name=f"{side} images", **options)
            for side, rows in sides.items()
        ]
        stored: dict[str, Any] = dict(zip(sides, open_or_write(*caches), strict=True))
        self._step.replayed = split.replayed
        self.model.to(args.device)
        kept = [side for side in ("benign", "distillation") if self._step.start is not None and side in stored]
        values = sum(len(stored[side]) for side in kept) * (self._step.head.in_features + self._step.head.out_features)
        for side in kept if values <= _MOST_VALUES else ():
            stored[side] = StartedRows(stored[side], self._run_start, options["batch_size"])
        return PairedDataset(**stored, harmful_labels=True, batch_sizes=pairs.batch_sizes)

    def _run_start(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        return self._step.run_start(activations.to(self.args.device, next(self.model.parameters()).dtype))

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        # The Trainer would drop the last images of an evaluation too: all of them, of a small set.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's, with images decoded, checked and converted to RGB."""
        with self._all_rows():
            if eval_dataset is None or isinstance(eval_dataset, str):
                return super().get_eval_dataloader(eval_dataset)
            # With persistent workers, the Trainer's method gives the loader of another set that it has kept.
            return super().get_test_dataloader(self._rows(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the Trainer's, with images decoded, checked and converted to RGB."""
        with self._all_rows():
            return super().get_test_dataloader(self._rows(test_dataset, "test_dataset", labels="optional"))

    # ---- the step ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Benign loss plus weighted regularizers for a pair of batches; the Trainer's own loss for a single batch.

        Returns:
            The 0-D loss, or with ``return_outputs`` it and a dictionary with the benign ``logits``.
        """
        if "benign" not in inputs:
            if self.is_in_train and model.training:
                raise DataError(
                    "Expected batches of benign and harmful images to train on, found one of "
                    f"{', '.join(map(str, inputs))}, on which nothing is immunized. Leave get_train_dataloader() as "
                    "it is, or let yours give dictionaries of both sides (see PairedCollator)."
                )
            return super().compute_loss(model, inputs, return_outputs)
        result = self._step(model, self._behind_trunk(inputs), self.state.global_step, self._task_loss)
        self._means.update(result.logged, self.state.global_step + 1, result.finite)
        return (result.loss, {"logits": result.logits}) if return_outputs else result.loss

    def _behind_trunk(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The frozen trunk's activations in place of images, for the model and the starting model at once."""
        if self._trunk is None:
            return inputs
        sides = {side: rows for side, rows in inputs.items() if side in ("benign", "harmful", "distillation")}
        fits = all(tuple(rows["pixel_values"].shape[1:]) == self._trunk.pixel_shape for rows in sides.values())
        self._step.replayed = self._trunk.replayed if fits else nullcontext
        if not fits:
            return inputs
        for module in self._step.still:
            module.training = False
        run = partial(self._trunk.activations, self.model)
        return inputs | {side: {**rows, "pixel_values": run(rows["pixel_values"])} for side, rows in sides.items()}

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(ImageClassifierOutput(logits=logits), labels, num_items_in_batch=None)
        if self.label_smoother is not None:
            return self.label_smoother({"logits": logits}, labels)
        return self.model.loss_function(labels, logits, self.model.config)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean of every term and weight since the last log."""
        if "loss" in logs:
            logs.update(self._means.take(self.state.global_step))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, of both sides of a pair."""
        if "benign" not in inputs:
            return super().floating_point_ops(inputs)
        return sum(super(ImmunizationTrainer, self).floating_point_ops(side) for side in inputs.values())

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As the Trainer's on benign data, with κ of both tasks and RIR against the starting weights.

        Adds ``eval_benign_log10_kappa``, ``eval_harmful_log10_kappa``, ``eval_rir``, ``eval_log10_rir``, … (see
        `spectral_metrics`), and ``eval_benign_loss`` and ``eval_benign_accuracy`` as other names. ``eval_dataset`` may
        name one of several sets of the constructor's; with other data, κ is reported without RIR.
        """
        if self._evaluation is not None:  # one of several sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        one = eval_dataset if isinstance(eval_dataset, str) else None
        others = eval_dataset is not None and one is None
        self._evaluation = evaluation.Evaluation(other_data=others, prefix=metric_key_prefix, one=one)
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluation = None
        if self.args.should_save:
            record.record_saved(self)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; within `evaluate`, features are folded into a QR factor as they pass."""
        if self._evaluation is None or not self._can_measure:
            return self._loop_with_exact_loss(dataloader, *args, **kwargs)
        prefix, own_data = kwargs.get("metric_key_prefix", "eval"), not self._evaluation.other_data
        name = self._evaluation.name_of(prefix)
        # Under mixed precision the loop's features carry bfloat16 noise, which would hide every small singular value.
        plain = self.accelerator.mixed_precision == "no" and "forward" not in vars(self.model)
        self._evaluation.benign = Measurement() if plain else None
        output = self._loop_with_exact_loss(dataloader, *args, **kwargs)
        here = self._evaluation.benign
        benign = self._measure(dataloader, "benign") if here is None else evaluation.merged(here, self.args.device)
        if self._evaluation.harmful is None and self._harmful_eval is not None:
            self._evaluation.harmful = self._measure(self.get_eval_dataloader(self._harmful_eval), "harmful")
        harmful = self._evaluation.harmful
        found = ({name: benign} if own_data else {}) | ({} if harmful is None else {"harmful": harmful})
        if own_data:
            self._latest = found
        if self.state.global_step == 0:
            self._references = found | self._references
        elif harmful is not None and own_data:
            self._check_reference(name, benign, dataloader)
            self._check_reference("harmful", harmful)
        metrics, references = output.metrics, self._references
        for metric in (f"{prefix}_loss", f"{prefix}_accuracy"):
            if metric in metrics:
                metrics[metric.replace(prefix, f"{prefix}_benign", 1)] = metrics[metric]
        spectral = spectral_metrics(benign, references.get(name), harmful, references.get("harmful"))
        if not plain:  # the loop's accuracy is of other numbers
            spectral = {
                metric: value for metric, value in spectral.items() if not metric.startswith("accuracy_change")
            }
        metrics.update({f"{prefix}_{metric}": value for metric, value in spectral.items()})
        if own_data:  # on every process: what is known decides whether all of them measure the start again
            named = {metric.replace(prefix, name, 1): value for metric, value in metrics.items()}
            self.evidence.note(self.model, name, self.state.global_step, named, benign, harmful, references)
        return output

    def _loop_with_exact_loss(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's, with the loss as the mean over images, whatever the batches and processes."""
        self._mean_loss = evaluation.MeanLoss()
        with self._unprepared():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        mean = self._mean_loss.value(self.args.device)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if mean is not None and output.metrics is not None and name in output.metrics:
            output.metrics[name] = mean
        return output

    @contextmanager
    def _unprepared(self) -> Iterator[None]:
        """Within, an evaluation before any training runs the model as it is, and leaves it for training to prepare."""
        engines = self.is_fsdp_enabled, self.is_deepspeed_enabled
        prepared = bool(self.accelerator._optimizers)
        if self._is_sharded and not prepared:  # engines take a model apart along with its optimizer alone
            self.is_fsdp_enabled = self.is_deepspeed_enabled = False
            self.model.to(self.args.device)
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.is_deepspeed_enabled = engines
            self._reshard()
            if not prepared:
                # accelerate would take the model for one that it has wrapped, and each process would train its own.
                vars(self.model).pop("_is_accelerate_prepared", None)

    def _reshard(self) -> None:
        """Let go of whole weights that a pass leaves with FSDP2, before the first process alone looks at its part."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As the Trainer's; the loss counts by its images, and within `evaluate`, the features are kept."""
        measurement = None if self._evaluation is None else self._evaluation.benign
        if measurement is None:
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        else:
            with of_side("benign evaluation"), HeadInput(self._step.head) as captured:
                result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
                logits = result[1][0] if isinstance(result[1], tuple) else result[1]
                found = captured.features, inputs["pixel_values"], inputs.get("labels"), logits
                evaluation.fold(measurement, found, self.accelerator)
        count = len(inputs["pixel_values"])
        loss, own = result[0], evaluation.own_images(count, self.accelerator)
        if loss is not None and evaluation.is_filled_up(count, self.accelerator):
            # On every process, since sharded weights run on all of them or on none.
            rows = {name: value[: max(own, 1)] for name, value in inputs.items() if isinstance(value, Tensor)}
            loss, _, _ = super().prediction_step(model, inputs | rows, True, ignore_keys)
        if loss is not None:
            self._mean_loss.add(loss, own)
        return result

    def _check_reference(self, name: str, now: Measurement, dataloader: Any = None) -> None:
        """Measure the starting weights on these images too, where what is known of them is of others, or nothing."""
        known = self._references.get(name)
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else None
        first = name == (f"eval_{next(iter(several))}" if several else "eval")
        missing = known is None or not now.same_data(known) or (first and self._resumed and not self.evidence.before)
        if missing and self._step.start and name not in self._measured_again:
            self._measured_again.add(name)
            if dataloader is None:  # one of a stream has no length to be true by
                dataloader = self.get_eval_dataloader(self._harmful_eval)
            current = self.model, self._step.head
            try:
                with self._step.start.in_place(*current) as (self.model, self._step.head):
                    known = self._references[name] = self._measure(dataloader, f"starting {name}")
                    if first and self._evaluation is not None:
                        self._evaluation.benign = None  # what follows is of other weights
                        metrics = self._loop_with_exact_loss(dataloader, f"starting {name}").metrics or {}
                        self.evidence.know_before(metrics, known)
            finally:
                self.model, self._step.head = current
        if known is None or not now.same_data(known):
            logger.warning_once(
                f"No RIR is reported: the images of {'harmful_eval_dataset' if name == 'harmful' else 'eval_dataset'} "
                "are not those on which the starting weights were measured. Resume with those; if a transform draws "
                "them at random, take it out of the evaluation."
            )

    def _measure(self, dataloader: Any, name: str) -> Measurement:
        """Features of all processes' images through the model in full precision, the same on every process."""
        in_parts = self._is_sharded and bool(self.accelerator._optimizers)
        if not in_parts:
            self.model.to(self.args.device)
        # The class's own: what accelerate put in its place, once in each preparation, runs under autocast.
        forward = self.model if in_parts else partial(type(self.model).forward, self.model)
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        shown = tqdm(dataloader, desc=f"κ of {name} features", disable=quiet, leave=False)
        measurement = Measurement()
        with of_side(f"{name.replace('eval', 'benign')} evaluation"):
            for batch in run_batches(self.model, self._step.head, map(self._prepare_inputs, shown), forward=forward):
                logits = None if name.split()[-1] == "harmful" else batch.logits  # harmful classes are not the model's
                found = batch.features, batch.pixel_values, batch.labels, logits
                evaluation.fold(measurement, found, self.accelerator)
            self._reshard()
            return evaluation.merged(measurement, self.accelerator.device)

    def _measure_references(self) -> None:
        if self._harmful_eval is None or self.eval_dataset is None or not self._can_measure:
            return
        benign, several = self.eval_dataset, isinstance(self.eval_dataset, dict)
        sets = {f"eval_{name}": dataset for name, dataset in benign.items()} if several else {"eval": benign}
        for name, dataset in {**sets, "harmful": self._harmful_eval}.items():
            if name not in self._references:
                self._references[name] = self._measure(self.get_eval_dataloader(dataset), name)

    @property
    def last_spectra(self) -> dict[tuple[str, str], Tensor]:
        """Singular values of the features, for ("benign" or "harmful", "before" or "after"), as last evaluated."""
        known = {"before": self._references, "after": self._latest}
        return {
            (side, when): of[name].factor.singular_values()
            for side, name in (("benign", "eval"), ("harmful", "harmful"))
            for when, of in known.items()
            if name in of
        }

    @property
    def starting_metrics(self) -> dict[str, float | None]:
        """Metrics of the starting weights on the images evaluated last, as far as they are known."""
        metrics: dict[str, float | None] = dict(self.evidence.before or {})
        start = {name: of for name, of in self._references.items() if name in self._latest}
        start = {name: of for name, of in start.items() if of.same_data(self._latest[name])}
        if "eval" in start:
            benign, harmful = start["eval"], start.get("harmful")
            found = spectral_metrics(benign, benign, harmful, harmful)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
        return metrics

    # ---- training, saving, resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's, after κ of the starting weights was measured; True resumes the last whole checkpoint.

        Raises:
            CheckpointError: If the checkpoint is not as it was written, or none is.
            ArgumentError: If checkpoints cannot be written to ``output_dir``.
        """
        folder = self.args.output_dir
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoints.checkpoint_to_resume(resume_from_checkpoint, folder)
        if self.args.should_save:
            if self.args.save_strategy != "no":  # rather than at the first checkpoint
                check_writable(folder, "output_dir")
            for each in (Path(folder), *Path(folder).glob("checkpoint-*")):
                remove_leftovers(each)
        self._means = RunningMeans()  # without what a run that was stopped had not logged yet
        return super().train(resume_from_checkpoint, **kwargs)

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        """As the Trainer's. Here `model_init` has given the model of this run or trial, and nothing has moved yet."""
        if resume_from_checkpoint is None:
            self._measure_references()
        if isinstance(self.train_dataset, PairedDataset):
            self._step.replayed = nullcontext  # of an earlier call
            self._step.prepare(self._sample)
            self._trunk = self._find_trunk()
            if self.is_world_process_zero():
                logger.info(f"Choices: {'; '.join(f'{name} {why}' for name, why in self.choices.items())}.")
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:  # which loads its checkpoints by itself
            self._load_run(resume_from_checkpoint)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)

    def _find_trunk(self) -> TrunkSplit | None:
        """What of the model each step runs once for it and for the starting model; None where that is not possible."""
        args = self.args
        if args.cache_trunk != "no" or self._step.start is None or self.accelerator.mixed_precision != "no":
            return None
        if self._is_sharded or any(getattr(args, obstacle) for obstacle in TRUNK_OBSTACLES):
            return None
        with suppress(RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            return self._split_trunk()  # a saving, without which the run is the same
        return None

    def _split_trunk(self) -> TrunkSplit:
        own = None if self._reads_images else self.data_collator.inner
        sample = (own or ImageCollator(self.processing_class))([self.train_dataset.benign[0]])["pixel_values"]
        scope = {"eval_modules": self._step.still, "head_module": self.args.head_module}
        return split_trunk(self.model, self._moving, tuple(sample.shape[1:]), **scope)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Images for the objective to look at, which do not depend on the batch size."""
        self.model.to(self.args.device)
        collate = self.data_collator.inner
        return draw_sample(self.train_dataset, self._data_seed, self.args.device, collate, collate)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        failed = sys.exception()
        if state_dict == {} and failed is not None:
            raise failed  # which the Trainer took for a setting of DeepSpeed's: it would wait for processes that go on
        # Of sharded weights, the first process alone was given the whole.
        weights = dict(self.model.named_parameters()) if state_dict is None else state_dict
        checkpoints.check_finite_weights({name: weights[name] for name in self._moving if name in weights})
        output_dir = output_dir or self.args.output_dir
        if self._plain_names:
            whole = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {self._plain_names.get(name, name): tensor for name, tensor in whole.items()}
        with staged_directory(output_dir) as staging:
            super()._save(str(staging), state_dict)
            lost = None if self._is_sharded else self._lost_in(staging)
            if lost is None:
                record.save_record(self, staging, output_dir)
            checkpoints.remove_other_forms(output_dir, staging)
        if lost is not None:
            (Path(output_dir) / RECORD_NAME).unlink(missing_ok=True)
            raise CheckpointError(
                f"Expected {output_dir} to hold the model that was saved there, found on loading it: {lost} The model "
                "in memory is whole: give it the parts that its class has, and save it again."
            )

    def _lost_in(self, folder: Path) -> str | None:
        """What a checkpoint that was just written lacks of the model, in words."""
        if without_wrapper(self.model) is not self.model:
            (folder / CARD_NAME).unlink(missing_ok=True)  # PEFT's form to fill in
            describe_adapter(folder, self.model, self.args.head_module)
            if not self.model.peft_config[self.model.active_adapter].base_model_name_or_path:
                logger.warning_once(
                    "The adapter is of a base model made in memory, onto which alone it can be loaded. Save that "
                    "model and load it before PEFT wraps it, or save model.merge_and_unload()."
                )
                return None
        return difference_on_loading(folder, self.model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with checkpoints.atomic_checkpoint(folder, self.state, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            checkpoints.save_run_state(output_dir, self._step, self._references, self.args.train_batch_size)
        # Each process has written one: only now can the first list and flush them all.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None and self._loads_whole:
            checkpoints.load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._loads_whole or self._is_sharded:
            self.evidence.adopt(self.model, resume_from_checkpoint)
        self._load_run(resume_from_checkpoint)

    def _load_run(self, checkpoint: str) -> None:
        self._resumed = True
        references = checkpoints.load_run_state(checkpoint, self._step, self.args.train_batch_size)
        self._references = references or self._references

    def _load_best_model(self) -> None:
        if self._loads_whole:
            checkpoints.load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        self.evidence.adopt(self.model, self.state.best_model_checkpoint)

    @property
    def _loads_whole(self) -> bool:
        return isinstance(self.model, PreTrainedModel) and not self._is_sharded

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def _can_measure(self) -> bool:
        # Sharded weights cannot be run outside of mixed precision.
        return not (self._is_sharded and self.accelerator.mixed_precision != "no")

    # ---- card and Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer's; what goes wrong has a name (see `HubError`)."""
        with named_outcomes("creation of the repository"):
            super().init_hf_repo(token=token, private=private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's (less `tasks`, `dataset_args`): the card of the present weights; your own sections stay."""
        given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        unused = ("self", "tasks", "dataset_args")
        if self.is_world_process_zero():
            record.create_model_card(self, **{name: of for name, of in given.items() if name not in unused})

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's: save, and push weights, configs, record, card and figures in one commit; nothing else.

        Returns:
            `PushResult`, or its future where not `blocking`; None on other processes than the first.

        Raises:
            HubError: With its outcome by name; nothing local is lost.
        """
        return record.push_to_hub(self, commit_message, blocking, token, revision, private, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        record.push_from_checkpoint(self, checkpoint_folder)
