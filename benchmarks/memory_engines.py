"""How far the estimate of ``hf-sft inspect --memory`` is from the memory that processes take under engines that share a training.

    python benchmarks/memory_engines.py [--output FILE] [--note TEXT] [--case NAME ...]

Each case is a small model with random weights, trained for three optimizer steps by SFTTrainer in two processes on gloo; the
arguments of the training are those that the estimate is asked for. Measured are the bytes of all tensors that stand when the
third step begins, and what PyTorch's allocator hands out from there to the highest point, as its profiler records it, in the
process with more: engines let storages grow and shrink, which ``memory_error.py``'s way of counting does not see. The first
case has one process and no engine, and says how the two ways agree. DeepSpeed's buckets have 500 million numbers of its own
accord; here they have a million, so that they do not hide the rest, but in the cases that say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engines import launched
from memory import config_of
from memory_error import MIB, small_shape
from records import conclude, parser, percent, table

WATCHED, STEPS = "the watched step", 3
MODEL = small_shape("qwen3", 384, 1152, 8, 8192)
LENGTH = 512


@dataclass(frozen=True)
class Case:
    """One training: ``values`` are train's arguments beside those that all cases share."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    processes: int = 2

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Of the model in ``folder / "model"``."""
        return {
            "model_name_or_path": str(folder / "model"), "output_dir": str(folder / "out"), "train_file": "none.jsonl",
            "max_seq_length": LENGTH, "per_device_train_batch_size": 1, "max_steps": STEPS, "save_strategy": "no",
            "attention_backend": "segment", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": True,
            **self.values,
        }  # fmt: skip


def zero(stage: int) -> dict[str, Any]:
    return {"zero_stage": stage, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1_000_000}}}


SENT = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
LORA = {"train_mode": "lora", "lora_rank": 16}
CASES = [
    Case("one process", processes=1),
    Case("DDP"),
    Case("DDP, lora", LORA),
    *(Case(f"ZeRO-{stage}", zero(stage)) for stage in (1, 2, 3)),
    Case("ZeRO-2, buckets of 500 million", {"zero_stage": 2}),
    Case("ZeRO-3, buckets of 500 million", {"zero_stage": 3}),
    Case("ZeRO-2, accumulated", {**zero(2), "gradient_accumulation_steps": 2}),
    Case("ZeRO-2, lora", {**zero(2), **LORA}),
    Case("ZeRO-3, checkpointed", {**zero(3), "activation_checkpointing": True}),
    Case("ZeRO-3, lora", {**zero(3), **LORA}),
    Case("ZeRO-3, lora, buckets of 500 million", {"zero_stage": 3, **LORA}),
    Case("FSDP2", {"fsdp": True}),
    Case("FSDP2, accumulated", {"fsdp": True, "gradient_accumulation_steps": 2}),
    Case("FSDP2, accumulated, sent each time", {"fsdp": True, "gradient_accumulation_steps": 2, **SENT}),
    Case("FSDP2, shard_grad_op", {"fsdp": "shard_grad_op"}),
    Case("FSDP2, shard_grad_op, lora", {"fsdp": "shard_grad_op", **LORA}),
    Case("FSDP2, checkpointed", {"fsdp": True, "activation_checkpointing": True}),
    Case("FSDP2, lora", {"fsdp": True, **LORA}),
]


# ---- in the processes of one case ----


def work(case: Case, folder: Path) -> int:
    """Three steps of a case in this process, and the peak of the third."""
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import TrainerCallback

    from hf_sft import SFTTrainer, load_model
    from hf_sft.memory.counting import allocated
    from hf_sft.parsing import parse_values

    class Watch(TrainerCallback):
        standing = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS - 1:
                self.standing = allocated(standing_tensors())
                self.mark = record_function(WATCHED)
                self.mark.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                self.mark.__exit__(None, None, None)

    watch, before = Watch(), allocated(standing_tensors())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        arguments = parse_values(case.arguments(folder))
        model = load_model(arguments.model, arguments.lora, training=arguments.training)
        trainer = SFTTrainer(
            model, arguments.training, train_dataset=rows(), data_args=arguments.data,
            attention_backend=arguments.model.attention_backend, callbacks=[watch],
        )  # fmt: skip
        trainer.train()
    return watch.standing - before + _buckets_of_ddp(trainer.model_wrapped) + growth(seen)


def _buckets_of_ddp(model: Any) -> int:
    """Bytes of what DistributedDataParallel gathers gradients in, which only its own log tells of."""
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return 0
    return sum(map(int, model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(", ")))


def standing_tensors() -> Iterator[torch.Tensor]:
    """All of this process, as far as they are in Python's sight; those around others, and those without storage, left out."""
    gc.collect()
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            yield each


