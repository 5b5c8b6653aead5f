"""The same training on every engine: two CPU processes (gloo, one thread each), beside one process with two threads.

    python benchmarks/engines.py [--repeats 2] [--steps 8] [--processes 1 2 4] [--note "..."] [--output results.json]

Model and documents are those of ``benchmarks/causal_step.py``, in packs of 1,024 tokens; two packs per step, full and LoRA
(rank 8, all linear layers), float32. Engines take turns, each in fresh processes, so that a slow moment of the machine hits all.

- step: from the end of one to the end of the next on the first process, without saving; medians, the first two left out.
- processor: what all processes together computed for it, which other work on the machine hardly changes.
- save: a whole checkpoint, verified and brought to the disk.
- agreed: what processes ask each other at every step (SIGTERM), 2,000 times in a row on the two processes of DDP.

How cost grows with the number of processes: full training, one pack per process and step, a thread per process, without saving.
One process has no engine. Resident memory is the largest of any process, imports and all.

Processes of one machine share its memory and its cores: that says what engines add to a step, not how they scale. With more
processes than cores a step takes longer; the processor's seconds for a pack say what the engine adds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import conclude, parser, table
from turns import memory

ROOT = Path(__file__).resolve().parents[1]
ALONE = "one process"
ENGINES: dict[str, dict[str, Any]] = {
    ALONE: {},
    "DDP": {},
    "ZeRO-2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "ZeRO-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "FSDP2": {"fsdp": True},
}
MODES = ("full", "LoRA")
VOCABULARY, LENGTH, SAVE_STEPS, QUESTIONS = 6400, 1024, 4, 2000
PROCESSES = (1, 2, 4)


# ---- in the processes of one run ----


def train(engine: str, mode: str, steps: int, folder: str, packs: int, saves: bool) -> dict[str, list[float]]:
    """Seconds of each step, by the clock and of the processor, and of each checkpoint, on this process; the losses.

    Args:
        packs: of each step, of all processes together.
    """
    from peft import LoraConfig
    from transformers import TrainerCallback
    from workloads import documents, make_model

    from hf_sft.arguments import DataArguments
    from hf_sft.training.trainer import SFTTrainer
    from hf_sft.training_arguments import TrainingArguments

    found: dict[str, list[float]] = {"step": [], "processor": [], "save": []}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.mark = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["step"].append(time.perf_counter() - self.mark[0])
            found["processor"].append(time.process_time() - self.mark[1])
            self.mark = time.perf_counter(), time.process_time()

        on_save = on_train_begin

    args = TrainingArguments(
        output_dir=folder, max_steps=steps, logging_steps=1, learning_rate=1e-4, lr_scheduler_type="constant", use_cpu=True,
        per_device_train_batch_size=packs // int(os.environ.get("WORLD_SIZE", "1")), save_steps=SAVE_STEPS,
        save_strategy="steps" if saves else "no", save_total_limit=1, disable_tqdm=True, report_to="none", **ENGINES[engine],
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear") if mode == "LoRA" else None
    trainer: Any = SFTTrainer(
        make_model(VOCABULARY), args, train_dataset=documents(steps * 7 * packs, VOCABULARY), peft_config=lora,
        data_args=DataArguments(max_seq_length=LENGTH), attention_backend="segment", callbacks=[Clock()],
    )  # fmt: skip
    save = trainer._save_checkpoint

    def timed(*words: Any) -> None:
        start = time.perf_counter()
        save(*words)
        found["save"].append(time.perf_counter() - start)

    trainer._save_checkpoint = timed
    trainer.train()
    found["loss"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return found


def ask() -> list[float]:
    """Seconds of each question whether to stop."""
    from hf_sft.training.preemption import Preemption

    seconds = []
    with Preemption() as preemption:
        for _ in range(QUESTIONS):
            start = time.perf_counter()
            preemption.agreed()
            seconds.append(time.perf_counter() - start)
    return seconds


def work(engine: str, steps: int, target: Path, growing: bool) -> None:
    """All that one launch measures, written by the first process."""
    import torch.distributed as dist

    found: dict[str, Any] = {}
    packs = int(os.environ.get("WORLD_SIZE", "1")) if growing else 2
    for mode in MODES[:1] if growing else MODES:
        found[mode] = train(engine, mode, steps, str(target.with_name(mode)), packs, saves=not growing)
        everyone: list[Any] = [(found[mode]["processor"], memory())]
        if dist.is_initialized():
            everyone *= dist.get_world_size()
            dist.all_gather_object(everyone, everyone[0])
        found[mode]["processor"] = [sum(values) for values in zip(*(seconds for seconds, _ in everyone), strict=True)]
        found[mode]["peak_mb"] = max(peak for _, peak in everyone)
    if engine == "DDP" and not growing:
        found["agreed"] = ask()
    if os.environ.get("RANK", "0") == "0":
        target.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- launching ----


def launch(engine: str, steps: int, processes: int, growing: bool = False) -> dict[str, Any]:
    """Judged by the result alone: gloo now and then aborts a process at its exit."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        words = ["--engine", engine, "--steps", str(steps), "--output", str(target)]
        words += ["--growing"] if growing else []
        done = launched(__file__, words, processes, threads=1 if growing else 2 // processes)
        if not target.is_file():
            raise RuntimeError(f"{engine}: {done.stderr[-4000:]}")
        return json.loads(target.read_text())


def launched(
    script: str, words: list[str], processes: int, threads: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """``script`` in one process, or in several under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [*launcher, script, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def run(repeats: int, steps: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(repeats):
        for engine in ENGINES:
            runs[engine].append(launch(engine, steps, 1 if engine == ALONE else 2))
    results = []
    for mode in MODES:
        losses = runs[ALONE][0][mode]["loss"]
        for engine, each in runs.items():
            parts = [found[mode] for found in each]
            pairs = zip(losses, parts[0]["loss"], strict=True)
            seconds = {
                f"{name} seconds": statistics.median(value for part in parts for value in part[name][2:])
                for name in ("step", "processor")
            }
            results.append(
                {
                    "engine": engine,
                    "mode": mode,
                    **seconds,
                    "step seconds of each run": [statistics.median(part["step"][2:]) for part in parts],
                    "save milliseconds": 1e3 * statistics.median(value for part in parts for value in part["save"]),
                    "largest loss difference from one process": max(abs(a - b) for a, b in pairs),
                }
            )
    asked = [value for found in runs["DDP"] for value in found["agreed"]]
    cost = {"median": statistics.median(asked), "mean": statistics.mean(asked)}
    return {"engines": results, "agreed milliseconds": {name: 1e3 * value for name, value in cost.items()}}


def growth(processes: list[int], steps: int) -> dict[str, Any]:
    """The points of each engine, in the form of the axes of ``growth.py``; all begin with the one process that has none."""
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    for count in processes:
        for engine in [ALONE] if count == 1 else [name for name in ENGINES if name != ALONE]:
            part = launch(engine, steps, count, growing=True)["full"]
            measured[engine, count] = {
                "at": count, "seconds": statistics.median(part["step"][2:]), "peak_mb": part["peak_mb"],
                "processor_seconds_per_pack": statistics.median(part["processor"][2:]) / count,
            }  # fmt: skip
    series = {
        engine: [point for (name, _), point in measured.items() if name in (ALONE, engine)]
        for engine in ENGINES
        if engine != ALONE
    }
    return {"title": "processes", "series": series}


def markdown(results: dict[str, Any], part: str = "engines") -> str:
    """The table of a record, or of its ``processes``."""
    if part == "processes":
        head = ["processes", "", "s / step", "processor s / pack", "peak MB of a process"]
        body = [
            [
                str(p["at"]),
                series,
                f"{p['seconds']:.2f}",
                f"{p['processor_seconds_per_pack']:.2f}",
                f"{p['peak_mb']:,.0f}",
            ]
            for series, points in results["processes"]["series"].items()
            for p in points
        ]
        return table(head, body)
    body = [
        [f"{r['engine']}, {r['mode']}", f"{r['step seconds']:.2f}", f"{r['processor seconds']:.2f}"]
        + [f"{r['save milliseconds']:.0f}", f"{r['largest loss difference from one process']:.0e}"]
        for r in results["engines"]
    ]
    return table(["", "s / step", "processor s / step", "checkpoint, ms", "loss differs by"], body)


def main() -> None:
    words = parser(__doc__, "engines", steps=8, repeats=2)
    words.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES), help="how cost grows with them")
    words.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    words.add_argument("--growing", action="store_true", help=argparse.SUPPRESS)
    options = words.parse_args()
    if options.engine:
        work(options.engine, options.steps, Path(options.output), options.growing)
        return
    results = run(options.repeats, options.steps) | {"processes": growth(options.processes, options.steps)}
    print(markdown(results), end="\n\n")
    print(markdown(results, "processes"))
    print("agreed(): {median:.3f} ms (median), {mean:.3f} ms (mean)".format(**results["agreed milliseconds"]))
    conditions = {"note": options.note, "missed": [], "repeats": options.repeats, "steps": options.steps}
    conclude("engines", {**conditions, **results}, options.output)


if __name__ == "__main__":
    main()
