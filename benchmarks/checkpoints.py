"""What a checkpoint costs: our SFTTrainer's against plain transformers' Trainer's, of the same model, in turn; medians.

    python benchmarks/checkpoints.py [--repeats 5] [--width 768] [--layers 10] [--output FILE] [--note TEXT]

A Qwen3-like model (95M parameters, float32, AdamW) has taken one step; then ``_save_checkpoint`` is called again and again (the
one before is removed between the turns), and then training is resumed from the last, to the beginning of its first step, in full
training and with LoRA. Ours are verified (names and shapes of every tensor against the model, every file readable), on the disk
(fsync) and named in one step when they are whole; Trainer's are in the system's memory when it goes on, and can be lost or cut
off. So there is a third way: Trainer's, and its files brought to the disk. Each way is a process of its own (``turns``).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from records import conclude, parser, table
from turns import WARM_UP, Turn, alternate
from workloads import make_model, row

OURS, PLAIN, FLUSHED = "hf_sft", "Trainer", "Trainer, and fsync"
PARTS = ("verification", "fsync", "bytes")
_VOCABULARY, _LENGTH = 32_000, 32


class Begun(Exception):
    """A resumed run is at its first step."""


def trainer_of(way: str, folder: str, mode: str, steps: int, width: int, layers: int) -> Any:
    """Ours or transformers', on a few short rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer
    from transformers import TrainingArguments as Plain

    from hf_sft import DataArguments, SFTTrainer, TrainingArguments

    model: Any = make_model(_VOCABULARY, width=width, layers=layers, positions=2048)
    if mode == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    rng = np.random.default_rng(0)
    rows: list[Any] = [row(_LENGTH, _VOCABULARY, rng, supervised=1.0) for _ in range(64)]
    values: dict[str, Any] = dict(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=1, use_cpu=True, disable_tqdm=True, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    if way != OURS:
        plain = [{name: found.tolist() for name, found in each.items()} for each in rows]
        return Trainer(model, Plain(**values), train_dataset=plain)  # type: ignore[arg-type]
    data = DataArguments(max_seq_length=_LENGTH)
    return SFTTrainer(
        model, TrainingArguments(**values), train_dataset=rows, data_args=data, attention_backend="segment"
    )


def saving(turn: Turn, steps: int, way: str, folder: str, **shape: Any) -> list[float]:
    """``steps`` checkpoints, of which the last stays; returns PARTS of each, in seconds and bytes."""
    from trainers import quiet

    from hf_sft.checkpoints.writing import flush

    quiet()
    trainer = trainer_of(way, folder, steps=1, **shape)
    trainer.train()
    found: list[float] = []
    for number in range(2, steps + 2):
        trainer.state.global_step = number
        newest = Path(folder, f"checkpoint-{number}")
        with _clocks() as clocks:
            turn.begin()
            trainer._save_checkpoint(trainer.model, None)
            if way == FLUSHED:
                for path in newest.rglob("*"):
                    flush(path)
                flush(newest)
            turn.end()
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        found += [clocks["verification"], clocks["fsync"], size]
        for path in Path(folder).glob("checkpoint-*"):
            if path != newest:
                shutil.rmtree(path)
    return found


def resuming(turn: Turn, steps: int, way: str, folder: str, **shape: Any) -> list[float]:
    """``steps`` times from the call of ``train`` to the beginning of the first step behind a checkpoint."""
    from trainers import quiet
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            raise Begun

    quiet()
    (checkpoint,) = Path(folder).glob("checkpoint-*")
    number = int(checkpoint.name.rpartition("-")[2])
    for _ in range(steps):
        trainer = trainer_of(way, folder, steps=number + 1, **shape)
        trainer.add_callback(Stops())
        turn.begin()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        except Begun:
            turn.end()
            continue
        raise RuntimeError(f"nothing was left to train behind {checkpoint}")
    return []


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Seconds of a checkpoint that go into its verification, and into bringing it to the disk."""
    from hf_sft.checkpoints import writing
    from hf_sft.training import trainer

    found = {"verification": 0.0, "fsync": 0.0}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                found[name] += time.perf_counter() - begun

        return inner

    with ExitStack() as stack:
        for module, name, part in (
            (trainer, "verify_weights", "verification"), (trainer, "verify_adapter", "verification"),
            (writing, "unreadable", "verification"), (writing, "flush", "fsync"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name), part)))
        yield found


def measure(mode: str, repeats: int, width: int, layers: int) -> dict[str, Any]:
    """Seconds, bytes and parts of saving and resuming, by way."""
    shape = {"mode": mode, "width": width, "layers": layers}
    with tempfile.TemporaryDirectory() as place:
        folders = {way: str(Path(place, str(number))) for number, way in enumerate((OURS, PLAIN, FLUSHED))}
        told = {way: {"way": way, "folder": folder, **shape} for way, folder in folders.items()}
        saved = alternate({way: (saving, told[way]) for way in folders}, repeats)
        resumed = alternate({way: (resuming, told[way]) for way in (OURS, PLAIN)}, repeats)
    found: dict[str, Any] = {}
    for way, course in saved.items():
        parts = np.reshape(course.losses, (-1, len(PARTS)))[WARM_UP:]
        medians = dict(zip(PARTS, np.median(parts, axis=0).tolist(), strict=True))
        found[way] = {
            "save_seconds": round(course.median, 4),
            "of_which_verification": round(medians["verification"], 4) if way == OURS else None,
            "of_which_fsync": round(medians["fsync"], 4) if way == OURS else None,
            "bytes": int(medians["bytes"]),
            "all_save_seconds": [round(value, 4) for value in course.seconds],
        }
    for way, course in resumed.items():
        found[way]["resume_seconds"] = round(statistics.median(course.seconds), 4)
        found[way]["all_resume_seconds"] = [round(value, 4) for value in course.seconds]
    return found


def markdown(results: dict[str, Any]) -> str:
    """The table of a record."""
    body = []
    for mode in ("full", "lora"):
        for way, each in results[mode].items():
            kinds = ("save_seconds", "of_which_verification", "of_which_fsync", "resume_seconds")
            figures = ["" if each.get(kind) is None else f"{each[kind]:.3f}" for kind in kinds]
            body.append([f"{way}, {mode}", *figures, f"{each['bytes'] / 1e6:,.0f}"])
    return table(["", "save, s", "of it verifying", "of it fsync", "resume, s", "MB"], body)


def main() -> None:
    words = parser(__doc__, "checkpoints", repeats=5)
    words.add_argument("--width", type=int, default=768)
    words.add_argument("--layers", type=int, default=10)
    options = words.parse_args()
    results: dict[str, Any] = {"note": options.note, "missed": []}  # nothing is demanded
    results |= {name: getattr(options, name) for name in ("repeats", "width", "layers")}
    for mode in ("full", "lora"):
        results[mode] = measure(mode, options.repeats, options.width, options.layers)
    print(markdown(results))
    conclude("checkpoints", results, options.output)


if __name__ == "__main__":
    main()
