"""A Trainer that answers evaluation prompts while it trains, and looks whether its model stops by itself."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_sft.answer_metrics import available
from hf_sft.answering import Answerer
from hf_sft.arguments import EvaluationArguments
from hf_sft.checkpoints.folders import PREDICTIONS, STOP_CHECK
from hf_sft.checks import check_values
from hf_sft.data.bins import Bins
from hf_sft.data.cache import write_file
from hf_sft.evaluation import Prediction, answer_prompts, prompts_of, score_predictions
from hf_sft.evaluation_checks import ANSWER_METRICS, DECODING_METRICS
from hf_sft.training.averaging_trainer import AveragingTrainer
from hf_sft.training.early_stopping import EarlyStopping
from hf_sft.training.monitoring import EvaluateWithinEpochs, progress_bar
from hf_sft.training.together import gathered, raised_together

logger = logging.getLogger(__name__)

_SHOWN = 2  # answers in the log
_SHOWN_TEXT = 300  # letters of each


class AnsweringTrainer(AveragingTrainer):
    """Answers prompts at the steps that ``evaluation_args`` names, and in every evaluation that needs it.

    Every process answers its share. Answers are greedy: no random number is drawn, and the training goes on as if nothing had
    been generated.

    Args:
        evaluation_args: when prompts are answered, how many, how they are scored; early stopping; evaluations per epoch.

    Attributes:
        predictions: the answers of the last evaluation that had any, the same in all processes.

    Raises:
        ValueError: metrics that cannot be computed here, or that ``metric_for_best_model`` needs.
    """

    predictions: list[Prediction]
    _may_owe = False  # answers, from before the run went on

    def __init__(
        self, model: Any, args: Any, *rest: Any, evaluation_args: EvaluationArguments | None = None, **options: Any
    ) -> None:
        self.evaluation_args = EvaluationArguments() if evaluation_args is None else evaluation_args
        if found := list(check_values(self.evaluation_args)):
            raise ValueError("; ".join(found))
        self.predictions, self._known = [], _Known()
        self._shown: set[tuple[str, int]] = set()  # in the log
        super().__init__(model, args, *rest, **options)
        asked = self.evaluation_args
        self.answer_metrics = self._measurable() if self._answers else []
        if self._answers:
            self.add_callback(_GoOn(self))
        if asked.evals_per_epoch is not None:
            self.add_callback(EvaluateWithinEpochs(asked.evals_per_epoch))
        if asked.early_stopping_patience is not None:
            if isinstance(self.eval_dataset, dict) and args.metric_for_best_model is None:
                raise ValueError(
                    "early_stopping_patience is set, and there are several evaluation sets: say by metric_for_best_model which "
                    f"of them counts, such as eval_{next(iter(self.eval_dataset), 'name')}_loss"
                )
            self.add_callback(EarlyStopping(asked.early_stopping_patience, asked.early_stopping_threshold))

    @property
    def _answers(self) -> bool:
        """Whether evaluation prompts are answered at all."""
        return self.evaluation_args.generation_eval_steps is not None

    def _measurable(self) -> list[str]:
        """The metrics that can be computed on the references at hand."""
        asked, tokenizer = self.evaluation_args, self._reader()
        data = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        prompts = [each for one in data for each in prompts_of(_rows(one), tokenizer, asked.generation_eval_samples)]
        if not prompts:
            raise ValueError(
                "generation_eval_steps is set, and no row of the evaluation data has a prompt before what is learned: name an "
                "eval_file with prompts and answers, set train_on to assistant, or leave generation_eval_steps out"
            )
        names, missing = available(asked.generation_metrics, [prompt.reference for prompt in prompts])
        if asked.generation_metrics and missing:
            raise ValueError(f"generation_metrics: {'; '.join(missing.values())}")
        best = self._best_metric()
        for name, why in missing.items():
            if best in ANSWER_METRICS[name]:
                raise ValueError(f"metric_for_best_model is {best}: {why}")
            logger.info("answers are scored without %s: %s", name, why)
        return names

    def _reader(self) -> PreTrainedTokenizerBase:
        if self.processing_class is None:
            raise ValueError("answers are texts, and the trainer has no tokenizer: pass it as processing_class")
        return cast(PreTrainedTokenizerBase, self.processing_class)

    def _best_metric(self) -> str:
        """The name of ``metric_for_best_model``, without those of evaluation sets."""
        name = (self.args.metric_for_best_model or "").removeprefix("eval_")
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
        return next((name.removeprefix(f"{each}_") for each in sets if name.startswith(f"{each}_")), name)

    # ---- when ----

    def _needs_answers(self) -> bool:
        """Whether the evaluation that begins now has to answer prompts."""
        if not self._answers:
            return False
        best = self._best_metric()
        measured = {name for kind in self.answer_metrics for name in ANSWER_METRICS[kind]} | set(DECODING_METRICS)
        every = self.evaluation_args.generation_eval_steps == 0
        return every or not self.is_in_train or best in measured or self._is_due()

    def _is_due(self) -> bool:
        steps = self.evaluation_args.generation_eval_steps or 0
        return steps > 0 and self.state.global_step > 0 and self.state.global_step % steps == 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._answer_if_due()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._answer_if_due()  # a checkpoint knows all lines of the log up to its step
        super()._save_checkpoint(*args, **kwargs)

    def _answer_if_due(self) -> None:
        """At a step that is not evaluated; once for each step."""
        if self._is_due() and not self._stopping and self._known.step != self.state.global_step:
            self._answer_alone()

    def _run_epoch(self, **how: Any) -> None:  # type: ignore[override]  # as the parent has it
        if self._may_owe:
            self._may_owe = False
            self._answer_late()
        super()._run_epoch(**how)

    def _answer_late(self) -> None:
        """What was due at the step of the checkpoint that the run goes on from, and was left because the run was stopped."""
        step = self.state.global_step
        made = any(line["step"] == step and any(map(_of_answers, line)) for line in self.state.log_history)
        if self._is_due() and not made and not self._owes_evaluation:
            self._answer_alone()

    def _answer_alone(self) -> None:
        found: dict[str, float] = {}
        data = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        for name, dataset in data.items():
            found |= self._answered(dataset, "eval" if name is None else f"eval_{name}")
        self.log(found)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; an evaluation at which prompts are due has the metrics of their answers too."""
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if description == "Evaluation" and self._needs_answers():
            prefix = kwargs.get("metric_key_prefix", "eval")
            cast(dict[str, float], output.metrics).update(self._answered(dataloader.dataset, prefix))
        return output

    # ---- answers ----

    def _answered(self, dataset: Any, prefix: str) -> dict[str, float]:
        """The metrics of the answers to the first prompts of ``dataset``; those of a step of the training are made once."""
        step = self.state.global_step
        if self._known.step != step or not self.is_in_train or not self._known.in_train:
            self._known = _Known(step, self.is_in_train)
        known, values = self._known.values.get(prefix, (None, {}))
        if known is not None and known is dataset:
            return values
        asked = self.evaluation_args
        found = self._predict(dataset, asked.generation_eval_samples, asked.max_generation_seconds)
        self.predictions, values = score_predictions(found, self.answer_metrics)
        logger.info("step %d: %d prompts answered", step, len(found))
        if found and self.is_world_process_zero():
            self._show(prefix)
        if asked.max_generation_seconds is not None:
            values["answered"] = len(found)
        named = {f"{prefix}_{name}": value for name, value in values.items()}
        self._known.values[prefix] = dataset, named
        return named

    def _predict(self, dataset: Any, samples: int, seconds: float | None = None) -> list[Prediction]:
        """Answers to the first prompts of ``dataset``, the same list in all processes; all call this."""
        tokenizer = self._reader()
        rank, world = self.args.process_index, self.args.world_size
        size = self.evaluation_args.generation_batch_size
        with raised_together():
            prompts = prompts_of(_rows(dataset), tokenizer, samples)
        if not prompts:
            return []
        start, together = time.monotonic(), self._together if self.is_sharded and world > 1 else None

        def out_of_time() -> bool:
            return seconds is not None and any(gathered(time.monotonic() - start > seconds))

        model = self.accelerator.unwrap_model(self.model)
        answerer = Answerer(
            model,
            tokenizer,
            max_new_tokens=self.evaluation_args.generation_max_new_tokens,
            autoregressive=self.data_args.objective != "wedlm",
            together=together,
        )
        batches = -(-len(prompts) // (size * world))
        bar = progress_bar(batches, "answers", self.args, leave=False)
        with self.averaged(), self.compute_loss_context_manager(), bar:
            found = answer_prompts(
                prompts[rank::world],
                answerer,
                batch_size=size,
                batches=batches,
                out_of_time=out_of_time,
                answered=bar.update,
            )
        everywhere = sorted((each for share in gathered(found) for each in share), key=lambda each: each.row)
        if len(everywhere) < len(prompts):
            logger.warning("%d of %d prompts were answered in the time that there was", len(everywhere), len(prompts))
        return everywhere

    def _together(self, busy: bool) -> bool:
        return any(gathered(busy))

    # ---- what is shown ----

    def _show(self, prefix: str) -> None:
        """The answers in the log, the file of predictions, and what else the run reports to."""
        step = self.state.global_step
        for each in self.predictions[:_SHOWN]:
            if (prefix, each.row) not in self._shown:  # question and reference once
                texts = each.prompt[-_SHOWN_TEXT:], each.reference[:_SHOWN_TEXT]
                logger.info("row %d: %r\n  reference: %r", each.row, *texts)
            self._shown.add((prefix, each.row))
            logger.info("row %d is answered: %r", each.row, each.answer[:_SHOWN_TEXT])
        # Answers of the best checkpoint, once it is loaded, are those of its step.
        more: dict[str, Any] = {"step": step if self._known.in_train or self._best_step is None else self._best_step}
        more |= {} if prefix == "eval" else {"split": prefix.removeprefix("eval_")}
        records = [each.record(**more) for each in self.predictions]
        _write_predictions(Path(str(self.args.output_dir), PREDICTIONS), records)
        for callback in self.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                text = "\n\n---\n\n".join(_markdown(each) for each in self.predictions[:8])
                writer.add_text(f"{prefix}/answers", text, step)
            elif type(callback).__name__ == "WandbCallback" and getattr(callback, "_wandb", None) is not None:
                columns = ["row", "prompt", "reference", "answer"]
                values = [[getattr(each, name) for name in columns] for each in self.predictions]
                table = callback._wandb.Table(columns=columns, data=values)
                callback._wandb.log({f"{prefix}/answers": table, "train/global_step": step})

    # ---- does the model stop? ----

    def check_stopping(self, samples: int | None = None) -> Mapping[str, Any] | None:
        """Answer a few prompts and say how many answers ended by themselves; written to ``stop_check.json``.

        Args:
            samples: prompts; by default ``stop_check_samples``. Answers that the last evaluation has are not made again.

        Returns:
            what is written: ``checked``, ``stopped``, ``max_new_tokens``, ``answers``; None where there is nothing to ask.
        """
        asked = self.evaluation_args
        samples = asked.stop_check_samples if samples is None else samples
        if not samples or self.data_args.task_type == "pretrain":
            return None
        is_new = self._known.step == self.state.global_step and not self._known.in_train
        found = self.predictions[:samples] if is_new else []
        if len(found) < samples:
            logger.info("whether the model stops by itself: up to %d prompts are answered", samples)
            found = self._predict(self._some_data(), samples) or found
        if not found:
            logger.info("no prompts are at hand: whether the model stops by itself is not checked")
            return None
        stopped = sum(each.stopped for each in found)
        limit = asked.generation_max_new_tokens
        logger.log(
            logging.INFO if stopped else logging.WARNING,
            "%d of %d answers ended by themselves within %d tokens%s",
            stopped, len(found), limit, "" if stopped else ": the model does not stop",
        )  # fmt: skip
        names = ("prompt", "answer", "tokens", "stopped")
        answers = [{name: getattr(each, name) for name in names} for each in found]
        result = {"checked": len(found), "stopped": stopped, "max_new_tokens": limit, "answers": answers}
        if self.is_world_process_zero():
            text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
            write_file(Path(str(self.args.output_dir), STOP_CHECK), text)
        return result

    @property
    def owes_stop_check(self) -> bool:
        """Whether the result has not been looked at, and can be."""
        if not self.evaluation_args.stop_check_samples or self.data_args.task_type == "pretrain":
            return False
        made = Path(str(self.args.output_dir), STOP_CHECK).is_file()
        return not made and bool(prompts_of(_rows(self._some_data()), self._reader(), 1))

    def _some_data(self) -> Any:
        """Evaluation data, else training data that are at hand."""
        data = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        return next(iter(data.values())) if isinstance(data, dict) else data


@dataclass
class _Known:
    """What was answered at a step: by the prefix of its metrics the data set and these."""

    step: int = -1
    in_train: bool = False
    values: dict[str, tuple[Any, dict[str, float]]] = field(default_factory=dict)


class _GoOn(TrainerCallback):
    """Of what an earlier training has answered nothing counts."""

    def __init__(self, trainer: AnsweringTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._known = _Known()
        self.trainer._may_owe = state.global_step > 0


def _of_answers(name: str) -> bool:
    """Whether a key of the log is of answers."""
    return name.startswith("eval_") and name.endswith(DECODING_METRICS[1])


def _write_predictions(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Put records of one step and data set behind those that are there, in place of older ones of that step."""
    own = records[0]["step"], records[0].get("split")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    there = [
        json.loads(line) for line in text.split("\n") if line
    ]  # not splitlines, which knows more ends of lines than JSON
    kept = [record for record in there if (record["step"], record.get("split")) != own]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in [*kept, *records]))


def _rows(dataset: Any) -> Iterable[Mapping[str, Any]]:
    """Token rows of a data set, in their order; none of data that are read as they are used."""
    if not isinstance(dataset, Bins):
        rows = getattr(dataset, "examples", ())
        return (row for row in rows if isinstance(row, Mapping) and {"input_ids", "labels"} <= set(row))
    rows = dataset.rows
    return rows if isinstance(rows, Sequence) else rows.with_format(None)


def _markdown(prediction: Prediction) -> str:
    return f"**{prediction.prompt}**\n\nreference: {prediction.reference}\n\nanswer: {prediction.answer}"
