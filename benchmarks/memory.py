"""What training needs of a device's memory: bytes of weights, gradients, optimizer states and activations, by model and mode.

    python benchmarks/memory.py [--output results.json]     prints the tables of docs/memory.md and docs/recipes.md

Models are built from the dimensions below on the meta device, adapters are put on them as ``train.py`` does it: parameters
are counted, not estimated, and tests/test_memory.py holds the counts against tensors that a run has really allocated.
Activations are counted by running a layer on tensors without storage and adding up what autograd keeps. No GPU is needed,
nothing is downloaded.

    state, one device    = weights + 4 T + 8 T                      T trained numbers: float32 gradients and Adam's two moments
      weights            = 4 P (full), 2 P + 4 T (LoRA), NF4 + 2 P_rest + 4 T (QLoRA)
    state, ZeRO-2        = frozen + (2 + 14 / N) T                  bf16 on N devices
    state, ZeRO-3, FSDP2 = frozen / N + 16 T / N
    activations          = L k h b + outside + max(copies + head, layer)    checkpointed; L layers, k tokens, width h, b bytes
                         = L layer + outside + head                         not checkpointed
      layer, outside     = what autograd keeps of one layer; before the first and behind the last
      copies             = 2 P_linear: autocast keeps the bf16 copies of float32 weights to the end of the forward pass
      head               = 6 c V + 2 k h b, in full training + 6 V h       c rows of a chunk, V rows of the vocabulary
    buffers              = 1.2e9 (ZeRO-2's buckets), 2e9 (ZeRO-3's whole weights), 8 P_layer + 6 P_root (FSDP2: two layers
                           whole in bf16 and one layer's float32 gradient; embeddings and head, which stay whole)

Not counted: CUDA's context and the allocator's gaps (1 to 2 GiB), temporaries, DDP's buckets (4 T).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from records import write_record
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from hf_sft.arguments import LoraArguments
from hf_sft.losses import _CHUNK_BYTES
from hf_sft.models.adapters import add_adapter
from hf_sft.models.families import STATE_SPACE_BARE_LAYERS, STATE_SPACE_TYPES
from hf_sft.models.wrappers import base_model

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "memory.json"
DEVICES, RANK, TOKENS = 8, 16, 2048  # of the tables of docs/memory.md
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)  # GiB of usual GPUs
RESERVE = 2 * GIB  # of a card for what is not counted, and a tenth of the sum


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
# Expert layers multiply groups of rows as the router deals them, which cannot be run without numbers.
NO_ACTIVATIONS = ("mixtral",)


# ---- what stands in memory between two steps ----


@dataclass(frozen=True)
class State:
    """Bytes of one process without an engine; ``frozen`` and ``trained`` count numbers of parameters.

    Args:
        frozen_weights: bytes of what is not trained.
        trained_weights, gradients, optimizer: bytes that belong to what is.
    """

    frozen: int
    trained: int
    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.frozen_weights + self.trained_weights + self.gradients + self.optimizer

    def per_device(self, engine: str, devices: int) -> float:
        """Bytes on each of N devices under bf16; the table of docs/distributed.md, with frozen weights as they are stored."""
        if engine == "zero2":
            return self.frozen_weights + (2 + 14 / devices) * self.trained
        if engine in ("zero3", "fsdp"):
            return (self.frozen_weights + 16 * self.trained) / devices
        raise ValueError(f"engine is {engine!r}; choose zero2, zero3 or fsdp")


def build(shape: dict[str, Any], dtype: torch.dtype, **changes: Any) -> Any:
    """The model of ``shape`` on the current device."""
    fields = {**shape, **changes}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def with_adapter(model: Any, rank: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that take no adapter
        return add_adapter(model, LoraArguments(lora_rank=rank))


def nf4_bytes(weight: torch.Tensor, *, double: bool = True) -> int:
    """Bytes of a weight in NF4 (arXiv 2305.14314): half a byte per number, a scale per block of 64, a table of 16 floats.

    Double quantisation: scales of one byte with a table of 256 floats, a float32 for each 256 of them, their mean.
    """
    blocks = -(-weight.numel() // 64)
    scales = blocks + 4 * 256 + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
    return -(-weight.numel() // 2) + scales + 16 * 4


def quantised_layers(base: Any) -> Iterator[nn.Module]:
    """The linear layers that QLoRA holds in NF4: all but the head, and but those whose weights a state-space model reads bare."""
    head, kind = base.get_output_embeddings(), base.config.model_type
    bare = STATE_SPACE_BARE_LAYERS if kind in STATE_SPACE_TYPES else frozenset()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name.rsplit(".", 1)[-1] not in bare:
            yield module


def state_of(shape: dict[str, Any], mode: str, rank: int) -> State:
    """Bytes of ``shape`` in ``train_mode`` full, lora or qlora, as ``load_model`` and the Trainer's AdamW hold it."""
    with torch.device("meta"):
        model = build(shape, torch.float32 if mode == "full" else torch.bfloat16)
        quantised = {id(layer.weight): nf4_bytes(layer.weight) for layer in quantised_layers(model)}
        model = model if mode == "full" else with_adapter(model, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    stored = quantised if mode == "qlora" else {}
    return State(
        frozen=sum(p.numel() for p in frozen),
        trained=sum(p.numel() for p in trained),
        frozen_weights=sum(stored.get(id(p), p.nbytes) for p in frozen),
        trained_weights=sum(p.nbytes for p in trained),
        gradients=sum(p.nbytes for p in trained),
        optimizer=sum(2 * p.nbytes + 4 for p in trained),  # two moments, and the number of steps
    )


def buffers_of(shape: dict[str, Any], engine: str | None) -> int:
    """Bytes that an engine holds beside the state, with the bucket sizes of train_args/deepspeed."""
    if engine is None:
        return 0
    if engine != "fsdp":
        return {"zero2": 1_200_000_000, "zero3": 2_000_000_000}[engine]
    with torch.device("meta"):
        model = build(shape, torch.bfloat16)
    layers = model.config.num_hidden_layers
    everything = sum(p.numel() for p in model.parameters())
    root = {id(m): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    outside = sum(root.values()) if not model.config.tie_word_embeddings else max(root.values())
    return 8 * (everything - outside) // layers + 6 * outside


# ---- what a micro-batch needs ----


@contextmanager
def kept(own: set[int]) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps inside the block -> bytes, without those in ``own``."""
    found: dict[int, int] = {}
    alive = []  # so that no address is given twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.is_floating_point():
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def fused_causal(
    module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **rest: Any
) -> Any:
    """Attention as fused kernels do it: no mask, and nothing kept beside the output and a number per row."""
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_causal", fused_causal)  # without a mask function: layers get none


def kept_bytes(shape: dict[str, Any], mode: str, rank: int, layers: int, rows: int, length: int) -> int:
    """Bytes that autograd keeps of a forward pass through ``layers`` layers, the embeddings' included and the head's not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    count = "n_layer" if "n_layer" in shape else "num_hidden_layers"
    with torch.device("meta"):
        model = build(shape, torch.float32 if mode == "full" else torch.bfloat16, **{count: layers})
        model = model if mode == "full" else with_adapter(model, rank)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without_storage(model)
        use_fused_attention(base_model(model))
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autocast("cpu", torch.bfloat16), kept(own) as found:
            body = base_model(model).base_model.train()
            body(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False)
    return sum(found.values())


def use_fused_attention(model: Any) -> None:
    """Where the model lets its attention be chosen: BLOOM's writes its scores out, and Mamba has none."""
    if model._supports_attention_backend:
        model.set_attn_implementation("fused_causal")


def without_storage(model: nn.Module) -> None:
    """Meta tensors become tensors of a CPU, which operations take for real under FakeTensorMode."""
    new: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in new:
                    empty = torch.empty(old.shape, dtype=old.dtype)
                    new[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
                held[name] = None if old is None else new[id(old)]


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, by the parts of the formula above."""

    checkpoints: int
    outside: int
    layer: int
    copies: int
    head: int

    def total(self, layers: int, checkpointed: bool) -> int:
        if checkpointed:
            return self.checkpoints + self.outside + max(self.copies + self.head, self.layer)
        return layers * self.layer + self.outside + self.head


def activations_of(
    shape: dict[str, Any], mode: str, rank: int, length: int, *, rows: int = 1, engine: str | None = None
) -> Activations:
    """Of a micro-batch of ``rows`` times ``length`` tokens; under an engine weights are bf16 and have no copies."""
    tokens = rows * length
    alike = "lora" if mode == "qlora" else mode  # NF4 weights are made whole one at a time, added below
    # State-space layers are run token by token, and keep the same for each.
    probe = (1, 64) if shape["model_type"] in STATE_SPACE_TYPES else (rows, length)
    one, two = (kept_bytes(shape, alike, rank, layers, *probe) for layers in (1, 2))
    with torch.device("meta"):
        model = build(shape, torch.bfloat16)
    config = model.config
    linear = [layer.weight.numel() for layer in quantised_layers(model)]
    per_layer = sum(linear) // config.num_hidden_layers
    full = mode == "full"
    wide = 4 if full and engine is None else 2  # float32 embeddings make a float32 residual stream under autocast
    layer = (two - one - (2 * per_layer if full else 0)) * tokens // (probe[0] * probe[1])
    layer += {"full": 2 * per_layer if engine is None else 0, "lora": 0, "qlora": 2 * max(linear)}[mode]
    chunk = min(tokens, max(16, _CHUNK_BYTES["cuda"] // (config.vocab_size * 4)))
    head = 6 * chunk * config.vocab_size + 2 * tokens * config.hidden_size * wide
    return Activations(
        checkpoints=config.num_hidden_layers * tokens * config.hidden_size * wide,
        outside=(2 * one - two) * tokens // (probe[0] * probe[1]),
        layer=layer,
        copies=2 * sum(linear) if full and engine is None else 0,
        head=head + (6 * config.vocab_size * config.hidden_size if full else 0),
    )


# ---- tables ----


def measure_models() -> list[dict[str, Any]]:
    """A row per model of ``SHAPES``: bytes of the state by mode and engine, and of a micro-batch of 2,048 tokens."""
    rows = []
    for name, shape in SHAPES.items():
        states = {mode: state_of(shape, mode, RANK) for mode in ("full", "lora", "qlora")}
        row: dict[str, Any] = {"model": name, "parameters": states["full"].trained, "adapter": states["lora"].trained}
        row["state"] = {mode: state.total for mode, state in states.items()}
        row["state"] |= {
            f"full {engine}": round(states["full"].per_device(engine, DEVICES)) for engine in ("zero2", "zero3")
        }
        row["parts"] = {mode: asdict(state) for mode, state in states.items()}
        row["activations"] = None
        if shape["model_type"] not in NO_ACTIVATIONS:
            layers = shape.get("n_layer") or shape["num_hidden_layers"]
            parts = {mode: activations_of(shape, mode, RANK, TOKENS) for mode in states}
            row["activations"] = {mode: part.total(layers, checkpointed=True) for mode, part in parts.items()}
            row["activation_parts"] = {mode: asdict(part) for mode, part in parts.items()}
        rows.append(row)
    return rows


def measure_file(path: Path) -> dict[str, Any]:
    """What a ready file of train_args/ needs of each GPU."""
    values = json.loads(path.read_text(encoding="utf-8"))
    name = values["model_name_or_path"]
    shape, mode, rank = SHAPES[ALIKE.get(name, name)], values["train_mode"], values.get("lora_rank", RANK)
    engine = Path(values["deepspeed"]).stem if "deepspeed" in values else "fsdp" if values.get("fsdp") else None
    state = state_of(shape, mode, rank)
    held = state.per_device(engine, DEVICES) if engine else state.total
    streams = 2 if values.get("objective") == "wedlm" or values.get("task_type") == "dpo" else 1
    rows, length = values["per_device_train_batch_size"], values["max_seq_length"] * streams
    layers = shape.get("n_layer") or shape["num_hidden_layers"]
    checkpointed = bool(values.get("activation_checkpointing") or values.get("fsdp"))
    batch = activations_of(shape, mode, rank, length, rows=rows, engine=engine).total(layers, checkpointed)
    total = round(held) + buffers_of(shape, engine) + batch
    card = next(size for size in CARDS if 1.1 * total + RESERVE < size * GIB)
    return {
        "file": path.stem, "gpus": DEVICES if engine else 1, "tokens": rows * length, "state": round(held),
        "buffers": buffers_of(shape, engine), "micro_batch": batch, "total": total, "card": card,
    }  # fmt: skip


def ready_files() -> list[Path]:
    """The files of train_args/ whose models are in ``SHAPES``."""
    found = []
    for path in sorted((ROOT / "train_args").glob("*.json")):
        name = json.loads(path.read_text(encoding="utf-8")).get("model_name_or_path", "")
        if ALIKE.get(name, name) in SHAPES:
            found.append(path)
    return found


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"


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
    body = [
        [f"`{r['model']}`", *(_gib((r["activations"] or {}).get(mode)) for mode in modes)]
        for r in rows
        if r["activations"]
    ]
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
    results = {"models": measure_models(), "files": [measure_file(path) for path in ready_files()]}
    print(models_table(results["models"]), activations_table(results["models"]), sep="\n\n", end="\n\n")
    print(files_table(results["files"]))
    print(f"record: {write_record('memory', results, options.output)}")


if __name__ == "__main__":
    main()
