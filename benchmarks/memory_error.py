"""How far the estimate of ``hf-sft inspect --memory`` is from the memory that training steps really take.

    python benchmarks/memory_error.py [--output FILE] [--note TEXT] [--case NAME ...]

Each case is a small model with random weights, trained for three optimizer steps by SFTTrainer on rows of full length. The third
step is watched, from its first micro-batch to the end of the optimizer's step, with everything that stands in memory: on a CPU
by counting the bytes of all live tensors (``hf_sft.memory.counting``), and beside it by the growth of the process (RSS since
before the model was built, sampled every millisecond); on CUDA by ``torch.cuda.max_memory_allocated``. Bytes do not depend on the
load of the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from memory import config_of
from records import percent, write_record
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging as hf_logging

from hf_sft import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    SFTTrainer,
    TrainingArguments,
    WeDLMArguments,
    load_model,
)
from hf_sft.arguments import EMAArguments
from hf_sft.memory.activations import MicroBatch
from hf_sft.memory.counting import LiveBytes, allocated
from hf_sft.memory.plan import Plan, estimate

MIB = 2**20
_STEPS, _RANK = 3, 16


def small_shape(kind: str, width: int, inner: int, layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return dict(
        model_type=kind, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=width // 8, vocab_size=vocabulary, max_position_embeddings=4096,
        tie_word_embeddings=kind == "gemma", pad_token_id=0, bos_token_id=None, eos_token_id=1, **more,
    )  # fmt: skip


QWEN, LLAMA = small_shape("qwen3", 256, 768, 4, 6400), small_shape("llama", 512, 1408, 8, 32000)
GEMMA, NARROW = small_shape("gemma", 256, 1024, 4, 32000), small_shape("qwen3", 256, 1024, 6, 512)


@dataclass(frozen=True)
class Case:
    """One training; the fields are those of ``Plan``."""

    name: str
    shape: dict[str, Any] = field(default_factory=lambda: QWEN)
    mode: str = "full"
    objective: str = "causal"
    rows: int = 1
    length: int = 1024
    accumulation: int = 1
    checkpointing: bool = False
    policy: str = "full"
    backend: str = "segment"
    precision: str | None = "bf16"
    optim: str = "adamw_torch_fused"
    average: bool = False
    adapted: tuple[str, ...] = ("all-linear",)

    @property
    def lora(self) -> LoraArguments:
        return LoraArguments(lora_rank=_RANK, lora_target_modules=list(self.adapted))


CASES = [
    Case("qwen3 full"),
    Case("qwen3 full, float32", precision=None),
    Case("qwen3 full, accumulated", accumulation=2),
    Case("qwen3 full, checkpointed", checkpointing=True, length=2048),
    Case("qwen3 full, dense", backend="dense"),
    Case("qwen3 full, average of the weights", average=True, length=512),
    Case("qwen3 full, adafactor", optim="adafactor", length=512),
    Case("qwen3 lora", mode="lora", length=2048),
    Case("qwen3 lora, checkpointed", mode="lora", checkpointing=True, length=2048),
    Case("qwen3 lora, head adapted", mode="lora", adapted=("q_proj", "v_proj", "lm_head")),
    Case("qwen3 qlora", mode="qlora"),
    Case("qwen3 qlora, checkpointed", mode="qlora", checkpointing=True),
    Case("qwen3 wedlm", objective="wedlm"),
    Case("qwen3 wedlm, dense", objective="wedlm", backend="dense"),
    Case("qwen3 wedlm, checkpointed", objective="wedlm", checkpointing=True),
    Case("qwen3 wedlm lora", objective="wedlm", mode="lora", length=512),
    Case("llama full", LLAMA),
    Case("llama full, checkpointed", LLAMA, checkpointing=True),
    Case("llama full, products kept", LLAMA, checkpointing=True, policy="products"),
    Case("llama full, attention kept", LLAMA, checkpointing=True, policy="attention"),
    Case("llama lora, checkpointed", LLAMA, mode="lora", rows=2, checkpointing=True),
    Case("gemma full", GEMMA, rows=2, length=512),
    Case("gemma full, checkpointed", GEMMA, length=2048, checkpointing=True),
    Case("gemma lora", GEMMA, mode="lora"),
    # A small vocabulary, so that the peak is not at the head.
    Case("narrow head, full, checkpointed", NARROW, length=256, checkpointing=True),
    Case("narrow head, lora, checkpointed", NARROW, mode="lora", length=2048, checkpointing=True),
    Case("narrow head, lora, products kept", NARROW, mode="lora", length=2048, checkpointing=True, policy="products"),
    Case("narrow head, wedlm, checkpointed", NARROW, objective="wedlm", checkpointing=True, accumulation=2),
    Case("narrow head, full, short rows", NARROW, length=32, optim="adafactor"),
    Case("step of a wide head, unfused", {**NARROW, "vocab_size": 32000}, length=8, optim="adamw_torch"),
]  # fmt: skip


def planned(case: Case, device: str) -> Plan:
    return Plan(
        config_of(case.shape),
        train_mode=case.mode,
        lora=case.lora,
        precision=case.precision,
        optim=case.optim,
        average="device" if case.average else None,
        batch=MicroBatch(case.rows, case.length, case.objective),
        accumulation=case.accumulation,
        checkpointing=case.checkpointing,
        policy=case.policy,
        backend=case.backend,
        device=device,
    )


class _Watch(TrainerCallback):
    """The peak of the last step, in bytes."""

    def __init__(self, before: int, *, count: bool = True) -> None:
        self.before, self.count = before, count
        self.peak: int | None = None
        self.live: LiveBytes | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step != _STEPS - 1 or not self.count:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self.standing = allocated(known := [*tensors_of(model), *optimizer_tensors(optimizer)])
        self.live = LiveBytes(known)
        self.live.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == _STEPS and self.count and torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() - self.before
        elif self.live is not None and self.peak is None:
            self.live.__exit__(None, None, None)
            self.peak = self.standing + self.live.most


def tensors_of(model: Any) -> Iterator[torch.Tensor]:
    """Everything that a model holds: weights with what quantisation keeps beside them, gradients, buffers."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        if (state := getattr(parameter, "quant_state", None)) is not None:
            nested = state.state2
            yield from (state.absmax, state.code)
            yield from (nested.absmax, nested.code, state.offset) if nested is not None else ()


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """The tensors among the states of an optimizer, whatever is around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def load(case: Case, folder: Path) -> Any:
    """The model of a case, as train.py loads it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(case.shape), dtype=torch.bfloat16).save_pretrained(folder)
    rows = [case.shape["vocab_size"] - 1] if case.objective == "wedlm" and case.mode != "full" else []
    named = ModelArguments(model_name_or_path=str(folder), train_mode=case.mode)  # type: ignore[arg-type]
    return load_model(named, case.lora, input_rows=rows)


