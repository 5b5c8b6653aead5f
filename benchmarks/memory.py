"""The tables of docs/memory.md and docs/recipes.md: bytes of public models and of the ready files of train_args/.

    python benchmarks/memory.py [--output results.json]

Models are built from the dimensions below on the meta device and counted by ``hf_sft.memory``, as by ``hf-sft inspect --memory``;
tests/test_memory.py holds the counts against tensors that a run has really allocated. No GPU is needed, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from records import write_record
from transformers import AutoConfig

from hf_sft.arguments import LoraArguments
from hf_sft.commands.memory import plan_of
from hf_sft.memory.activations import MicroBatch, Run, activations_of
from hf_sft.memory.plan import estimate
from hf_sft.memory.states import state_of

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "memory.json"
DEVICES, RANK, TOKENS = 8, 16, 2048  # of the tables of docs/memory.md


def _llama(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict:
    return dict(
        model_type=kind, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=False, **more,
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict:
    shape = _llama("qwen3", hidden, inner, layers, heads, 8, 151936, head_dim=128)
    return {**shape, "tie_word_embeddings": tied}


def _mamba(hidden: int, layers: int) -> dict:
    return dict(
        model_type="mamba", hidden_size=hidden, num_hidden_layers=layers, vocab_size=50280, state_size=16, expand=2,
        conv_kernel=4, time_step_rank=hidden // 16, intermediate_size=2 * hidden, use_bias=False, use_conv_bias=True,
    )  # fmt: skip


# Dimensions as in the config.json of the named repository on the hub; Qwen3's also in arXiv 2505.09388, table 1.
SHAPES: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-410m": dict(
        model_type="gpt_neox", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        vocab_size=50304, max_position_embeddings=2048, rotary_pct=0.25, tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "bigscience/bloom-1b1": dict(
        model_type="bloom", hidden_size=1536, n_layer=24, n_head=16, vocab_size=250880, tie_word_embeddings=True
    ),
    "state-spaces/mamba-1.4b-hf": _mamba(2048, 48),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "google/gemma-2b": {**_llama("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256), "tie_word_embeddings": True},
    "state-spaces/mamba-2.8b-hf": _mamba(2560, 64),
    "meta-llama/Llama-2-7b-hf": _llama("llama", 4096, 11008, 32, 32, 32, 32000),
    "mistralai/Mistral-7B-v0.1": _llama("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
    "Qwen/Qwen2-7B": _llama("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "meta-llama/Llama-3.1-8B": _llama("llama", 4096, 14336, 32, 32, 8, 128256),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
    "mistralai/Mixtral-8x7B-v0.1": _llama(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "meta-llama/Llama-3.1-70B": _llama("llama", 8192, 28672, 80, 64, 8, 128256),
}  # fmt: skip


# Of the same dimensions.
ALIKE = {
    "Qwen/Qwen3-8B-Base": "Qwen/Qwen3-8B",
    "tencent/WeDLM-8B-Base": "Qwen/Qwen3-8B",
    "tencent/WeDLM-8B-Instruct": "Qwen/Qwen3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "meta-llama/Llama-3.1-8B",
}


def config_of(shape: dict[str, Any]) -> Any:
    """The config of a shape."""
    fields = dict(shape)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


# ---- tables ----


def measure_model(name: str) -> dict[str, Any]:
    """Bytes of a model's state by mode and engine, and of a micro-batch of 2,048 tokens, checkpointed, on one device."""
    config, lora = config_of(SHAPES[name]), LoraArguments(lora_rank=RANK)
    states = {mode: state_of(config, mode, lora) for mode in ("full", "lora", "qlora")}
    row: dict[str, Any] = {"model": name, "parameters": states["full"].trained, "adapter": states["lora"].trained}
    row["state"] = {mode: state.total for mode, state in states.items()}
    row["state"] |= {
        f"full {engine}": round(states["full"].per_device(engine, DEVICES).total) for engine in ("zero2", "zero3")
    }
    row["parts"] = {mode: {k: v for k, v in asdict(state).items() if k != "shapes"} for mode, state in states.items()}
    parts = {}
    for mode in states:
        stored = torch.float32 if mode == "full" else torch.bfloat16
        run = Run(mode=mode, dtype=stored, autocast=torch.bfloat16, lora=lora, checkpointing=True)
        parts[mode] = activations_of(config, run, MicroBatch(1, TOKENS))
    row["activations"] = {mode: part.most(config.num_hidden_layers) for mode, part in parts.items()}
    row["activation_parts"] = {mode: asdict(part) for mode, part in parts.items()}
    return row


def measure_file(path: Path) -> dict[str, Any]:
    """What a ready file of train_args/ needs of each GPU, with 8 of them where it has an engine."""
    values = json.loads(path.read_text(encoding="utf-8"))
    name = values["model_name_or_path"]
    plan = plan_of(values, config=config_of(SHAPES[ALIKE.get(name, name)]))
    found = estimate(plan)
    parts, buffers = found.parts, found.parts.get("engine's buffers", 0)
    state = sum(parts.get(name, 0) for name in ("weights", "gradients", "optimizer"))
    return {
        "file": path.stem, "gpus": plan.devices, "tokens": plan.activations.tokens, "state": state, "buffers": buffers,
        "micro_batch": found.total - state - buffers, "total": found.total, "card": found.card, "moment": found.moment,
    }  # fmt: skip


def ready_files() -> list[Path]:
    """The files of train_args/ whose models are in ``SHAPES``."""
    found = []
    for path in sorted((ROOT / "train_args").glob("*.json")):
        name = json.loads(path.read_text(encoding="utf-8")).get("model_name_or_path", "")
        if ALIKE.get(name, name) in SHAPES:
            found.append(path)
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def models_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the state of each model, GiB per device."""
    head = ["model", "10^9 parameters", "full", f"full, ZeRO-2 x {DEVICES}", f"full, ZeRO-3 or FSDP2 x {DEVICES}"]
    head += ["LoRA", "QLoRA"]
    keys = ("full", "full zero2", "full zero3", "lora", "qlora")
    return _table(
        head,
        [[f"`{r['model']}`", f"{r['parameters'] / 1e9:.2f}", *(_gib(r["state"][key]) for key in keys)] for r in rows],
    )


def activations_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what a micro-batch takes on one device, GiB."""
    modes = ("full", "lora", "qlora")
    body = [[f"`{r['model']}`", *(_gib(r["activations"][mode]) for mode in modes)] for r in rows]
    return _table(["model", "full", "LoRA", "QLoRA"], body)


def files_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what the ready files need of each GPU, GiB."""
    head = ["file", "GPUs", "tokens", "state", "buffers", "micro-batch", "sum", "GPU of"]
    body = [
        [f"`{r['file']}`", str(r["gpus"]), f"{r['tokens']:,}"]
        + [_gib(r[key]) for key in ("state", "buffers", "micro_batch", "total")]
        + [f"{r['card']} GiB"]
        for r in rows
    ]
    return _table(head, body)


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/memory.json")
    options = parser.parse_args()
    results = {
        "models": [measure_model(name) for name in SHAPES],
        "files": [measure_file(path) for path in ready_files()],
    }
    print(models_table(results["models"]), activations_table(results["models"]), sep="\n\n", end="\n\n")
    print(files_table(results["files"]))
    print(f"record: {write_record('memory', results, options.output)}")


if __name__ == "__main__":
    main()
