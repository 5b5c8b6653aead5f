"""A Trainer that chooses what activation checkpointing keeps."""

from __future__ import annotations

from typing import Any

from hf_sft.checks import checkpointing_problems
from hf_sft.models.checkpointing import keep_in_layers, show_compiled_kernels
from hf_sft.training.bin_trainer import BinTrainer


class RecomputingTrainer(BinTrainer):
    """Keeps some outputs of each layer where activation checkpointing would compute all of them again.

    Args:
        activation_checkpointing_policy: ``full``, ``attention`` or ``products``; see ``hf_sft.models.checkpointing``.

    Raises:
        ValueError: an unknown policy, or one that cannot be honoured.
    """

    def __init__(
        self, model: Any, args: Any, *rest: Any, activation_checkpointing_policy: str = "full", **options: Any
    ):
        policy = activation_checkpointing_policy
        if found := [*checkpointing_problems(policy, args)]:
            raise ValueError("; ".join(found))
        self.activation_checkpointing_policy = policy
        super().__init__(model, args, *rest, **options)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.activation_checkpointing_policy != "full":
            settings: Any = self.args.activation_checkpointing_kwargs
            keep_in_layers(self.model, self.activation_checkpointing_policy, settings)
            if self.layout.name == "flex":
                show_compiled_kernels()
        return super()._prepare_for_training(*args, **kwargs)
