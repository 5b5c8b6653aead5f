"""DPOTrainer: learning from preference pairs, on the road of ``SFTTrainer``.

A pair's loss is no sum of token losses, but its gradient is a weighted sum of theirs: with L the loss of a micro-batch, row i
enters with the weight dL / d nll_i. So the head scores the rows once to learn these weights and once more with them
(``models/head.py``), and everything else is as for any other objective: packed rows, chunks of the head, engines, resuming.

Shapes: R scored rows, P pairs, 2P answers (the chosen one of a pair before its rejected one).

    loss = sum_pairs loss_pair / N_pairs + auxiliary * sum of the chosen answers' nll / N_chosen tokens

with N of the whole step over all ranks.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from hf_sft.arguments import DataArguments, DPOArguments, ModelArguments
from hf_sft.attention.selfcheck import install_layout
from hf_sft.checks import check_dpo, check_values
from hf_sft.collators import Batch
from hf_sft.data.bins import Bins
from hf_sft.data.cache import default_cache_dir
from hf_sft.metrics import PairSums, sum_dtype
from hf_sft.models.head import HeadScorer
from hf_sft.models.loading import load_model
from hf_sft.models.vocabulary import vocabulary_rows
from hf_sft.models.wrappers import base_model, evaluating
from hf_sft.objectives import Objective, Preference
from hf_sft.preference_losses import REFERENCE_FREE, answer_sums
from hf_sft.training.reference import (
    NOTE,
    AdapterOff,
    Precomputed,
    Reference,
    SecondModel,
    adapter_off_problem,
    is_new_adapter,
)
from hf_sft.training.setup import place_model
from hf_sft.training.trainer import SFTTrainer

logger = logging.getLogger(__name__)

_OF_BASE = "the adapter has been trained before: the reference is its base, not the model as training finds it"


class DPOTrainer(SFTTrainer):
    """Learn to prefer the chosen answers of pairs to the rejected ones: DPO and its kin (``hf_sft.preference_losses``).

    Args:
        model, args, train_dataset, eval_dataset, processing_class, data_args, peft_config, ...: as for ``SFTTrainer``; the data
            are preference pairs in any known format, or tokenised ones (``prompt_ids``, ``chosen_ids``, ``rejected_ids``).
        ref_model: the reference, its folder or hub name, or ``ModelArguments`` to load it with; by default as ``dpo_args`` says.
        dpo_args: the loss and its reference.

    Raises:
        ValueError: as ``SFTTrainer``; a reference that cannot be had.
    """

    objective: Preference  # type: ignore[assignment]
    _tasks = ("dpo",)
    _learned = "pair"
    _goes_on = _has_begun = False
    reference_kind: str | None = None

    def __init__(
        self,
        model: nn.Module | str,
        args: Any = None,
        *,
        ref_model: nn.Module | ModelArguments | str | None = None,
        dpo_args: DPOArguments | None = None,
        data_args: DataArguments | None = None,
        **options: Any,
    ) -> None:
        if data_args is not None and data_args.task_type == "sft":  # its default
            data_args = replace(data_args, task_type="dpo")
        self.dpo_args = _checked(dpo_args, data_args, ref_model)
        ref_model = ref_model if ref_model is not None else self.dpo_args.reference_model_name_or_path
        for name in ("compute_metrics", "data_collator", "wedlm_args"):
            if options.get(name) is not None:
                raise ValueError(
                    f"DPOTrainer takes no {name}: batches are pairs of answers, whose logits are never whole"
                )
        super().__init__(model, args, data_args=data_args, **options)
        self.reference: Reference | None = self._make_reference(ref_model)

    # ---- what SFTTrainer asks of its objective ----

    def _make_objective(self, *_: Any) -> Objective:
        return Preference.of(self.dpo_args)

    def _new_sums(self, device: torch.device) -> PairSums:
        return PairSums(device)

    # ---- loss ----

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of one micro-batch of pairs; arguments as for ``SFTTrainer.compute_loss``."""
        items, micro_batches = self._items(inputs, num_items_in_batch)
        # 1. what the reference says of the answers.
        reference = None if self.reference is None else self.reference.logps(model, inputs)
        # 2. one forward of the whole model; the rows' losses say with which weights they enter the gradient.
        pairs = _PairScores(self.objective, inputs, reference, items)
        outputs, scores, router_loss = self._score(model, inputs, pairs.weigh)
        # 3. sums for the log, without waiting for the device.
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(pairs.sums, inputs["num_tokens"])
        if model.training:
            self.watch.add(self.state.global_step + 1, inputs["doc_origins"], pairs.each)
        # 4. the value is the pairs', the gradient the rows'; engines average gradients over ranks, and N is already global.
        loss = pairs.loss.to(scores.loss) + (scores.loss - scores.loss.detach()) + router_loss / micro_batches
        loss = loss * (self.args.world_size if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

    def _answer_logps(self, scorer: HeadScorer, model: nn.Module, inputs: Batch) -> Tensor:
        """[2P] log-probabilities of a batch's answers, in nats; without dropout and gradients."""
        targets = inputs["target_ids"]
        ones = torch.ones(len(targets), device=targets.device)
        with torch.no_grad(), evaluating(model), self.accelerator.autocast():
            with scorer.scoring(inputs["logits_to_keep"], targets, ones) as request:
                outputs = model(**self._model_inputs(inputs))
            nll = scorer.scores(request, outputs.logits).nll
        return -answer_sums(nll.to(sum_dtype(nll.device)), inputs["target_doc"], 2 * len(inputs["pair_numbers"]))

    def _policy_logps(self, model: nn.Module, inputs: Batch) -> Tensor:
        return self._answer_logps(self.scorer, model, inputs)

    # ---- reference ----

    def _make_reference(self, ref_model: nn.Module | ModelArguments | str | None) -> Reference | None:
        if not self.objective.loss.needs_reference:
            return None
        model = cast(nn.Module, self.model)
        kind = self._reference_kind(model, ref_model)
        if kind == "adapter_off":
            return AdapterOff(self._policy_logps, cast(PeftModel, model))
        if kind == "precomputed":
            args = self.args
            cache = Path(self.data_args.data_cache_dir or default_cache_dir()).expanduser()
            settings = {"layout": self.layout.name, **{name: getattr(args, name) for name in ("bf16", "fp16")}}
            folders = cache, Path(str(args.output_dir), NOTE)
            return Precomputed(self._compute_logps, folders, settings, rebuild=self.data_args.rebuild_cache)
        return self._second_model(ref_model)

    def _reference_kind(self, model: nn.Module, ref_model: Any) -> str:
        """``dpo_reference``, and what auto chooses.

        Raises:
            ValueError: what is asked for cannot be had.
        """
        asked, problem = self.dpo_args.dpo_reference, adapter_off_problem(model)
        live = self.train_dataset is not None and not isinstance(self.train_dataset, Bins)
        goes_on = problem is None and not is_new_adapter(cast(PeftModel, model))
        if asked == "adapter_off" and problem:
            raise ValueError(f"dpo_reference is adapter_off, and {problem}: choose model or precomputed")
        if asked == "precomputed" and live:
            raise ValueError(
                "dpo_reference is precomputed, and the training data are tokenised while the model trains: choose model (or "
                "adapter_off), or leave out streaming and lazy_preprocess"
            )
        kind, why = asked, "as asked"
        if asked == "auto":
            if ref_model is not None:
                kind, why = "model", "one is named"
            elif problem is None and not goes_on:
                kind, why = "adapter_off", "the adapter is new"
            elif live and isinstance(model, PeftModel):
                raise ValueError(
                    "dpo_reference is auto, the adapter has been trained before, and data that are tokenised while the model "
                    "trains have no precomputed log-probabilities: choose adapter_off or model, and the base is the reference, "
                    "or leave out streaming and lazy_preprocess"
                )
            elif live:
                kind, why = "model", "the data are tokenised while the model trains"
            else:
                kind, why = "precomputed", problem or "the adapter has been trained before"
        elif goes_on and (kind == "adapter_off" or (kind == "model" and _is_own(ref_model, model))):
            logger.warning(_OF_BASE)
        logger.info("the reference is %s (%s)", kind, why)
        self.reference_kind = kind
        return kind

    def _second_model(self, ref_model: nn.Module | ModelArguments | str | None) -> SecondModel:
        args, base = self.args, base_model(cast(nn.Module, self.model))
        if args.fsdp or is_deepspeed_zero3_enabled():
            raise ValueError(
                "a second model as the reference stands whole on every device, which ZeRO-3 and FSDP2 are there to avoid: choose "
                "dpo_reference precomputed, or adapter_off with an adapter"
            )
        ref_model = base.config._name_or_path if ref_model is None else ref_model
        if isinstance(ref_model, str):
            if not ref_model:
                raise ValueError(
                    "dpo_reference is model, and the model has no name to load it again by: pass ref_model"
                )
            ref_model = ModelArguments(model_name_or_path=ref_model)
        if isinstance(ref_model, ModelArguments):
            dtype: Any = str(base.dtype).removeprefix("torch.")
            tokenizer = cast(Any, self.processing_class)
            ref_model = load_model(replace(ref_model, dtype=dtype), tokenizer=tokenizer, training=args)
        if base_model(ref_model) is base:
            raise ValueError("ref_model is the model that is trained: pass a copy of it, or leave it out")
        if type(base_model(ref_model)) is not type(base):
            raise ValueError(
                f"ref_model is a {type(base_model(ref_model)).__name__} and the model a {type(base).__name__}: the reference "
                "must be of the same architecture"
            )
        rows = vocabulary_rows(base_model(ref_model)), vocabulary_rows(base)
        if rows[0] != rows[1]:
            raise ValueError(
                f"ref_model has {rows[0]} rows in its vocabulary and the model {rows[1]}: the reference must read the same tokens"
            )
        place_model(ref_model, args)
        install_layout(ref_model, self.layout.backend)
        scorer = HeadScorer(ref_model)
        scorer.chunked &= self.scorer.chunked
        return SecondModel(lambda model, inputs: self._answer_logps(scorer, model, inputs), ref_model)

    def _compute_logps(self, model: nn.Module, bins: Bins) -> Tensor:
        """[D, 2] the log-probabilities of all pairs of a data set; every process does its share."""
        found = torch.zeros(len(bins.lengths), 2, dtype=sum_dtype(self.args.device), device=self.args.device)
        loader = self._loader(bins, self.args.eval_batch_size, evaluation=True)
        for batch in tqdm(loader, desc="reference", disable=None if self.args.process_index == 0 else True):
            batch = cast(Batch, self._prepare_inputs(batch))
            found[batch["pair_numbers"]] = self._policy_logps(model, batch).view(-1, 2)
        return self.accelerator.reduce(found, "sum") if self.args.world_size > 1 else found

    def _go_on_from(self, checkpoint: str | None) -> None:
        super()._go_on_from(checkpoint)
        self._goes_on = checkpoint is not None
        if isinstance(self.reference, Precomputed):
            self.reference.remember(cast(nn.Module, self.model))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if isinstance(self.reference, Precomputed):
            evaluation = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            known = [each for each in (self.train_dataset, *evaluation) if isinstance(each, Bins)]
            self.reference.prepare(self.model_wrapped, known, untrained=not self._goes_on and not self._has_begun)
        self._has_begun = True
        return prepared

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Score one batch of pairs into the sums."""
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, cast(Batch, self._prepare_inputs(inputs)))
        return None, None, None

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """``SFTTrainer.evaluation_loop``; precomputed log-probabilities of a data set that is new are computed first."""
        if isinstance(self.reference, Precomputed) and isinstance(dataloader.dataset, Bins):
            untrained = not self._has_begun
            if untrained:
                self.reference.remember(cast(nn.Module, self.model))
            self.reference.prepare(self.model_wrapped, [dataloader.dataset], untrained=untrained)
        return super().evaluation_loop(dataloader, description, *args, **kwargs)


def _is_own(ref_model: Any, model: nn.Module) -> bool:
    """Whether the second model is to be the one that the policy's base was loaded from."""
    name = ref_model.model_name_or_path if isinstance(ref_model, ModelArguments) else ref_model
    return name is None or (isinstance(name, str) and name == base_model(model).config._name_or_path)


class _PairScores:
    """The losses of a micro-batch's pairs, once the rows' nll are known.

    Args:
        objective: the loss and its coefficients.
        batch: of ``PairCollator``.
        reference: [2P] log-probabilities of the answers, or None.
        items: [2] N of pairs and of chosen tokens.

    Attributes:
        loss: [] of the micro-batch.
        sums: name -> [] the sums over its pairs that ``PairTotals`` has.
        each: [P] the loss of each pair.
    """

    loss: Tensor
    each: Tensor
    sums: dict[str, Tensor]

    def __init__(self, objective: Preference, batch: Batch, reference: Tensor | None, items: Tensor) -> None:
        self.objective, self.reference, self.items = objective, reference, items
        self.answer_R, self.answers = batch["target_doc"], 2 * len(batch["pair_numbers"])

    def weigh(self, nll_R: Tensor) -> Tensor:
        """[R] d loss / d nll_i."""
        loss, dtype = self.objective.loss, sum_dtype(nll_R.device)
        with torch.enable_grad():
            nll = nll_R.detach().to(dtype).requires_grad_()
            logps = -answer_sums(nll, self.answer_R, self.answers)
            tokens = answer_sums(torch.ones_like(nll), self.answer_R, self.answers)
            rewards = loss.rewards(logps, self.reference, tokens)
            losses = loss.losses(rewards)
            chosen_nll = -logps[::2].sum()
            n_pairs, n_chosen = self.items.clamp_min(1e-9)
            total = losses.sum() / n_pairs + self.objective.auxiliary * chosen_nll / n_chosen
            (weights,) = torch.autograd.grad(total, nll)
        self.loss = total.detach()
        chosen, rejected = rewards.detach().unbind(1)
        logps = logps.detach().view(-1, 2)
        self.each = losses.detach()
        preferred = (chosen > rejected).to(dtype) + 0.5 * (chosen == rejected)
        columns = losses.detach(), torch.ones_like(chosen), chosen, rejected, preferred, logps[:, 0], logps[:, 1]
        values = [column.sum() for column in columns] + [chosen_nll.detach(), tokens.view(-1, 2)[:, 0].sum()]
        self.sums = dict(zip(PairSums.names, values, strict=True))
        return weights.to(nll_R.dtype)


def _checked(dpo: DPOArguments | None, data: DataArguments | None, ref_model: Any) -> DPOArguments:
    """The user's arguments, or the defaults.

    Raises:
        ValueError: settings that do not fit together.
    """
    dpo = dpo or DPOArguments()
    given = {entry.name for entry in fields(dpo) if getattr(dpo, entry.name) != entry.default}
    data = data if data is not None and data.task_type == "dpo" else DataArguments(task_type="dpo")
    found = [*check_values(dpo)] or [*check_dpo(dpo, data, given)]
    if ref_model is not None:
        if dpo.dpo_loss_type in REFERENCE_FREE:
            found.append(f"ref_model is given, and dpo_loss_type {dpo.dpo_loss_type} needs no reference: leave it out")
        if dpo.dpo_reference not in ("auto", "model"):
            found.append(f"ref_model is given and dpo_reference is {dpo.dpo_reference}: leave one of them out")
        if dpo.reference_model_name_or_path is not None:
            found.append("ref_model and reference_model_name_or_path are both given: leave one of them out")
    if found:
        raise ValueError("; ".join(found))
    return dpo
