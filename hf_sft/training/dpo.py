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
from dataclasses import fields
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
from hf_sft.models.wrappers import base_model, evaluating
from hf_sft.objectives import Objective, Preference
from hf_sft.preference_losses import answer_sums
from hf_sft.training.reference import (
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


class DPOTrainer(SFTTrainer):
    """Learn to prefer the chosen answers of pairs to the rejected ones: DPO and its kin (``hf_sft.preference_losses``).

    Args:
        model, args, train_dataset, eval_dataset, processing_class, data_args, peft_config, ...: as for ``SFTTrainer``; the data
            are preference pairs in any known format, or tokenised ones (``prompt_ids``, ``chosen_ids``, ``rejected_ids``).
        ref_model: the reference, or its folder or hub name; by default as ``dpo_args.dpo_reference`` says.
        dpo_args: the loss and its reference.

    Raises:
        ValueError: as ``SFTTrainer``; a reference that cannot be had.
    """

    objective: Preference  # type: ignore[assignment]
    _tasks = ("dpo",)
    _goes_on = False
    reference_kind: str | None = None

    def __init__(
        self,
        model: nn.Module | str,
        args: Any = None,
        *,
        ref_model: nn.Module | str | None = None,
        dpo_args: DPOArguments | None = None,
        data_args: DataArguments | None = None,
        **options: Any,
    ) -> None:
        self.dpo_args = _checked(dpo_args, data_args, ref_model)
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

    def _make_reference(self, ref_model: nn.Module | str | None) -> Reference | None:
        if not self.objective.loss.needs_reference:
            return None
        model = cast(nn.Module, self.model)
        kind = self._reference_kind(model, ref_model)
        if kind == "adapter_off":
            return AdapterOff(self._policy_logps, cast(PeftModel, model))
        if kind == "precomputed":
            args = self.args
            cache = Path(self.data_args.data_cache_dir or default_cache_dir()).expanduser()
            precision = {name: getattr(args, name) for name in ("bf16", "fp16")}
            return Precomputed(self._compute_logps, cache, {"layout": self.layout.name, **precision})
        return self._second_model(ref_model)

    def _reference_kind(self, model: nn.Module, ref_model: Any) -> str:
        """``dpo_reference``, and what auto chooses.

        Raises:
            ValueError: what is asked for cannot be had.
        """
        asked, problem = self.dpo_args.dpo_reference, adapter_off_problem(model)
        live = self.data_args.is_live
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
            elif problem is None and is_new_adapter(cast(PeftModel, model)):
                kind, why = "adapter_off", "the adapter is new"
            else:
                kind = "model" if live else "precomputed"
                why = problem or "the adapter has been trained before"
        elif kind == "adapter_off" and not is_new_adapter(cast(PeftModel, model)):
            logger.warning(
                "the adapter has been trained before: the reference is its base, not the model as training finds it"
            )
        logger.info("the reference is %s (%s)", kind, why)
        self.reference_kind = kind
        return kind

    def _second_model(self, ref_model: nn.Module | str | None) -> SecondModel:
        args, base = self.args, base_model(cast(nn.Module, self.model))
        if args.fsdp or is_deepspeed_zero3_enabled():
            raise ValueError(
                "a second model as the reference stands whole on every device, which ZeRO-3 and FSDP2 are there to avoid: choose "
                "dpo_reference precomputed, or adapter_off with an adapter"
            )
        ref_model = ref_model or base.config._name_or_path
        if isinstance(ref_model, str):
            if not ref_model:
                raise ValueError(
                    "dpo_reference is model, and the model has no name to load it again by: pass ref_model"
                )
            named = ModelArguments(model_name_or_path=ref_model, dtype=str(base.dtype).removeprefix("torch."))  # type: ignore[arg-type]
            ref_model = load_model(named, tokenizer=cast(Any, self.processing_class), training=args)
        if base_model(ref_model) is base:
            raise ValueError("ref_model is the model that is trained: pass a copy of it, or leave it out")
        if type(base_model(ref_model)) is not type(base):
            raise ValueError(
                f"ref_model is a {type(base_model(ref_model)).__name__} and the model a {type(base).__name__}: the reference "
                "must be of the same architecture"
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
            self.reference.prepare(self.model_wrapped, known, untrained=not self._goes_on)
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
            untrained = self.state.global_step == 0
            if untrained:
                self.reference.remember(cast(nn.Module, self.model))
            self.reference.prepare(self.model_wrapped, [dataloader.dataset], untrained=untrained)
        return super().evaluation_loop(dataloader, description, *args, **kwargs)


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
    """

    loss: Tensor
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
            chosen_nll = nll[self.answer_R % 2 == 0].sum()
            n_pairs, n_chosen = self.items.clamp_min(1e-9)
            total = losses.sum() / n_pairs + self.objective.auxiliary * chosen_nll / n_chosen
            (weights,) = torch.autograd.grad(total, nll)
        self.loss = total.detach()
        chosen, rejected = rewards.detach().unbind(1)
        logps = logps.detach().view(-1, 2)
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
    if ref_model is not None and dpo.dpo_reference not in ("auto", "model"):
        found.append(f"ref_model is given and dpo_reference is {dpo.dpo_reference}: leave one of them out")
    if found:
        raise ValueError("; ".join(found))
    return dpo
