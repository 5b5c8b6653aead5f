"""What a policy is compared with in preference learning: three ways to the same log-probabilities.

Shapes: P pairs of a micro-batch, 2P answers (the chosen one of a pair before its rejected one), D pairs of a data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_sft.data.bins import Bins
from hf_sft.data.cache import cache_key, write_folder
from hf_sft.data.prepared import code_version
from hf_sft.models.sharded import whole
from hf_sft.models.wrappers import base_model

logger = logging.getLogger(__name__)

NOTE = "reference_logps"  # in a bin's rows, in batches, and the name of the file
# Fields of configs that change nothing in a forward without dropout.
_INCIDENTAL = {
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "transformers_version",
    "inference_mode",
    "revision",
}
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
        folders: where they are kept, each of them: the data cache, which other runs share, and the run's own folder.
        settings: what they depend on beside the model and the pairs.
        rebuild: compute them even if they are there.
    """

    def __init__(
        self,
        compute: Callable[[nn.Module, Bins], Tensor],
        folders: Sequence[Path],
        settings: dict[str, Any],
        *,
        rebuild: bool = False,
    ) -> None:
        self.compute, self.folders, self.settings, self.rebuild = compute, folders, settings, rebuild
        self.model: str | None = None

    def logps(self, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        if NOTE not in batch and not batch["pair_numbers"]:
            return torch.zeros(0, device=batch["input_ids"].device)
        return batch[NOTE]

    def remember(self, model: nn.Module) -> None:
        """Take down which model training begins with; collective, and before a checkpoint is loaded."""
        self.model = self.model or _fingerprint(model)

    def prepare(self, model: nn.Module, datasets: Iterable[Bins], *, untrained: bool) -> None:
        """Write the log-probabilities into the rows of ``datasets``, from the cache or by one pass over them; collective.

        Args:
            model: the policy, as the engine wrapped it.
            untrained: it has the weights that were remembered.

        Raises:
            ValueError: they are kept nowhere, and the model has been trained since.
        """
        for bins in datasets:
            if NOTE in bins.notes:
                continue
            key = cache_key({"model": self.model, "pairs": _content(bins), "code": code_version(), **self.settings})
            folders = [folder / key for folder in self.folders]
            found = _shared_load([] if self.rebuild and untrained else folders, len(bins.lengths))
            if found is None:
                if not untrained:
                    raise ValueError(
                        "dpo_reference is precomputed, and the log-probabilities of these pairs under the model as training "
                        f"found it are kept in none of {', '.join(map(str, self.folders))}: give all data sets to the trainer "
                        "before it trains, or start in a new output_dir"
                    )
                logger.info("computing the reference's log-probabilities of %d pairs", len(bins.lengths))
                found = self.compute(model, bins).cpu().numpy()
            _save(folders, found)
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
    factors = [
        whole(parameter)  # not detached: an engine knows what it has partitioned by the parameter itself
        for name, parameter in model.named_parameters()
        if "lora_B." in name or "lora_embedding_A" in name
    ]
    unchanged = [_same(*pair) for pair in _replaced(model)]
    return bool(factors) and not any(factor.any() for factor in factors) and all(unchanged)


def _replaced(model: PeftModel) -> Iterator[tuple[Tensor, Tensor]]:
    """What the adapter puts in the place of weights, and these: copies of modules, and rows of a vocabulary."""
    for module in model.modules():
        active: Any = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
        name = active[0] if isinstance(active, list) else active
        copies, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
        if isinstance(copies, nn.ModuleDict) and original is not None and name in copies:
            yield from zip(copies[name].parameters(), original.parameters(), strict=True)
        rows: Any = getattr(module, "trainable_tokens_delta", None)
        if rows is not None and name in rows:
            weight = whole(cast(Any, module).get_base_layer().weight)
            yield rows[name], weight[cast(Any, module).token_indices[name]]


def _same(own: Tensor, base: Tensor) -> bool:
    own, base = whole(own), whole(base)
    return bool(torch.equal(own.to(base.dtype), base.to(own.device)))


# ---- the cache ----


def _fingerprint(model: nn.Module) -> str:
    """Of all that a forward depends on: configs, weights and buffers, read one at a time; only the first process hashes them."""
    digest = hashlib.blake2b(digest_size=16)
    configs = [base_model(model).config, *getattr(model, "peft_config", {}).values()]
    for config in configs:
        fields = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        tensor = whole(parameter)
        if main:
            state = getattr(parameter, "quant_state", None)
            for each in (tensor, *(() if state is None else state.as_dict(packed=True).values())):
                digest.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
                digest.update(each.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
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


def _shared_load(folders: Sequence[Path], pairs: int) -> np.ndarray | None:
    """[D, 2] what the first process finds in the first folder that has it whole; on all processes."""
    several = torch.distributed.is_initialized()
    found: list[Any] = [None]
    if not several or torch.distributed.get_rank() == 0:
        kept = (_load(folder / f"{NOTE}.npy", pairs) for folder in folders)
        found = [next((logps for logps in kept if logps is not None), None)]
    if several:
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _load(file: Path, pairs: int) -> np.ndarray | None:
    try:
        logps = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # NumPy takes a damaged file for pickled objects
        logps = None
    if logps is None or logps.shape != (pairs, 2):
        logger.warning("%s is damaged and is not used", file)
        return None
    return logps


def _save(folders: Iterable[Path], logps: np.ndarray) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for folder in folders:
        held = _load(folder / f"{NOTE}.npy", len(logps)) if folder.is_dir() else None
        if held is None or not np.array_equal(held, logps):
            write_folder(folder, lambda target: np.save(target / f"{NOTE}.npy", logps), replace=True)
