"""What to change: so that a training fits, or so that it uses what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hf_sft.engines import ELEMENTWISE
from hf_sft.memory.plan import Plan, estimate, fits

_SHORTEST = 512  # tokens: shorter documents are not proposed
_DEVICES = (2, 4, 8, 16, 32)
_FILES = "train_args/deepspeed"
# What the ready files say of their buckets; ZeRO-3's follows the width.
_BUCKETS: dict[str, dict[str, Any]] = {
    "zero2": {"bucket": 200_000_000, "overlap": True}, "zero3": {"bucket": 0, "overlap": True},
}  # fmt: skip

_SENT_EACH_TIME = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


@dataclass(frozen=True)
class Change:
    """Arguments to set, and what the estimate comes to with them and those before.

    Args:
        arguments: name -> value, as in a run file.
        devices: processes.
        total: bytes on each device.
        fits: whether that fits.
    """

    arguments: dict[str, Any]
    devices: int
    total: int
    fits: bool

    @property
    def learns_the_same(self) -> bool:
        return not self.arguments.keys() & {"bf16", "train_mode", "max_seq_length"}


Step = Callable[[Plan], Iterator[tuple[dict[str, Any], Plan]]]


def what_to_change(plan: Plan, memory: float) -> list[Change]:
    """Changes, each on top of those before it, until the training fits into ``memory`` GiB: first what costs nothing, last what
    changes the training. What saves less than a hundredth is left out. Empty if it fits as it is."""
    changes: list[Change] = []
    total = estimate(plan).total
    steps: tuple[Step, ...] = (_precision, _backend, _checkpointing, _gradients, _batch, _evaluation)
    for step in (*steps, _sharding, _offloading, _adapter, _length):
        for arguments, candidate in step(plan):
            if fits(total, memory):
                return changes
            after = estimate(candidate).total
            if after > 0.99 * total:
                continue
            if changes and changes[-1].arguments.keys() == arguments.keys():
                changes.pop()  # a smaller batch takes the place of a small one
            plan, total = candidate, after
            changes.append(Change(arguments, plan.devices, total, fits(total, memory)))
    return changes


def on_more_devices(plan: Plan, memory: float) -> Change | None:
    """The smallest number of devices over which ZeRO-3 makes a training of one device fit; None if it has an engine, or an
    optimizer that engines cannot shard."""
    if plan.engine != "none" or plan.optim not in ELEMENTWISE:
        return None
    asked, plan = next(_checkpointing(plan), ({"activation_checkpointing": True}, plan))
    for devices in _DEVICES:
        candidate = replace(plan, engine="zero3", devices=devices)
        if fits(total := estimate(candidate).total, memory):
            return Change({"zero_stage": 3, **asked}, devices, total, True)
    return None


def what_is_faster(plan: Plan, memory: float) -> list[Change]:
    """Changes that cost memory and save time, each by itself, as far as they fit into ``memory`` GiB."""
    found = []
    for step in (_without_checkpointing, _larger_batch):
        for arguments, candidate in step(plan):
            if fits(total := estimate(candidate).total, memory):
                found.append(Change(arguments, plan.devices, total, True))
                break
    return found


# ---- steps: what may be changed, in their order ----


def _precision(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Products in half the bytes, and kernels that take no other; weights that are trained stay float32."""
    if plan.device == "cuda" and plan.precision is None and plan.train_mode == "full":
        yield {"bf16": True}, replace(plan, precision="bf16")


def _backend(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Masks of T x T, and copies of keys for each group of blocks, which flex needs not."""
    if plan.attention == "fused":
        return
    if plan.batch.objective == "wedlm" and plan.device == "cuda":
        yield {"attention_backend": "flex"}, replace(plan, backend="flex")
    elif plan.attention == "dense":
        yield {"attention_backend": "segment"}, replace(plan, backend="segment")


def _checkpointing(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    if not plan.checkpointing:
        yield {"activation_checkpointing": True}, replace(plan, checkpointing=True)
    elif plan.policy != "full":
        yield {"activation_checkpointing_policy": "full"}, replace(plan, policy="full")


def _gradients(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Sent after every micro-batch, so that only a part of their sum stands on each device."""
    if plan.sends_late:
        yield dict(_SENT_EACH_TIME), replace(plan, sync_each_batch=True)


def _batch(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    rows, steps = plan.batch.rows, plan.accumulation
    while rows > 1:
        rows, steps = (rows // 2, 2 * steps) if rows % 2 == 0 else (1, rows * steps)
        arguments: dict[str, Any] = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        candidate = replace(plan, batch=replace(plan.batch, rows=rows), accumulation=steps)
        if candidate.sends_late:  # what one micro-batch alone did not
            arguments, candidate = {**arguments, **_SENT_EACH_TIME}, replace(candidate, sync_each_batch=True)
        yield arguments, candidate


def _evaluation(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    rows = plan.eval_rows
    while rows > 1:
        rows //= 2
        yield {"per_device_eval_batch_size": rows}, replace(plan, eval_rows=rows)


def _sharding(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    stage = {"none": 0, "ddp": 0, "zero1": 1, "zero2": 2}.get(plan.engine)
    if plan.devices == 1 or stage is None or plan.optim not in ELEMENTWISE:
        return
    for higher in range(max(2, stage + 1), 4):
        arguments = {"deepspeed": f"{_FILES}/zero{higher}.json"} if plan.engine_file else {"zero_stage": higher}
        engine = f"zero{higher}"
        yield arguments, replace(plan, engine=engine, **(_BUCKETS[engine] if plan.engine_file else {}))


def _offloading(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    if not plan.engine.startswith("zero") or plan.offload_optimizer:
        return
    if not plan.engine_file:
        yield {"offload_optimizer": "cpu"}, replace(plan, offload_optimizer=True)
    elif plan.engine != "zero1":
        whole = plan.engine == "zero3"
        away = replace(plan, offload_optimizer=True, offload_param=whole, **_BUCKETS[plan.engine])
        yield {"deepspeed": f"{_FILES}/{plan.engine}_offload.json"}, away


def _adapter(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    modes = ("full", "lora", "qlora")
    for mode in modes[modes.index(plan.train_mode) + 1 :]:
        if plan.freeze or (plan.precision is None and plan.device == "cpu"):
            return
        yield {"train_mode": mode}, replace(plan, train_mode=mode, dtype=None)


def _length(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    length = plan.batch.length
    while length // 2 >= _SHORTEST:
        length //= 2
        yield {"max_seq_length": length}, replace(plan, batch=replace(plan.batch, length=length))


def _without_checkpointing(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    if not plan.checkpointing or plan.checkpointing_of_fsdp:
        return
    yield {"activation_checkpointing": False}, replace(plan, checkpointing=False)
    for policy in ("products", "attention"):
        if plan.policy == "full" and plan.engine != "zero3":
            yield {"activation_checkpointing_policy": policy}, replace(plan, policy=policy)


def _larger_batch(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    rows, steps = plan.batch.rows, plan.accumulation
    for factor in (8, 4, 2):
        if steps % factor == 0:
            arguments = {"per_device_train_batch_size": rows * factor, "gradient_accumulation_steps": steps // factor}
            yield arguments, replace(plan, batch=replace(plan.batch, rows=rows * factor), accumulation=steps // factor)
