"""A Trainer that leaves some weights as they are, for the whole run or up to a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Trainer

from hf_sft.models.adapters import reentrant_checkpointing
from hf_sft.models.freezing import freeze as freeze_parameters
from hf_sft.models.freezing import frozen_parameters
from hf_sft.models.sharded import whole_numel
from hf_sft.models.wrappers import base_model
from hf_sft.training.recomputing import RecomputingTrainer

logger = logging.getLogger(__name__)


class ThawingTrainer(RecomputingTrainer):
    """Trains all weights but those that ``freeze`` names.

    Without ``thaw_at_step`` they have no gradients and no optimizer states. With it their gradients are computed from the start,
    as engines that sum gradients over processes expect, and dropped before gradients are clipped: the optimizer meets them
    first in the step after ``thaw_at_step`` steps, with states and weight decay from there on.

    Args:
        freeze: patterns for names of parameters; see :func:`hf_sft.models.freezing.frozen_parameters`.
        thaw_at_step: the number of optimizer steps after which they are trained as well; None: never.

    Raises:
        ValueError: patterns that do not fit the model; ``thaw_at_step`` without ``freeze``, below 1, or under an engine that
            shards gradients.
    """

    _frozen: dict[str, nn.Parameter]  # by their names in the transformers model

    def __init__(
        self,
        model: Any,
        args: Any,
        *rest: Any,
        freeze: Sequence[str] = (),
        thaw_at_step: int | None = None,
        **options: Any,
    ) -> None:
        _check_thawing(args, freeze, thaw_at_step)
        self.thaw_at_step = thaw_at_step
        self._frozen = frozen_parameters(model, freeze) if freeze else {}
        if freeze:
            _warn_of_mask_token(model, self._frozen, self.objective.mask_token_id)
            _tell(model, self._frozen, thaw_at_step)
            if thaw_at_step is None:
                freeze_parameters(model, freeze)
                _keep_graph(model, args)
        super().__init__(model, args, *rest, **options)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; of weights that never thaw it knows nothing, also where a checkpoint's adapter has just been loaded."""
        if self.thaw_at_step is None:
            for parameter in self._frozen.values():
                parameter.requires_grad_(False)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As ``Trainer``, which knows here how long the run is."""
        if self.thaw_at_step is not None and self.thaw_at_step >= num_training_steps:
            logger.warning(
                "thaw_at_step is %d and the run has %d steps: nothing is thawed", self.thaw_at_step, num_training_steps
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # torch compares numbers of parameters
            raise ValueError(
                f"the optimizer states in {checkpoint} are of other weights than this run trains ({error}): set freeze as it "
                "was, and thaw_at_step if it was set"
            ) from error

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._drop_frozen()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._drop_frozen()  # this one is called also where nothing is clipped
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _drop_frozen(self) -> None:
        """Gradients of a whole step, summed over processes, that are not to be used."""
        if self.thaw_at_step is not None and self.state.global_step < self.thaw_at_step:
            for parameter in self._frozen.values():
                parameter.grad = None


def _check_thawing(args: Any, freeze: Sequence[str], step: int | None) -> None:
    if isinstance(freeze, str):
        raise ValueError(f"freeze is {freeze!r}: it must be a list of patterns")
    if step is None:
        return
    if not freeze:
        raise ValueError(
            f"thaw_at_step is {step} and freeze names nothing: name the weights that are frozen until then"
        )
    if step < 1:
        raise ValueError(f"thaw_at_step is {step}: use at least 1 step, or None, and nothing is thawed")
    if args.deepspeed or args.fsdp:
        raise ValueError(
            f"thaw_at_step is {step}, and DeepSpeed and FSDP keep gradients where they cannot be left out of a step: train with "
            "freeze alone and start a second run from its result, or use plain processes (DDP)"
        )
    if not (hasattr(Trainer, "_clip_grad_norm") and hasattr(Trainer, "_get_grad_norm")):
        raise ValueError(
            "thaw_at_step needs a transformers release of 5.20 to 5.23: this one clips gradients elsewhere"
        )


def _tell(model: Any, frozen: dict[str, nn.Parameter], step: int | None) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers, total = (sum(map(whole_numel, group)) for group in (frozen.values(), trained))
    logger.info(
        "freeze: %d of %d weights that are trained, %s of %s numbers, stay as they are%s",
        len(frozen), len(trained), f"{numbers:,}", f"{total:,}", "" if step is None else f" for the first {step} steps",
    )  # fmt: skip
    names = base_model(model).named_parameters(remove_duplicate=False)
    held = {id(parameter): name for name, parameter in frozen.items()}
    for name, parameter in names:
        if id(parameter) in held and name != held[id(parameter)]:
            logger.info("freeze: %s is tied to %s, and both are one weight", name, held[id(parameter)])


def _warn_of_mask_token(model: Any, frozen: dict[str, nn.Parameter], token: int | None) -> None:
    rows = {id(parameter) for parameter in base_model(model).get_input_embeddings().parameters()}
    if token is not None and rows & {id(parameter) for parameter in frozen.values()}:
        logger.warning(
            "freeze holds the row of the mask token %d: a model that has not learned it cannot use it", token
        )


def _keep_graph(model: Any, args: Any) -> None:
    """Reentrant checkpointing cuts the graph where no input requires a gradient, as behind a frozen embedding."""
    base = base_model(model)
    embedding = base.get_input_embeddings()
    if reentrant_checkpointing(args) and not any(each.requires_grad for each in embedding.parameters()):
        base.enable_input_require_grads()
