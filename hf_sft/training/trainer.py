"""SFTTrainer: the Hugging Face Trainer with one short ``compute_loss`` for every objective.

Shapes: R scored rows of a micro-batch, K kinds of targets (next token, mask slot; evaluation may tell more apart).

    loss = sum over kinds of  c_kind * sum_i weight_i * nll_i / N_kind

N is summed over the micro-batches of an optimizer step and over all ranks before the division, so that the loss and its gradient
do not depend on how a batch is cut.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput

from hf_sft.arguments import DataArguments, MonitoringArguments, WeDLMArguments
from hf_sft.attention.layout import Layout
from hf_sft.checkpoints import verify_adapter, verify_weights
from hf_sft.checkpoints.folders import LOG
from hf_sft.collators import CONTRACT_KEYS, Batch
from hf_sft.data.chat import IGNORE
from hf_sft.losses import RowScores, score_logits
from hf_sft.metrics import TokenSums, sum_dtype
from hf_sft.models.adapters import save_adapter
from hf_sft.models.families import router_loss_coefficient
from hf_sft.models.head import HeadScorer, RowWeight
from hf_sft.models.routers import RouterRecorder
from hf_sft.models.wrappers import base_model
from hf_sft.objectives import Objective
from hf_sft.training.answering_trainer import AnsweringTrainer
from hf_sft.training.divergence import DivergenceWatch, RowTeller, document_losses, source_names
from hf_sft.training.monitoring import install_monitoring, keep_report, note_failure
from hf_sft.training.profiling import Meter, flops_per_token
from hf_sft.training.setup import (
    check_arguments,
    check_options,
    load_named_model,
    measure_layout,
    prepare_data_arguments,
    prepare_model,
    prepare_objective,
    prepare_tokenizer,
)
from hf_sft.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)


class SFTTrainer(AnsweringTrainer):
    """Fine-tune a causal LM on conversations or token rows.

    Args:
        model: a model, or a folder or hub name to load in float32.
        args: training arguments; ours or plain ``transformers.TrainingArguments``.
        data_args: task, objective, lengths, packing, template and supervision; the defaults suit most data.
        wedlm_args: settings of ``data_args.objective`` wedlm.
        train_dataset, eval_dataset: lists or ``datasets.Dataset`` of conversations (any known format) or of token rows
            ``{"input_ids", "labels"}``, of texts under ``task_type`` pretrain; ``eval_dataset`` may be a dict of several.
        processing_class: the tokenizer; loaded with the model if that is given by name.
        peft_config: a PEFT config to wrap the model with.
        attention_backend: ``auto`` or the name of a backend for packed documents.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts; by default the config's.
        data_collator: replaces ours; must return ``input_ids`` and ``labels`` of the same shape (one document per row).
        activation_checkpointing_policy: what activation checkpointing keeps; see ``hf_sft.models.checkpointing``.
        freeze, thaw_at_step: patterns for names of weights that are not trained, or not before that step; see
            ``ThawingTrainer``.
        evaluation_args, ema_args: answers to evaluation prompts, early stopping and more; an average of the weights. See
            ``AnsweringTrainer`` and ``AveragingTrainer``.
        monitoring_args: steps to profile, and whether a divergence ends the training; see ``docs/monitoring.md``.
        compute_metrics, callbacks, optimizers, ...: as in ``Trainer``. With ``compute_metrics`` evaluation runs on padded
            batches and collects logits.

    Raises:
        ValueError: on arguments that cannot be honoured, data that cannot be learned from, a model that cannot be packed
            although that was asked for.
    """

    _tasks: tuple[str, ...] = ("sft", "pretrain")
    _learned = "document"  # what a row is

    def __init__(
        self,
        model: nn.Module | str,
        args: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        data_args: DataArguments | None = None,
        wedlm_args: WeDLMArguments | None = None,
        peft_config: Any = None,
        attention_backend: str = "auto",
        router_aux_loss_coef: float | None = None,
        monitoring_args: MonitoringArguments | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ) -> None:
        args = TrainingArguments() if args is None else args
        check_options(trainer_options)
        packing = None if data_args is None else data_args.packing
        packing = False if data_collator is not None else packing  # ordinary collators make one row per document
        check_arguments(args, packing)
        model, processing_class = load_named_model(model, processing_class, args)
        self.data_args = prepare_data_arguments(data_args, model, self._tasks)
        if data_collator is not None and self.data_args.objective != "causal":
            raise ValueError(
                "a data_collator replaces ours, which makes the batches of objective wedlm: leave one of them out"
            )
        self.objective = self._make_objective(wedlm_args, attention_backend, model, processing_class, args.seed)
        model = prepare_model(model, peft_config, args, self.objective.mask_token_id)
        processing_class = prepare_tokenizer(processing_class, model, self.data_args)

        self.scorer = HeadScorer(model)
        self.routers = RouterRecorder(model)
        self.router_loss_coefficient = router_loss_coefficient(base_model(model).config, router_aux_loss_coef)
        self.layout = measure_layout(model, self.scorer, args, attention_backend, packing, self.objective.mask_token_id)
        logger.info("documents are laid out %s (%s)", self.layout.name, self.layout.reason)

        self.collects_logits = trainer_options.get("compute_metrics") is not None and not args.prediction_loss_only
        self.user_collator = data_collator
        self._read_model(model, processing_class, args)
        self._train_sums = self._eval_sums = self._new_sums(args.device)
        self._clock, self._logs_step = time.perf_counter(), False
        monitoring = MonitoringArguments() if monitoring_args is None else monitoring_args
        self.watch = DivergenceWatch(monitoring.stop_on_divergence, self._learned)
        self._source_names = source_names(train_dataset)
        train = None if train_dataset is None else self._bins(train_dataset, processing_class)
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._bins(v, processing_class, evaluation=True) for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._bins(eval_dataset, processing_class, evaluation=True)
        super().__init__(
            model,
            args,
            None,
            train,
            eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **trainer_options,
        )
        # The loss is divided by N of the whole step here, and by nothing else in Trainer.
        self.loss_is_scaled_for_ga = True
        install_monitoring(self, monitoring)
        self.meter = Meter.of(self.args, base_model(model))
        if self.compute_metrics is not None:
            self.compute_metrics = _on_documents(self.compute_metrics, self)

    def _make_objective(self, wedlm_args: WeDLMArguments | None, *how: Any) -> Objective:
        return prepare_objective(self.data_args, wedlm_args, *how)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # Else accelerate would compile the whole model, with every length of a row; ours is compiled region by region.
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": None}

    # ---- loss ----

    def compute_loss(  # type: ignore[override]  # N is one number per kind
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of one micro-batch: its share of the step's loss, times the number of ranks.

        Args:
            model: the model as the engine wrapped it; always called whole.
            inputs: a batch of the contract (``hf_sft.collators``), on the device.
            num_items_in_batch: [K] N per kind, of the whole step; by default this batch's own.
        """
        # 1. weight_i * c_kind / N_kind for every row; a kind that nothing asks for counts zero.
        items, micro_batches = self._items(inputs, num_items_in_batch)
        share = torch.where(items > 0, self._kind_coefficients[: len(items)] / items.clamp_min(1e-9), 0.0).float()
        kind_R, weight_R = inputs["target_kind"], inputs["target_weight"]
        # 2. one forward of the whole model; its head scores the rows and returns none.
        outputs, scores, router_loss = self._score(model, inputs, weight_R * share[kind_R])
        # 3. sums for the log, without waiting for the device.
        self._add_scores(model, inputs, scores)
        # 4. engines average gradients over ranks, and N is already global.
        loss = scores.loss + router_loss / micro_batches
        loss = loss * (self.args.world_size if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

    def _items(self, inputs: Batch, num_items_in_batch: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """N per kind [K] and the number of micro-batches: of the whole step, or of this batch alone."""
        if num_items_in_batch is None:
            return inputs["num_items"], 1.0
        return num_items_in_batch[:-1], num_items_in_batch[-1].clamp_min(1)

    def _score(self, model: nn.Module, inputs: Batch, weight: RowWeight) -> tuple[Any, RowScores, Tensor | float]:
        """One forward of the whole model: its outputs, the scores of the rows, and the weighted router loss."""
        with (
            self.scorer.scoring(inputs["logits_to_keep"], inputs["target_ids"], weight) as request,
            self.routers.recording() as routed,
        ):
            outputs = model(**self._model_inputs(inputs))
        return outputs, self.scorer.scores(request, outputs.logits), self._router_loss(model, inputs, routed)

    def _router_loss(self, model: nn.Module, inputs: Batch, routed: list[Tensor]) -> Tensor | float:
        """The load-balancing loss of this forward, weighted; it counts in training alone."""
        if not routed or not self.router_loss_coefficient or not model.training:
            return 0.0
        if torch.is_grad_enabled() and not any(logits.requires_grad for logits in routed):
            raise ValueError(
                "the router loss has no gradient here (activation checkpointing with use_reentrant true runs the layers without "
                'one): set activation_checkpointing_kwargs to {"use_reentrant": false}, or router_aux_loss_coef to 0'
            )
        loss = self.routers.loss(routed, inputs["attention_mask"] if "doc_ids" not in inputs else None)
        if not inputs["num_tokens"]:  # what fills up a step has nothing to say of balance
            return 0.0 * loss
        self._train_sums.add_router_loss(loss)
        return self.router_loss_coefficient * loss

    @cached_property
    def _kind_coefficients(self) -> Tensor:  # on the device once: a copy from the host would wait in every micro-batch
        device, unlearned = self.args.device, [0.0] * (self.objective.kinds - 2)
        return torch.tensor([*self.objective.coefficients, *unlearned], dtype=sum_dtype(device), device=device)

    def _model_inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {key: value for key, value in batch.items() if key not in CONTRACT_KEYS}
        if "doc_ids" in batch:
            assert self.layout.backend is not None, "packed batches come with a backend"
            inputs |= self.layout.backend.inputs(self._base, Layout.from_batch(batch))
        return {key: value for key, value in inputs.items() if self._accepts(key)} | {"use_cache": False}

    def _accepts(self, key: str) -> bool:
        parameters = self._forward_parameters
        return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @cached_property
    def _base(self) -> PreTrainedModel:
        return base_model(self.accelerator.unwrap_model(self.model))

    @cached_property
    def _forward_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._base.forward).parameters

    def _add_scores(self, model: nn.Module, batch: Batch, scores: RowScores) -> None:
        if model.training:
            losses = document_losses(scores.nll, batch["target_doc"], len(batch["doc_lengths"]))
            self.watch.add(self.state.global_step + 1, batch.get("doc_origins"), losses)
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(scores, batch["target_weight"], batch["target_kind"], batch["num_items"], batch["num_tokens"])

    def floating_point_ops(self, inputs: Batch) -> int:
        """Those of :func:`flops_per_token` for each token, noisy streams counted and padding not."""
        return self._flops_per_token * sum(inputs["doc_lengths"])

    @cached_property
    def _flops_per_token(self) -> int:
        return flops_per_token(self._base)

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Score one batch into the sums; logits [B, L, V] and labels [B, L] are returned only where they are collected."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if not self.collects_logits:
                self.compute_loss(model, inputs)
                return None, None, None
            logits = model(**self._model_inputs(inputs)).logits
        rows, targets = inputs["logits_to_keep"], inputs["target_ids"]
        scores = score_logits(logits.flatten(0, 1)[rows], targets, inputs["target_weight"])
        self._add_scores(model, inputs, scores)
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        labels.view(-1)[rows + 1] = targets
        # Ranks gather arrays of one shape; the rows that fill up the last batch are cut off again before metrics see them.
        missing = self.args.eval_batch_size - len(labels)
        logits = nn.functional.pad(logits, (0, 0, 0, 0, 0, missing))
        return None, logits, nn.functional.pad(labels, (0, 0, 0, missing), value=IGNORE)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """``Trainer.predict``: logits, labels and metrics, one row per document."""
        before, self.collects_logits = self.collects_logits, not self.args.prediction_loss_only
        try:
            output = super().predict(*args, **kwargs)
        finally:
            self.collects_logits = before
        count = self._eval_documents
        return output._replace(predictions=_first(output.predictions, count), label_ids=_first(output.label_ids, count))

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """``Trainer.evaluation_loop`` with sums over all tokens divided once, instead of a mean of batch means."""
        self._eval_sums = self._new_sums(self.args.device)
        self._eval_documents = self.num_examples(dataloader)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        totals = self._eval_sums.totals(self._reduced(self._eval_sums))
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = cast(dict[str, float], output.metrics)
        metrics.update({f"{prefix}_{name}": value for name, value in self.objective.metrics(totals).items()})
        return output._replace(num_samples=self._eval_documents)

    def _new_sums(self, device: torch.device) -> Any:
        """What the scores of batches are added up in: ``TokenSums``, or what has its methods."""
        return TokenSums(device, self.objective.kinds)

    def _reduced(self, sums: Any) -> Tensor:
        state = sums.state()
        return self.accelerator.reduce(state, "sum") if self.args.world_size > 1 else state

    # ---- log ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """``Trainer.train``; True or ``auto`` resumes from the newest complete checkpoint, if there is one."""
        self._train_sums, self._clock = self._new_sums(self.args.device), time.perf_counter()
        self._run_state = self._train_sums.state()
        self.watch.begin()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if self.is_world_process_zero():
                note_failure(str(self.args.output_dir), self.state.global_step, error)
            raise
        finally:  # a run that has failed has a report too, once it has begun
            if self.is_world_process_zero() and Path(str(self.args.output_dir), LOG).is_file():
                keep_report(str(self.args.output_dir))
        return output._replace(training_loss=output.metrics["train_loss"])

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(*args, **kwargs)
        self.meter.begin(self.state.total_flos)
        return where

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.scorer.after_engine()
        return prepared

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._logs_step = True  # the next line with a loss is Trainer's own, on every rank
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._logs_step = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Make the losses of training means over tokens; add token accuracy, tokens per second and supervised share."""
        if of_training := self._logs_step and "loss" in logs:
            self._logs_step = False
            totals = self._drain()
            logs["loss"] = totals.loss(self.objective.coefficients)
            logs.update(self.objective.log(totals))
            logs.update({} if totals.router_loss is None else {"router_loss": totals.router_loss})
            seconds = time.perf_counter() - self._clock
            logs["tokens_per_second"] = totals.tokens / seconds
            logs.update(self.meter.read(self.state.total_flos, seconds))
            self._clock = time.perf_counter()
        elif "train_loss" in logs and "train_runtime" in logs:
            self._drain()
            logs.pop("train_samples_per_second", None)  # Trainer counts bins there
            logs["train_loss"] = self._train_sums.totals(self._run_state).loss(self.objective.coefficients)
        super().log(logs, start_time)
        if of_training:
            names, speaks = self._source_names, self.args.process_index == 0
            rows = RowTeller(self.train_dataset, names, self.processing_class, speaks=speaks)
            self.watch.look(self.state.log_history, rows, scaled=self.args.fp16)

    def _drain(self) -> Any:
        """The sums since the last call, over all ranks; they go into those of the whole run."""
        state = self._reduced(self._train_sums)
        self._run_state = self._run_state + state
        self._train_sums = self._new_sums(self.args.device)
        return self._train_sums.totals(state)

    def _counters(self) -> dict[str, list[float]]:
        return {"window": self._reduced(self._train_sums).tolist(), "run": self._run_state.tolist()}

    def _set_counters(self, counters: dict[str, list[float]]) -> None:
        self._run_state = self._run_state.new_tensor(counters["run"])
        if self.args.process_index == 0:  # they are sums over all processes
            self._train_sums.load(self._run_state.new_tensor(counters["window"]))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._stopped_clock():
            return super()._evaluate(*args, **kwargs)

    def _answer_alone(self) -> None:
        with self._stopped_clock():
            super()._answer_alone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._stopped_clock():
            super()._save_checkpoint(*args, **kwargs)

    @contextmanager
    def _stopped_clock(self) -> Iterator[None]:
        """Evaluation, answers and saving do not count in tokens per second."""
        start, clock = time.perf_counter(), self._clock
        try:
            yield
        finally:  # what stops it inside has stopped this time already
            self._clock = clock + time.perf_counter() - start

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write weights or adapter and tokenizer, then check what was written.

        There is no training_args.bin: args.json says the same without pickle and without secrets.
        """
        if not self.args.should_save:
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save_adapter(model, folder, state_dict)
            verify_adapter(folder, model)
            self._base.generation_config.save_pretrained(folder)  # what the merged model stops at
        else:
            model.save_pretrained(folder, state_dict=state_dict)
            verify_weights(folder, model)
        if self.processing_class is not None:
            cast(PreTrainedTokenizerBase, self.processing_class).save_pretrained(folder)


def _on_documents(compute_metrics: Callable[..., Any], trainer: SFTTrainer) -> Callable[..., Any]:
    """``compute_metrics`` on the documents alone, without the rows that filled up the last batch."""

    def cut(prediction: EvalPrediction, *args: Any, **kwargs: Any) -> Any:
        count = trainer._eval_documents
        arrays = {
            "predictions": _first(prediction.predictions, count),
            "label_ids": _first(prediction.label_ids, count),
        }
        return compute_metrics(
            EvalPrediction(**arrays, inputs=_first(prediction.inputs, count), losses=prediction.losses), *args, **kwargs
        )

    return cut


def _first(arrays: Any, count: int) -> Any:
    if isinstance(arrays, (tuple, list)):
        return type(arrays)(_first(array, count) for array in arrays)
    return None if arrays is None else arrays[:count]
