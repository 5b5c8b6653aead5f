"""What a policy is compared with in preference learning: three ways to the same log-probabilities.

Shapes: P pairs of a micro-batch, 2P answers (the chosen one of a pair before its rejected one), D pairs of a data set.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_sft.data.bins import Bins
from hf_sft.data.cache import cache_key, write_folder
from hf_sft.models.sharded import whole
from hf_sft.models.wrappers import base_model

logger = logging.getLogger(__name__)

NOTE = "reference_logps"  # in a bin's rows and in batches
Scores = Callable[[nn.Module, dict[str, Any]], Tensor]  # model, batch on the device -> [2P] log-probabilities


class Reference(Protocol):
    """Gives the reference's log-probabilities [2P] of a batch's answers, in nats."""

    def logps(self, policy: nn.Module, batch: dict[str, Any]) -> Tensor: ...


class AdapterOff:
    """The base of the policy, with the adapter off.

    Args:
        scores: log-probabilities of a batch under a model.
        adapted: the policy's PEFT model, whatever an engine puts around it.
    """

    def __init__(self, scores: Scores, adapted: PeftModel) -> None:
        self.scores, self.adapted = scores, adapted

    def logps(self, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        with self.adapted.disable_adapter():
            return self.scores(policy, batch)


class SecondModel:
    """A model of its own, frozen and without dropout.

    Args:
        scores: log-probabilities of a batch under that model.
    """

    def __init__(self, scores: Scores, model: nn.Module) -> None:
        self.scores, self.model = scores, model.requires_grad_(False).eval()

    def logps(self, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        return self.scores(self.model, batch)


class Precomputed:
    """Log-probabilities of the model as training finds it, computed once for each data set and kept in the cache.

    Args:
        compute: the log-probabilities [D, 2] of a data set's pairs under a model; collective.
        cache: folder of the cache.
        settings: what they depend on beside the weights and the pairs.
    """

    def __init__(self, compute: Callable[[nn.Module, Bins], Tensor], cache: Path, settings: dict[str, Any]) -> None:
        self.compute, self.cache, self.settings = compute, cache, settings
        self.weights: str | None = None

    def logps(self, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        if NOTE not in batch and not batch["pair_numbers"]:
            return torch.zeros(0, device=batch["input_ids"].device)
        return batch[NOTE]

    def remember(self, model: nn.Module) -> None:
        """Take down which weights training begins with; collective, and before a checkpoint is loaded."""
        self.weights = self.weights or _fingerprint(model)

    def prepare(self, model: nn.Module, datasets: Iterable[Bins], *, untrained: bool) -> None:
        """Write the log-probabilities into the rows of ``datasets``, from the cache or by one pass over them; collective.

        Args:
            model: the policy, as the engine wrapped it.
            untrained: it has the weights that were remembered.

        Raises:
            ValueError: they are not in the cache, and the model has been trained since.
        """
        for bins in datasets:
            if NOTE in bins.notes:
                continue
            folder = self.cache / cache_key({"weights": self.weights, "pairs": _content(bins), **self.settings})
            found = _shared_load(folder)
            if found is None:
                if not untrained:
                    raise ValueError(
                        "dpo_reference is precomputed, and the log-probabilities of the model as training found it are no longer "
                        f"in the cache ({folder} is missing): start in a new output_dir, or name the model as "
                        "reference_model_name_or_path"
                    )
                logger.info("computing the reference's log-probabilities of %d pairs", len(bins.lengths))
                found = self.compute(model, bins).cpu().numpy()
                _save(folder, found)
            bins.notes[NOTE] = found


def adapter_off_problem(model: nn.Module) -> str | None:
    """Why the base of ``model`` cannot be had by switching its adapter off; None if it can."""
    if not isinstance(model, PeftModel):
        return "the model has no adapter"
    config = model.peft_config[model.active_adapter]
    if getattr(config, "bias", "none") != "none":
        return "the adapter trains biases of the base (lora_bias), which are not put back when it is off"
    head = base_model(model).get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        return "the adapter has a copy of the whole head (modules_to_save)"
    return None


def is_new_adapter(model: PeftModel) -> bool:
    """Whether the adapter changes nothing yet, as far as can be told: each update B A has a factor that is all zeros."""
    zeros = [
        not whole(parameter.detach()).any()
        for name, parameter in model.named_parameters()
        if "lora_B." in name or "lora_embedding_A" in name
    ]
    return bool(zeros) and all(zeros)


# ---- the cache ----


def _fingerprint(model: nn.Module) -> str:
    """Of all weights, read one at a time; only the first process hashes them."""
    digest = hashlib.blake2b(digest_size=16)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())
        if main:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _content(bins: Bins) -> str:
    """Of the pairs and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for number in range(len(bins.bins)):
        for row in bins[0, number]:
            digest.update(np.array([row["document"], row["rejected_start"], len(row["input_ids"])]).tobytes())
            for name in ("input_ids", "labels"):
                digest.update(np.asarray(row[name], dtype=np.int32).tobytes())
    return digest.hexdigest()


def _shared_load(folder: Path) -> np.ndarray | None:
    """[D, 2] what the first process finds in the cache; on all processes."""
    several = torch.distributed.is_initialized()
    found: list[Any] = [None]
    if not several or torch.distributed.get_rank() == 0:
        file = folder / f"{NOTE}.npy"
        found = [np.load(file, allow_pickle=False) if file.is_file() else None]
    if several:
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _save(folder: Path, logps: np.ndarray) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        write_folder(folder, lambda target: np.save(target / f"{NOTE}.npy", logps), replace=True)