def rows() -> list[dict[str, Any]]:
    """Enough for every case; each fills a pack."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, MODEL["vocab_size"], (8 * STEPS, LENGTH), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def growth(seen: Any) -> int:
    """Of a profile with ``profile_memory``: by how many bytes the allocator's memory grew at most within the watched step.

    The profile begins earlier, because it sees no end of what began before it. Nor does it see what gloo's threads give back,
    such as the gradients that FSDP2 has sent: a block whose address is handed out again has gone, whether that was seen or not.
    """
    changes, begin, end = [], None, None
    for event in walk(seen.profiler.kineto_results.experimental_event_tree()):
        if event.name == WATCHED:
            begin, end = event.start_time_ns, event.end_time_ns
        elif event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    assert begin is not None and end is not None, "the step was not watched"
    blocks: dict[int, int] = {}  # of the step, by address
    now = most = 0
    for _, address, size in sorted(each for each in changes if begin <= each[0] <= end):
        now -= blocks.pop(address, max(0, -size))
        if size > 0:
            blocks[address] = size
            now += size
        most = max(most, now)
    return most


def walk(roots: list[Any]) -> Iterator[Any]:
    """All events below ``roots``; without recursion, for they are nested as deep as calls are."""
    left = list(roots)
    while left:
        event = left.pop()
        yield event
        left += event.children


# ---- from outside ----


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Estimate and measured peak of a case, in bytes of one process."""
    from transformers import AutoModelForCausalLM

    from hf_sft.commands.memory import plan_of
    from hf_sft.memory.plan import estimate

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(MODEL), dtype=torch.bfloat16).save_pretrained(folder / "model")
    said = estimate(plan_of(case.arguments(folder), case.processes))
    peaks = [folder / f"peak-{rank}" for rank in range(case.processes)]
    words = ["--work", case.name, "--folder", str(folder)]
    done = launched(__file__, words, case.processes)
    if not all(path.is_file() for path in peaks):
        raise RuntimeError(f"{case.name}: {done.stderr[-4000:]}")
    measured = max(int(path.read_text()) for path in peaks)
    return {
        "case": case.name, "processes": case.processes, "estimate": said.total, "moment": said.moment, "parts": said.parts,
        "measured": measured, "error": said.total / measured - 1,
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """Estimate and measured peak in MiB."""
    body = [
        [
            r["case"],
            r["moment"],
            *(f"{r[key] / MIB:.0f}" for key in ("estimate", "measured")),
            percent(r["error"]),
        ]
        for r in results["cases"]
    ]
    return table(["two processes", "peak at", "estimate", "measured", "error"], body)


def main() -> None:
    words = parser(__doc__, "memory_engines")
    words.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="default: all")
    words.add_argument("--work", help=argparse.SUPPRESS)
    words.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = words.parse_args()
    cases = {case.name: case for case in CASES}
    if options.work:
        peak = work(cases[options.work], options.folder)
        (options.folder / f"peak-{os.environ.get('RANK', '0')}").write_text(str(peak))
        return
    logging.getLogger("hf_sft").setLevel(logging.ERROR)
    found = []
    for name in options.case or cases:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(cases[name], Path(folder)))
        print(json.dumps(found[-1]), file=sys.stderr)
    results = {"note": options.note, "missed": [], "cases": found}
    print(markdown(results))
    if not options.case or options.output:
        conclude("memory_engines", results, options.output)


if __name__ == "__main__":
    main()
