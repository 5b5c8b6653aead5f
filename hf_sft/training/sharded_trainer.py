"""A Trainer whose weights and optimizer states may be sharded by DeepSpeed ZeRO or FSDP2: saving and resuming.

Weights are gathered one tensor at a time; of an adapter's model only what is trained. The optimizer's side lies in one file of
whole tensors, whatever the engine and the number of processes, so that a run goes on with another number of them:

    param:NAME        a trained parameter, in the engine's own precision (float32 masters)
    state:KEY:NAME    a state of its optimizer, such as exp_avg
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sft.models.adapters import needs_vocabulary
from hf_sft.models.sharded import gather_state, set_whole, set_zero_state, sharded_like, whole, whole_shape, whole_state
from hf_sft.tensor_files import header_bytes, raw
from hf_sft.training.thawing import ThawingTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.safetensors"
_SCHEDULER_FILE = "scheduler.pt"


def check_engine_of(checkpoint: str | os.PathLike[str], args: Any) -> None:
    """ZeRO and FSDP2 go on from each other's checkpoints, and plain processes from each other's.

    Raises:
        ValueError: the checkpoint is of the other kind.
    """
    written, wanted = (Path(checkpoint) / STATE_FILE).is_file(), bool(args.deepspeed or args.fsdp)
    if written and not wanted:
        raise ValueError(
            f"{checkpoint} was written under DeepSpeed or FSDP: resume it with either of them (zero_stage, deepspeed or fsdp)"
        )
    if wanted and not written:
        raise ValueError(f"{checkpoint} was written without DeepSpeed and FSDP: resume it without them")


class ShardedTrainer(ThawingTrainer):
    """What differs under a sharding engine; without one, everything is the parent's."""

    _begun = False  # whether the engine holds the weights

    @property
    def is_sharded(self) -> bool:
        """Whether DeepSpeed or FSDP holds the weights."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def create_accelerator_and_postprocess(self) -> None:
        """As ``Trainer``; FSDP2 sums gradients in float32 (accelerate would in the type of the arithmetic)."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``.

        Raises:
            ValueError: an engine is to shard the weights and has not been begun: it needs the optimizer of a training.
        """
        if self.is_sharded and not self._begun:
            raise ValueError(
                "DeepSpeed and FSDP begin with the training: evaluate after train(), or set eval_on_start, or use one process "
                "without them"
            )
        return super().evaluation_loop(*args, **kwargs)

    # ---- weights ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, or the adapter, from the first process (of each machine, under ``save_on_each_node``)."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self._gathered_state())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _gathered_state(self) -> dict[str, Tensor]:
        """What ``_save`` writes, on the processes that write; gathered one tensor at a time."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return gather_state(model, lambda name: True, keep=self.args.should_save)
        parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones are saved by both names
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        trained |= {name for name in parameters if name.removeprefix("base_model.model.") in self._frozen}
        if needs_vocabulary(model):
            matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
            held = {id(matrix.weight) for matrix in matrices if matrix is not None}
            trained |= {name for name, parameter in parameters.items() if id(parameter) in held}
        return gather_state(model, trained.__contains__, keep=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As ``Trainer``; but whole models are read as ``from_pretrained`` reads them, which knows tensors that are stored in
        another form than they are used, such as fused experts. Trainer would leave those as they were, with a warning."""
        target: Any = self.model if model is None else model
        if not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(stored.state_dict())

    def _load_best_model(self) -> None:
        if not self.is_sharded and isinstance(self.model, PreTrainedModel):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
            return
        if not self.is_sharded:
            super()._load_best_model()
            return
        best = str(self.state.best_model_checkpoint)
        logger.info("Loading the best model from %s (%s)", best, self.state.best_metric)
        self._restore(best, weights_only=True)

    # ---- the state of training ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir) if self.args.should_save else None
        self._write_state(folder)
        if folder is not None:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / _SCHEDULER_FILE)

    def _write_state(self, folder: Path | None) -> None:
        """Write the file of whole tensors, one at a time; collective. None: this process only takes its part in gathering."""
        entries = list(self._training_state())
        scalars = {name: json.dumps(value) for name, value in self._scalars().items()}
        failure: OSError | None = None
        with ExitStack() as stack:
            file: Any = None
            for _, _, dtype, read in entries:
                tensor = read()
                if folder is None or failure is not None:
                    continue
                try:
                    if file is None:
                        folder.mkdir(parents=True, exist_ok=True)
                        file = stack.enter_context(open(folder / STATE_FILE, "wb"))
                        file.write(header_bytes([entry[:3] for entry in entries], scalars))
                    file.write(raw(tensor, dtype))
                except OSError as error:  # the other processes still wait for this one's part of what follows
                    failure = error
        if failure is not None:
            raise failure

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        with _seen_as_tied(self.model):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._begun = True
        if resume_from_checkpoint is None:
            return prepared
        self._restore(resume_from_checkpoint)
        schedule = torch.load(Path(resume_from_checkpoint) / _SCHEDULER_FILE, weights_only=True)
        scheduler, optimizer = cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        scheduler.load_state_dict(schedule)
        rates = scheduler.get_last_lr()
        initial = getattr(getattr(scheduler, "scheduler", scheduler), "base_lrs", rates)  # as accelerate wraps some
        for group, first, rate in zip(optimizer.param_groups, initial, rates, strict=True):
            group |= {"initial_lr": first, "lr": rate}
        return prepared

    def _trained(self) -> dict[str, nn.Parameter]:
        model: Any = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _training_state(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]]:
        """(name, shape, type, the whole tensor when it is called, by all processes in this order)."""
        if self.is_deepspeed_enabled:
            _link_states(self._engine_optimizer)
        for name, parameter in self._trained().items():
            shape = whole_shape(parameter)
            dtype = torch.float32 if self.is_deepspeed_enabled else parameter.dtype
            yield f"param:{name}", shape, dtype, partial(whole, parameter)
            local = {} if self.is_deepspeed_enabled else self._torch_optimizer.state.get(parameter, {})
            for key in self._tensor_keys():
                if self.is_deepspeed_enabled or key in local:
                    dtype = torch.float32 if self.is_deepspeed_enabled else local[key].dtype
                    yield f"state:{key}:{name}", shape, dtype, partial(whole_state, parameter, local.get(key), key)

    @property
    def _engine_optimizer(self) -> Any:
        """DeepSpeed's optimizer, or torch's under FSDP2: what accelerate has put its wrapper around."""
        return cast(Any, self.optimizer).optimizer

    @property
    def _torch_optimizer(self) -> Any:
        return self._engine_optimizer.optimizer if self.is_deepspeed_enabled else self._engine_optimizer

    def _a_state(self) -> dict[str, Any]:
        """The states of some parameter, all of which have the same keys and the same count of steps."""
        return next(filter(None, self._torch_optimizer.state.values()), {})

    def _tensor_keys(self) -> list[str]:
        return sorted(key for key, value in self._a_state().items() if _is_tensor(value))

    def _scalars(self) -> dict[str, dict[str, Any]]:
        """Counters of the optimizer, and of the scaling of float16 losses."""
        counters = {key: float(value) for key, value in self._a_state().items() if not _is_tensor(value)}
        scaler = vars(self._loss_scaler) if self._loss_scaler is not None else {}
        scaling = {key: value for key, value in scaler.items() if isinstance(value, (int, float))}
        return {"optimizer": counters, "loss_scaler": scaling}

    @property
    def _loss_scaler(self) -> Any:
        return getattr(self._engine_optimizer, "loss_scaler", None) if self.is_deepspeed_enabled else None

    def _restore(self, checkpoint: str, weights_only: bool = False) -> None:
        """Set weights and optimizer states to those of ``checkpoint``; collective.

        Raises:
            ValueError: the file is another model's.
        """
        path = Path(checkpoint) / STATE_FILE
        trained = self._trained()
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            if {name for name in held if name.startswith("param:")} != {f"param:{name}" for name in trained}:
                raise ValueError(f"{path} holds other parameters than this model trains")
            for name, parameter in trained.items():
                set_whole(parameter, file.get_tensor(f"param:{name}"))
            if not weights_only:
                self._restore_states(file, held, trained)

    def _restore_states(self, file: Any, held: set[str], trained: dict[str, nn.Parameter]) -> None:
        metadata = file.metadata() or {}
        scalars = json.loads(metadata["optimizer"])
        keys = sorted({name.split(":", 2)[1] for name in held if name.startswith("state:")})
        if self.is_deepspeed_enabled:
            _make_states(self._engine_optimizer, keys, scalars)
            if self._loss_scaler is not None:
                vars(self._loss_scaler).update(json.loads(metadata["loss_scaler"]))
        for name, parameter in trained.items():
            for key in keys:
                if f"state:{key}:{name}" not in held:
                    continue
                value = file.get_tensor(f"state:{key}:{name}")
                if self.is_deepspeed_enabled:
                    set_zero_state(parameter, value, key)
                else:
                    self._torch_optimizer.state[parameter][key] = sharded_like(parameter, value)
            if not self.is_deepspeed_enabled and any(f"state:{key}:{name}" in held for key in keys):
                self._torch_optimizer.state[parameter].update(_counters(self._torch_optimizer, scalars, parameter))


@contextmanager
def _seen_as_tied(model: Any) -> Iterator[None]:
    """accelerate (1.15) puts a tied embedding and head into one group if their ``weight`` is one object. Where rows of both are
    trained, PEFT makes up a new tensor at each look: it is shown the weight itself."""
    layers = [
        layer
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if hasattr(layer, "token_adapter")
    ]
    for layer in layers:
        layer.__dict__["weight"] = layer.token_adapter.base_layer.weight
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["weight"]


def _is_tensor(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def _counters(optimizer: Any, scalars: dict[str, float], parameter: Tensor) -> dict[str, Tensor]:
    """Fused kernels want them beside the numbers, others on the host."""
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    device = parameter.device if beside else torch.device("cpu")
    return {key: torch.tensor(value, device=device) for key, value in scalars.items()}


def _make_states(zero: Any, keys: list[str], scalars: dict[str, float]) -> None:
    """States as the optimizer would make them in its first step, for each of the flat tensors that ZeRO hands it."""
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # of stage 3
    for flat in flats or [flat for group in zero.optimizer.param_groups for flat in group["params"]]:
        counters = _counters(zero.optimizer, scalars, flat)
        zero.optimizer.state[flat].update({key: torch.zeros_like(flat) for key in keys} | counters)
    _link_states(zero)


def _link_states(zero: Any) -> None:
    """Tell ZeRO-1 and 2 where the states of each parameter lie; DeepSpeed (0.19) does it after the first group's first step, when
    the other groups have none yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
