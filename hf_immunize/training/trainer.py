"""`ImmunizationTrainer`: steps that see benign and harmful images, evaluations that report κ and RIR."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator
from hf_immunize.data.pairs import PairedCollator, PairedDataset, degenerate_sides
from hf_immunize.errors import ArgumentError, CheckpointError, DataError
from hf_immunize.features.extract import Measurement, of_side, spectral_metrics
from hf_immunize.files import check_writable, remove_leftovers, staged_directory
from hf_immunize.hub.card import CARD_NAME
from hf_immunize.hub.push import named_outcomes
from hf_immunize.hub.record import RECORD_NAME
from hf_immunize.training import record as publishing
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.cached_trunk import cached_pairs, suggest_cached_trunk
from hf_immunize.training.checkpoints import (
    atomic_checkpoint,
    check_finite_weights,
    checkpoint_to_resume,
    load_run_state,
    load_weights,
    remove_other_forms,
    save_run_state,
)
from hf_immunize.training.checks import (
    as_classifier,
    check_arguments,
    check_batches,
    check_best_metric,
    check_checkpointing,
    check_classifier,
    check_prepared,
    check_reporting,
    check_shardable,
    check_sharding,
    image_rows,
    paired_rows,
    side_rows,
)
from hf_immunize.training.choice import Choice, describe_choices, draw_sample
from hf_immunize.training.evaluation import (
    Evaluation,
    MeanLoss,
    RunningAccuracy,
    accuracy,
    add_metrics,
    fold,
    is_filled_up,
    measure_features,
    merged,
    own_images,
)
from hf_immunize.training.record import BudgetWatch, Evidence, describe_budget, record_saved, save_record
from hf_immunize.training.step import ImmunizationStep, RunningMeans
from hf_immunize.vision.head import HeadInput, without_wrapper
from hf_immunize.vision.loading import describe_adapter, difference_on_loading, plain_names
from hf_immunize.vision.scope import select_trainable


logger = logging.get_logger(__name__)


class ImmunizationTrainer(Trainer):
    r"""A `transformers.Trainer` that immunizes an image classifier against a harmful task.

    Minimizes ``benign loss + Σ benign_weight·R_benign(Z_P) + Σ harmful_weight·R_harmful(Z_H)`` with Z the classifier's
    inputs: with ``objective="kappa"``, Eq. 9 of Zheng et al. 2025 (arXiv:2505.23760). All else is the Trainer's.

    Weights of half precision are turned into float32, in which they are trained, measured and saved.

    κ is not additive over micro-batches: under gradient accumulation the mean of the micro-batches' regularizers is
    minimized, not the regularizer of the whole batch. Over processes it is exact, and so are evaluations, whose
    results do not depend on their number. FSDP needs ``benign_loss="task"`` and ``benign_budget=None``, and measures
    no κ in half precision; it is tested on the CPU (FSDP2). DeepSpeed, under the same conditions, is untested.

    Args:
        model: An image classifier with one linear head (`AutoModelForImageClassification`).
        args: `ImmunizationArguments`.
        train_dataset: Benign data: a `datasets.Dataset` with an image column, or any map-style dataset whose items
            hold ``pixel_values``; with labels, where ``benign_loss`` is "task" or "both".
        harmful_dataset: Harmful data, stored or streamed; labels are needed by ``objective="imma"`` alone.
        distillation_dataset: Any images, without labels, stored or streamed, on which the model shall stay what it was
            as well; the more varied, the better benign accuracy is kept.
        eval_dataset: Benign data with labels; `eval_loss` and `eval_accuracy` are of these.
        harmful_eval_dataset: Harmful data on which κ and RIR are measured.
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
        >>> sorted(k for k in trainer.evaluate() if "kappa" in k or "rir" in k)  # doctest: +ELLIPSIS
        {'eval_loss': ...}
        ['eval_benign_log10_kappa', 'eval_harmful_log10_kappa', 'eval_log10_rir', 'eval_rir',
         'eval_rir_is_lower_bound', 'eval_rir_is_upper_bound']
    """

    # The loss is a per-batch mean: the Trainer divides it by the accumulation steps, and must not guess about it.
    loss_is_scaled_for_ga = False
    data_collator: Any

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
        check_arguments(args)
        check_sharding(args)
        check_batches(args, args.world_size)
        model = None if model is None else as_classifier(model, args)
        # A user's own collator gets the datasets' own items.
        self._reads_images = data_collator is None
        # What goes into immunization.json; names of data that the data sets do not know can be set on it.
        self.evidence = Evidence()
        check_reporting(args)
        super().__init__(
            model,
            args,
            data_collator=PairedCollator(data_collator or ImageCollator(processing_class)),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or (RunningAccuracy() if args.batch_eval_metrics else accuracy),
            **kwargs,
        )
        # Only now is it known what `accelerate launch` asks for.
        check_sharding(args, self.accelerator, harmful_eval_dataset)
        check_shardable(self.model, self.accelerator)
        # Nearly every image model's forward takes **kwargs, from which the Trainer concludes that the loss is a sum
        # over `num_items_in_batch`; it is a mean.
        self.model_accepts_loss_kwargs = False
        self._set_scope(self.model)
        self._means = RunningMeans()
        self._budget_watch = BudgetWatch()
        self._sides: tuple[Any, Any, Any] | None = None
        if train_dataset is not None:
            self._take_training_data(train_dataset, harmful_dataset, distillation_dataset)
        if args.fp16 and args.device.type == "cpu":
            logger.warning("fp16=True does nothing on a CPU: this run is in full precision. bf16=True works there.")
        check_best_metric(args, harmful_eval_dataset)
        self._take_evaluation_data(eval_dataset, harmful_eval_dataset)
        # Through the starting weights, by metric prefix ("harmful" for the harmful set).
        self._references: dict[str, Measurement] = {}
        self._measured_again: set[str] = set()
        self._resumed = False
        self._latest: dict[str, Measurement] = {}
        self._mean_loss = MeanLoss()
        self._evaluation: Evaluation | None = None

    def _take_evaluation_data(self, benign: Any, harmful: Any) -> None:
        self._harmful_eval = self._rows(harmful, "harmful_eval_dataset", labels="ignored")
        if isinstance(benign, dict):
            self.eval_dataset = {name: self._rows(data, f"eval_dataset {name}") for name, data in benign.items()}
        else:
            self.eval_dataset = self._rows(benign, "eval_dataset")
        self.evidence.remarks += degenerate_sides(self._sides, (self.eval_dataset, self._harmful_eval))

    def _set_scope(self, model: PreTrainedModel) -> None:
        check_classifier(model)
        self._plain_names = plain_names(model, self.args.head_module)
        self._moving = select_trainable(model, self.args.trainable, self.args.head_module)
        check_checkpointing(model, self.args)
        self._step = self.create_step(model)

    @property
    def objective(self) -> str:
        """What is minimized in addition to the benign loss, by name; "auto" until training begins."""
        return self._step.objective

    @property
    def choices(self) -> dict[str, str]:
        """What the run works with and why, by option: objective, head, scope and batch sizes."""
        choice = self._step.choice or Choice(self.objective, reason="not chosen yet")
        return describe_choices(choice, self._step.head_name, len(self._moving), self.args)

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
        model = as_classifier(super().call_model_init(trial), self.args)
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
        if dataset is None or not self._reads_images:
            return dataset
        return image_rows(dataset, name, self.args, self.model.config, labels)

    def _take_training_data(self, benign: Any, harmful: Any, distillation: Any) -> None:
        if harmful is None:
            raise DataError("Expected harmful_dataset=, found none. Images suffice; their labels are not used.")
        labels = "needed" if Method.of(self.args).needs_labels else "optional"
        rows = self._rows(benign, "train_dataset", labels)
        sides = self._side(harmful, "harmful_dataset"), self._side(distillation, "distillation_dataset")
        self._sides = rows, *sides
        self._pair_sides()

    def _pair_sides(self) -> None:
        if self._sides is not None:
            benign, harmful, distillation = self._sides
            self.train_dataset = paired_rows(benign, harmful, self.args, distillation)

    def _side(self, dataset: Any, name: str) -> Any:
        if dataset is None:
            return None
        return side_rows(dataset, name, self.args, self.model.config, raw=not self._reads_images)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The dataset passes on the epoch, which accelerate announces to it alone when resuming on several processes.
        shuffle = getattr(self.args, "train_sampling_strategy", "random") != "sequential"
        return (train_dataset or self.train_dataset).make_sampler(self._data_seed, shuffle)

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        # The Trainer would drop the last images of an evaluation too: all of them, of a small set.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; with `cache_trunk`, of activations at the entry of the trainable part."""
        given = self.train_dataset, self.data_collator
        if self.train_dataset is None or self.args.cache_trunk == "no":
            if self.train_dataset is not None:
                suggest_cached_trunk(self.model, self._moving, len(self.train_dataset), self.args)
            return super().get_train_dataloader()
        own = None if self._reads_images else self.data_collator.inner
        options = {"processor": self.processing_class, "collate": own}
        try:
            # Here, since the weights of a checkpoint are loaded by now.
            self._step.replayed, self.train_dataset = cached_pairs(
                self.model, self.train_dataset, self._moving, self._step.still, self.args, **options
            )
            self.data_collator = PairedCollator(ImageCollator())
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = given

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
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
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
        result = self._step(model, inputs, self.state.global_step, self._task_loss)
        self._means.update(result.logged, self.state.global_step + 1, result.finite)
        return (result.loss, {"logits": result.logits}) if return_outputs else result.loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; a `compute_loss` of a subclass that goes past the method is refused."""
        before, name = self._step.calls, f"{type(self).__name__}.compute_loss"
        remedy = (
            "In it, call super().compute_loss(model, inputs, return_outputs=True) and add to the loss; the benign "
            "images are inputs['benign']."
        )
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except (AttributeError, KeyError, TypeError) as error:
            if type(self).compute_loss is ImmunizationTrainer.compute_loss or self._step.calls > before:
                raise
            raise ArgumentError(
                f"Expected {name} to take batches of benign and harmful images, found {type(error).__name__}: "
                f"{error}. {remedy}"
            ) from error
        if self._step.calls == before:
            raise ArgumentError(f"Expected {name} to use this Trainer's loss, found that it does not. {remedy}")
        return loss

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(ImageClassifierOutput(logits=logits), labels, num_items_in_batch=None)
        if self.label_smoother is not None:
            return self.label_smoother({"logits": logits}, labels)
        return self.model.loss_function(labels, logits, self.model.config)

    # ---- the log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean of every term and weight since the last log, and the part of the budget."""
        if "loss" in logs:
            logs.update(self._means.take(self.state.global_step))
            logs.update(self._budget_watch.look(self._step, self.state.global_step))
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

        Adds to the metrics (see `spectral_metrics` for all names) ``eval_benign_log10_kappa``,
        ``eval_harmful_log10_kappa``, ``eval_rir``, ``eval_log10_rir``, …, and ``eval_benign_loss`` and
        ``eval_benign_accuracy`` as other names of ``eval_loss`` and ``eval_accuracy``.

        With other benign data as ``eval_dataset``, κ is reported without RIR; it may be the name of one of several
        sets of the constructor's.
        """
        check_prepared(self.accelerator)
        outermost = self._evaluation is None
        if outermost:
            one = eval_dataset if isinstance(eval_dataset, str) else None
            others = eval_dataset is not None and one is None
            self._evaluation = Evaluation(other_data=others, prefix=metric_key_prefix, one=one)
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            if outermost:
                self._evaluation = None
        if outermost and self.args.should_save:
            record_saved(self)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; within `evaluate`, features are folded into a QR factor as they pass."""
        if self._evaluation is None or not self._can_measure:
            return self._loop_with_exact_loss(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        name = self._evaluation.name_of(prefix)
        # Under mixed precision the loop's features carry bfloat16 noise, which would hide every small singular value.
        plain = self.accelerator.mixed_precision == "no" and "forward" not in vars(self.model)
        self._evaluation.benign = Measurement() if plain else None
        output = self._loop_with_exact_loss(dataloader, *args, **kwargs)
        here = self._evaluation.benign
        benign = self._measure(dataloader, "benign") if here is None else merged(here, self.args.device)
        if self._evaluation.harmful is None and self._harmful_eval is not None:
            self._evaluation.harmful = self._measure(self.get_eval_dataloader(self._harmful_eval), "harmful")
        harmful = self._evaluation.harmful
        if not self._evaluation.other_data:
            self._latest = {name: benign, **({} if harmful is None else {"harmful": harmful})}
        if self.state.global_step == 0:
            now = {"harmful": harmful} | ({} if self._evaluation.other_data else {name: benign})
            self._references = {key: of for key, of in now.items() if of is not None} | self._references
        elif harmful is not None and not self._evaluation.other_data:
            self._check_reference(name, benign, dataloader)
            self._check_reference("harmful", harmful)
        add_metrics(output.metrics, prefix, benign, harmful, self._references, name)
        if self.args.should_save and not self._is_sharded and not self._evaluation.other_data:
            step, references = self.state.global_step, self._references
            named = {metric.replace(prefix, name, 1): value for metric, value in output.metrics.items()}
            budget = describe_budget(self._step)
            self.evidence.note(self.model, name, step, named, benign, harmful, references, budget)
        return output

    def _loop_with_exact_loss(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's, with the loss as the mean over images, whatever the batches and processes."""
        self._mean_loss = MeanLoss()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        mean = self._mean_loss.value(self.args.device)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if mean is not None and output.metrics is not None and name in output.metrics:
            output.metrics[name] = mean
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As the Trainer's; the loss counts by its images, and within `evaluate`, the features are kept."""
        measurement = None if self._evaluation is None else self._evaluation.benign
        if measurement is None:
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        else:
            with HeadInput(self._step.head) as captured:
                result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            with of_side("benign evaluation"):
                fold(measurement, captured.features, inputs["pixel_values"], self.accelerator)
        count = len(inputs["pixel_values"])
        loss, own = result[0], own_images(count, self.accelerator)
        if loss is not None and is_filled_up(count, self.accelerator):
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
            dataloader = dataloader or self.get_eval_dataloader(self._harmful_eval)
            with self._step.start.in_place(self.model):
                known = self._references[name] = self._measure(dataloader, f"starting {name}")
                if first and self._evaluation is not None:
                    self._evaluation.benign = None  # what follows is of other weights
                    metrics = self._loop_with_exact_loss(dataloader, f"starting {name}").metrics or {}
                    self.evidence.know_before(metrics, known)
        if known is None or not now.same_data(known):
            logger.warning_once(
                f"No RIR is told: the images of {'harmful_eval_dataset' if name == 'harmful' else 'eval_dataset'} are "
                "not those on which the starting weights were measured. Resume with those; if a transform draws them "
                "at random, take it out of the evaluation."
            )

    def _measure(self, dataloader: Any, name: str) -> Measurement:
        """Features of a data set through the model in full precision."""
        self.model.to(self.args.device)
        # The class's own: what accelerate put in its place, once in each preparation, runs under autocast.
        forward = self.model if self._is_sharded else partial(type(self.model).forward, self.model)
        with of_side(f"{name.replace('eval', 'benign')} evaluation"):
            return measure_features(
                self.model,
                self._step.head,
                dataloader,
                self.accelerator,
                forward=forward,
                prepare=self._prepare_inputs,
                description=f"κ of {name} features",
                quiet=self.args.disable_tqdm or not self.is_world_process_zero(),
            )

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
        """As the Trainer's; measures κ of the starting weights first, so that RIR can be told afterwards.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one that was written whole.
            **kwargs: As the Trainer's.

        Raises:
            CheckpointError: If the checkpoint is not as it was written, or none is.
            ArgumentError: If checkpoints cannot be written to ``output_dir``.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if self.args.should_save:
            if self.args.save_strategy != "no":  # rather than at the first checkpoint
                check_writable(self.args.output_dir, "output_dir")
            for folder in (Path(self.args.output_dir), *Path(self.args.output_dir).glob("checkpoint-*")):
                remove_leftovers(folder)
        self._means = RunningMeans()  # without what a run that was stopped had not logged yet
        return super().train(resume_from_checkpoint, **kwargs)

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        """As the Trainer's. Here `model_init` has given the model of this run or trial, and nothing has moved yet."""
        if resume_from_checkpoint is None:
            self._measure_references()
        self._choose_objective()
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)

    def _choose_objective(self) -> None:
        """Choose what the user left open, on images that do not depend on the batch size; a resumed run knows it."""

        def sample() -> tuple[Tensor, Tensor]:
            self.model.to(self.args.device)
            collate = self.data_collator.inner
            return draw_sample(self.train_dataset, self._data_seed, self.args.device, collate, collate)

        if isinstance(self.train_dataset, PairedDataset):
            self._step.choose(sample)
            if self.is_world_process_zero():
                logger.info(f"Choices: {'; '.join(f'{name} {why}' for name, why in self.choices.items())}.")

    def _measure_references(self) -> None:
        if self._harmful_eval is None or self.eval_dataset is None or not self._can_measure:
            return
        benign = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        sets = {f"eval_{name}" if name else "eval": dataset for name, dataset in benign.items()}
        for name, dataset in {**sets, "harmful": self._harmful_eval}.items():
            if name not in self._references:
                self._references[name] = self._measure(self.get_eval_dataloader(dataset), name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        # Of sharded weights, the first process alone was given the whole.
        weights = dict(self.model.named_parameters()) if state_dict is None else state_dict
        check_finite_weights({name: weights[name] for name in self._moving if name in weights})
        output_dir = output_dir or self.args.output_dir
        if self._plain_names:
            whole = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {self._plain_names.get(name, name): tensor for name, tensor in whole.items()}
        with staged_directory(output_dir) as staging:
            super()._save(str(staging), state_dict)
            lost = None if self._is_sharded else self._lost_in(staging)
            if lost is None:
                save_record(self, staging, output_dir)
            remove_other_forms(output_dir, staging)
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
        with atomic_checkpoint(folder, self.state, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            save_run_state(output_dir, self._step, self._references, self.args.train_batch_size)
        # Each process has written one: only now can the first list and flush them all.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None and self._loads_whole:
            load_weights(self.model, resume_from_checkpoint)
            self.evidence.adopt(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed = True
        references = load_run_state(resume_from_checkpoint, self._step, self.args.train_batch_size)
        self._references = references or self._references

    def _load_best_model(self) -> None:
        if self._loads_whole:
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        if not self._is_sharded:
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
        """Write the card with the figures of the present weights; your own sections of an existing one stay.

        Args: as the Trainer's; `tasks` and `dataset_args` are not used, since the task is always the same.
        """
        given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        unused = ("self", "tasks", "dataset_args")
        if self.is_world_process_zero():
            publishing.create_model_card(self, **{name: of for name, of in given.items() if name not in unused})

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save, and push weights, configs, record, card and figures in one commit; nothing else leaves.

        Args: as the Trainer's.

        Returns:
            `PushResult`, or its future where not `blocking`; None on other processes than the first.

        Raises:
            HubError: With its outcome by name; nothing local is lost.
        """
        return publishing.push_to_hub(self, commit_message, blocking, token, revision, private, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        publishing.push_from_checkpoint(self, checkpoint_folder)
