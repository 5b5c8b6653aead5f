"""SFTTrainer: the Hugging Face Trainer with one short ``compute_loss`` for every objective.

Shapes: R scored rows of a micro-batch, K = 2 kinds of targets (next token, mask slot).

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
from functools import cached_property, partial
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from hf_sft.arguments import DataArguments, ModelArguments
from hf_sft.attention.layout import Layout
from hf_sft.attention.selfcheck import base_model, choose_layout
from hf_sft.checkpoints import verify_adapter, verify_weights
from hf_sft.collators import CONTRACT_KEYS, IGNORE, Batch, CausalCollator, LabelsCollator
from hf_sft.data.bins import BinLoader, Bins, BinSampler, Examples
from hf_sft.data.chat import end_of_turn_id
from hf_sft.data.pipeline import rows_from_examples
from hf_sft.losses import RowScores, score_logits
from hf_sft.metrics import TokenSums, TokenTotals
from hf_sft.models.adapters import save_adapter
from hf_sft.models.head import HeadScorer
from hf_sft.models.loading import check_max_seq_length, load_model, load_tokenizer
from hf_sft.training_arguments import TrainingArguments, problems

logger = logging.getLogger(__name__)


class SFTTrainer(Trainer):
    """Fine-tune a causal LM on conversations or token rows.

    Args:
        model: a model, or a folder or hub name to load in float32.
        args: training arguments; ours or plain ``transformers.TrainingArguments``.
        data_args: lengths, packing, template and supervision; the defaults suit most data.
        train_dataset, eval_dataset: lists or ``datasets.Dataset`` of conversations (any known format) or of token rows
            ``{"input_ids", "labels"}``; ``eval_dataset`` may be a dict of several.
        processing_class: the tokenizer; loaded with the model if that is given by name.
        peft_config: a PEFT config to wrap the model with.
        attention_backend: ``auto`` or the name of a backend for packed documents.
        data_collator: replaces ours; must return ``input_ids`` and ``labels`` of the same shape (one document per row).
        compute_metrics, callbacks, optimizers, ...: as in ``Trainer``. With ``compute_metrics`` evaluation runs on padded
            batches and collects logits.

    Raises:
        ValueError: on arguments that cannot be honoured, data that cannot be learned from, a model that cannot be packed
            although that was asked for.
    """

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
        peft_config: Any = None,
        attention_backend: str = "auto",
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ) -> None:
        args = TrainingArguments() if args is None else args
        self.data_args = DataArguments() if data_args is None else data_args
        packing = False if data_collator is not None else self.data_args.packing
        _check_arguments(args, packing)
        if isinstance(model, str):
            named = ModelArguments(model_name_or_path=model)
            processing_class = processing_class or load_tokenizer(named)
            model = load_model(named, tokenizer=processing_class, training=args)
        if peft_config is not None:
            model = cast(nn.Module, get_peft_model(cast(PreTrainedModel, model), peft_config))
        check_max_seq_length(base_model(model), self.data_args.max_seq_length)
        if getattr(base_model(model), "quantization_method", None) is None:
            model.to(args.device)

        self.scorer = HeadScorer(model)
        self.layout = choose_layout(model, attention_backend, packing)
        logger.info("documents are laid out %s (%s)", self.layout.name, self.layout.reason)
        if not self.scorer.verify(model, torch.arange(16, device=args.device)[None]):
            logger.info(
                "the head of this model is not a plain linear layer: its logits are computed whole, on scored rows"
            )

        self.coefficients = (1.0, 0.0)
        # Functions on logits expect one document per row.
        self.collects_logits = trainer_options.get("compute_metrics") is not None
        self._user_collator = data_collator
        self._pad = getattr(processing_class, "pad_token_id", None) or 0
        self._train_sums = self._eval_sums = TokenSums(args.device)
        self._clock = time.perf_counter()
        packed = self.layout.backend is not None
        train = None if train_dataset is None else self._bins(train_dataset, processing_class, packed)
        evaluation: Any = None
        if isinstance(eval_dataset, dict):
            evaluation = {name: self._eval_bins(part, processing_class) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            evaluation = self._eval_bins(eval_dataset, processing_class)
        super().__init__(
            model,
            args,
            None,
            train,
            evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            **trainer_options,
        )
        # The loss is divided by N of the whole step here, and by nothing else in Trainer.
        self.loss_is_scaled_for_ga = True
        _stop_at_end_of_turn(self._base, processing_class)

    # ---- data ----

    def _bins(self, dataset: Any, tokenizer: Any, packed: bool) -> Bins | Examples:
        if self._user_collator is not None:
            return Examples(dataset)
        if isinstance(dataset, Bins):
            return dataset
        rows = rows_from_examples(dataset, tokenizer, data=self.data_args)
        return Bins(rows, self.data_args.max_seq_length if packed else None)

    def _eval_bins(self, dataset: Any, tokenizer: Any) -> Bins | Examples:
        return self._bins(dataset, tokenizer, self.layout.backend is not None and not self.collects_logits)

    def _loader(self, dataset: Bins | Examples, batch_size: int, *, accumulation: int, seed: int | None) -> BinLoader:
        args = self.args
        sampler = BinSampler(
            len(dataset),
            batch_size,
            accumulation=accumulation,
            world=args.world_size,
            rank=args.process_index,
            seed=seed,
        )
        packed = self.layout.backend is not None and getattr(dataset, "capacity", None) is not None
        collator: Callable[[Any], Batch] = CausalCollator(packed, self._pad)
        if self._user_collator is not None:
            collator = LabelsCollator(self._user_collator, dataset[0, 0][0])
        workers = args.dataloader_num_workers
        return BinLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index) if workers else None,
        )

    def get_train_dataloader(self) -> BinLoader:
        """This rank's micro-batches; the order is drawn from (``data_seed`` or ``seed``, epoch)."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        shuffled = self.args.train_sampling_strategy != "sequential"
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        accumulation = self.args.gradient_accumulation_steps
        return self._loader(
            cast(Bins, self.train_dataset),
            self._train_batch_size,
            accumulation=accumulation,
            seed=seed if shuffled else None,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BinLoader:
        """This rank's batches of ``eval_dataset`` (data, the name of one of several, or by default the Trainer's own)."""
        if isinstance(eval_dataset, str):
            eval_dataset = cast(dict[str, Any], self.eval_dataset)[eval_dataset]
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        if not isinstance(dataset, (Bins, Examples)):
            dataset = self._eval_bins(dataset, self.processing_class)
        return self._loader(dataset, self.args.eval_batch_size, accumulation=1, seed=None)

    def get_test_dataloader(self, test_dataset: Any) -> BinLoader:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def num_examples(self, dataloader: Any) -> int:
        """Documents, not bins."""
        return sum(len(item) for item in getattr(dataloader.dataset, "bins", ())) or len(dataloader.dataset)

    # ---- loss ----

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        """[2] N per kind: summed over the micro-batches on the host, then over ranks."""
        if not batch_samples:
            return None
        items = sum(batch["num_items"] for batch in batch_samples).to(device)
        return self.accelerator.reduce(items, "sum") if self.args.world_size > 1 else items

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
            num_items_in_batch: [2] N per kind, of the whole step; by default this batch's own.
        """
        # 1. weight_i * c_kind / N_kind for every row; a kind that nothing asks for counts zero.
        items = inputs["num_items"] if num_items_in_batch is None else num_items_in_batch
        share = torch.where(items > 0, items.new_tensor(self.coefficients) / items.clamp_min(1e-9), 0.0).float()
        kind_R, weight_R = inputs["target_kind"], inputs["target_weight"]
        # 2. one forward of the whole model; its head scores the rows and returns none.
        with self.scorer.scoring(inputs["logits_to_keep"], inputs["target_ids"], weight_R * share[kind_R]) as request:
            outputs = model(**self._model_inputs(inputs))
        scores = self.scorer.scores(request, outputs.logits)
        # 3. sums for the log, without waiting for the device.
        self._add_scores(model, inputs, scores)
        # 4. engines average gradients over ranks, and N is already global.
        loss = scores.loss * (self.args.world_size if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

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
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(scores, batch["target_weight"], batch["target_kind"], batch["num_tokens"])

    def _prepare_input(self, data: Any) -> Any:
        # DeepSpeed's cast of every float tensor to the engine's type would round the weights of the rows.
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs: Batch) -> int:
        """6 x parameters x tokens (Kaplan et al., arXiv 2001.08361), padding not counted; parameters are counted once."""
        return 6 * self._parameter_count * inputs["num_tokens"]

    @cached_property
    def _parameter_count(self) -> int:
        return self._base.num_parameters(exclude_embeddings=True)

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Score one batch into the sums; logits and labels are returned only where ``compute_metrics`` wants them."""
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
        return None, logits, labels

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """``Trainer.evaluation_loop`` with sums over all tokens divided once, instead of a mean of batch means."""
        self._eval_sums = TokenSums(self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        totals = TokenSums.totals(self._reduced(self._eval_sums))
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = cast(dict[str, float], output.metrics)
        metrics.update(
            {
                f"{prefix}_loss": totals.loss(self.coefficients),
                f"{prefix}_perplexity": totals.perplexity(),
                f"{prefix}_token_accuracy": totals.accuracy(),
                f"{prefix}_supervised_tokens": int(totals.rows[0]),
            }
        )
        return output._replace(num_samples=self.num_examples(dataloader))

    def _reduced(self, sums: TokenSums) -> Tensor:
        state = sums.state()
        return self.accelerator.reduce(state, "sum") if self.args.world_size > 1 else state

    # ---- log ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train``, with the sums of the log at zero."""
        self._train_sums, self._clock = TokenSums(self.args.device), time.perf_counter()
        self._run_state = self._train_sums.state()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Make the losses of training means over tokens; add token accuracy, tokens per second and supervised share."""
        if "loss" in logs:
            totals = self._drain()
            logs["loss"] = totals.loss(self.coefficients)
            logs["token_accuracy"] = totals.accuracy()
            logs["tokens_per_second"] = totals.tokens / (time.perf_counter() - self._clock)
            logs["supervised_share"] = totals.supervised_share
            self._clock = time.perf_counter()
        elif "train_loss" in logs:
            self._drain()
            logs["train_loss"] = TokenSums.totals(self._run_state).loss(self.coefficients)
        super().log(logs, start_time)

    def _drain(self) -> TokenTotals:
        """The sums since the last call, over all ranks; they go into those of the whole run."""
        state = self._reduced(self._train_sums)
        self._run_state = self._run_state + state
        self._train_sums = TokenSums(self.args.device)
        return TokenSums.totals(state)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._stopped_clock():
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._stopped_clock():
            super()._save_checkpoint(*args, **kwargs)

    @contextmanager
    def _stopped_clock(self) -> Iterator[None]:
        """Evaluation and saving do not count in tokens per second."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

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


def _check_arguments(args: Any, packing: bool | None) -> None:
    """Refuse what is not honoured, and settle what Trainer would decide wrongly for us."""
    if found := problems(args, packing=packing is not False):
        raise ValueError("these training arguments cannot be honoured:\n  " + "\n  ".join(found))
    if args.n_gpu > 1:
        # Trainer would wrap the model in nn.DataParallel, which cuts a packed row [1, T] along its first axis.
        logger.warning(
            "%d GPUs are visible and no launcher was used: training on one (use torchrun for all)", args.n_gpu
        )
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # compute_loss keeps every part of the forward in the graph


def _stop_at_end_of_turn(model: PreTrainedModel, tokenizer: Any) -> None:
    """``generate`` must stop where the model learns to stop; templates end turns with other tokens than the tokenizer's eos."""
    token = None if getattr(tokenizer, "chat_template", None) is None else end_of_turn_id(tokenizer)
    config = model.generation_config
    if token is None or config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token not in known:
        config.eos_token_id = [token, *(eos for eos in known if eos is not None)]