def train(case: Case, folder: Path, watch: _Watch) -> None:
    """Three optimizer steps of a case."""
    model = load(case, folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(_STEPS * case.accumulation * case.rows):
        ids = torch.randint(2, case.shape["vocab_size"] - 2, (case.length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    extra: dict[str, Any] = {"activation_checkpointing_policy": case.policy}
    args = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=_STEPS, per_device_train_batch_size=case.rows, report_to="none",
        gradient_accumulation_steps=case.accumulation, bf16=case.precision == "bf16", optim=case.optim, save_strategy="no",
        activation_checkpointing=case.checkpointing, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    data = DataArguments(max_seq_length=case.length, objective=case.objective)  # type: ignore[arg-type]
    if case.objective == "wedlm":
        extra["wedlm_args"] = WeDLMArguments(mask_token_id=case.shape["vocab_size"] - 1)
    if case.average:
        extra["ema_args"] = EMAArguments(ema_decay=0.9)
    trainer = SFTTrainer(
        model, args, train_dataset=rows, data_args=data, attention_backend=case.backend, callbacks=[watch], **extra
    )
    if case.average:  # the average is counted as what stands
        begin = watch.on_step_begin

        def with_average(*positional: Any, **named: Any) -> None:
            begin(*positional, **named)
            if watch.live is not None:
                watch.standing += allocated(trainer.average.average.values())  # type: ignore[union-attr]

        watch.on_step_begin = with_average  # type: ignore[method-assign]
    trainer.train()


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Estimate and measured peak of a case, in bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = estimate(planned(case, device))
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    watch = _Watch(before)
    train(case, folder / "counted", watch)
    assert watch.peak is not None, "the step was not watched"
    result = {
        "case": case.name, "layers": case.shape["num_hidden_layers"], "width": case.shape["hidden_size"],
        "vocabulary": case.shape["vocab_size"], "tokens": case.rows * case.length, "estimate": said.total,
        "moment": said.moment, "parts": said.parts, "measured": watch.peak, "error": said.total / watch.peak - 1,
    }  # fmt: skip
    if device == "cpu":
        with growth() as grown:
            train(case, folder / "sampled", _Watch(0, count=False))
        result["rss"] = grown[0]
    return result


@contextmanager
def growth() -> Iterator[list[int]]:
    """The largest growth of the process inside the block, in bytes."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def sample() -> None:
        while not done.is_set():
            most[0] = max(most[0], process.memory_info().rss - before)
            time.sleep(0.001)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: estimate and measured peak in MiB, and the error of the estimate."""
    sampled = any("rss" in row for row in rows)
    head = ["case", "layers x width, vocabulary", "tokens", "peak at", "estimate", "measured", "error"] + (
        ["RSS"] if sampled else []
    )
    lines = [head, ["---", "---", "---:", "---", *("---:" for _ in head[4:])]]
    for row in rows:
        cells = [
            row["case"],
            f"{row['layers']} x {row['width']}, {row['vocabulary']:,}",
            f"{row['tokens']:,}",
            row["moment"],
        ]
        cells += [f"{row[key] / MIB:.0f}" for key in ("estimate", "measured")] + [percent(row["error"])]
        lines.append(cells + ([f"{row['rss'] / MIB:.0f}"] if "rss" in row else []))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/memory_error.json")
    parser.add_argument("--note", help="a remark for the record")
    parser.add_argument("--case", nargs="+", help="names of cases; default: all, and a record is written")
    options = parser.parse_args()
    logging.getLogger("hf_sft").setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    rows = []
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(case, Path(folder)))
        row = rows[-1]
        print(
            f"{case.name}: {row['estimate'] / MIB:.1f} {row['measured'] / MIB:.1f} {100 * row['error']:+.1f} %",
            file=sys.stderr,
        )
    print(table(rows))
    if not options.case or options.output:
        results = {"device": "cuda" if torch.cuda.is_available() else "cpu", "note": options.note, "cases": rows}
        print(f"record: {write_record('memory_error', results, options.output)}")


if __name__ == "__main__":
    main()
