"""The memory table: parameters of public models, bytes of really allocated tensors, and docs that say what the script says."""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import runs
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import memory

# As the models' own pages and papers say.
PARAMETERS = {
    "EleutherAI/pythia-410m": 405_334_016,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "bigscience/bloom-1b1": 1_065_314_304,
    "state-spaces/mamba-1.4b-hf": 1_372_178_432,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "google/gemma-2b": 2_506_172_416,
    "state-spaces/mamba-2.8b-hf": 2_768_345_600,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
}
# Families, and whether head and embeddings are one.
FAMILIES = {"llama": False, "qwen2": True, "gpt_neox": False, "bloom": True, "mamba": True, "mixtral": False}
RANK = 3
RECORD = json.loads(memory.RECORD.read_text(encoding="utf-8"))["results"]


def shape_of(family: str, **changes: Any) -> dict[str, Any]:
    """The fields from which ``memory.build`` makes the tiny model."""
    fields = tiny.tiny_model(family, **changes).config.to_diff_dict()
    return {
        key: value for key, value in fields.items() if key not in ("architectures", "dtype", "transformers_version")
    }


def allocated(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def quantisation_state(model: Any) -> list[torch.Tensor]:
    """What NF4 weights hold beside their numbers."""
    found = []
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            nested = state.state2
            found += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    return found


# --- counted against allocated ----------------------------------------------------------------------------------------


def test_the_models_have_the_parameters_that_their_makers_state():
    found = {row["model"]: row["parameters"] for row in RECORD["models"]}
    assert found == PARAMETERS
    for name in ("Qwen/Qwen3-0.6B", "bigscience/bloom-1b1", "meta-llama/Llama-3.1-70B"):
        assert memory.state_of(memory.SHAPES[name], "full", RANK).trained == PARAMETERS[name]


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_is_counted_to_the_byte(family: str, mode: str, tmp_path):
    """After a step and a backward pass: weights, gradients, moments of a run as train.py makes it."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    changes = {"tie_word_embeddings": FAMILIES[family]}
    tiny.save_tiny(tmp_path / f"model-{family}", family, **changes)
    adapter = {} if mode == "full" else {"train_mode": mode, "lora_rank": RANK}
    values = runs.arguments(tmp_path, family, max_steps=1, bf16=True, **adapter)
    _, trainer = runs.train_in_memory(values)
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))

    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    moments = [value for p in trained for value in trainer.optimizer.state[p].values()]
    counted = memory.state_of(shape_of(family, **changes), mode, RANK)
    assert allocated(p.data for p in trained) == counted.trained_weights
    frozen = [p.data for p in parameters if not p.requires_grad]
    assert allocated([*frozen, *quantisation_state(trainer.model)]) == counted.frozen_weights
    assert sum(p.grad.nbytes for p in trained) == counted.gradients
    assert allocated(moments) == counted.optimizer
    assert sum(p.numel() for p in trained) == counted.trained


def test_state_per_device():
    state = memory.State(100, 10, 200, 40, 40, 80)
    assert state.total == 360
    assert state.per_device("zero2", 7) == 200 + (2 + 2) * 10
    assert state.per_device("zero3", 8) == state.per_device("fsdp", 8) == (200 + 160) / 8
    with pytest.raises(ValueError, match="choose zero2, zero3 or fsdp"):
        state.per_device("ddp", 8)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom", "mamba"])
def test_what_autograd_keeps_is_counted_without_storage_as_with(family: str):
    """A forward pass on real tensors keeps the bytes that the pass on tensors without storage says."""
    shape = shape_of(family)
    model = tiny.tiny_model(family).train()
    memory.use_fused_attention(model)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16), memory.kept(own) as found:
        model.base_model(input_ids=torch.zeros(1, 24, dtype=torch.int64), use_cache=False)
    assert memory.kept_bytes(shape, "full", RANK, 2, 1, 24) == sum(found.values()) > 0


def test_autocast_keeps_one_copy_of_a_weight_to_the_end():
    layer, rows = torch.nn.Linear(32, 64, bias=False), torch.zeros(2, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), memory.kept({layer.weight.untyped_storage()._cdata}) as found:
        layer(rows), layer(rows)
    copies = [size for size in found.values() if size == 2 * layer.weight.numel()]
    assert len(copies) == 1


def test_activations_grow_with_the_tokens():
    shape = shape_of("llama")
    one, two = (memory.activations_of(shape, "lora", RANK, tokens) for tokens in (640, 1280))
    assert (two.checkpoints, two.copies) == (2 * one.checkpoints, 0)
    assert two.layer == pytest.approx(2 * one.layer, rel=0.01)  # an adapter's bf16 copies do not grow
    full = memory.activations_of(shape, "full", RANK, 640)
    assert full.copies == 2 * sum(w.numel() for n, w in tiny.tiny_model("llama").named_parameters() if "_proj" in n)
    assert full.total(2, checkpointed=True) == full.checkpoints + full.outside + max(
        full.copies + full.head, full.layer
    )
    assert full.total(2, checkpointed=False) == 2 * full.layer + full.outside + full.head
    assert memory.activations_of(shape, "full", RANK, 640, engine="zero3").copies == 0


class Peak(TorchDispatchMode):
    """Bytes of all storages that operations make inside the block, and the most at once; those of ``known`` are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return output

    def gone(self, storage: int) -> None:
        self.now -= self.live.pop(storage, 0)


def peak_of_a_step(shape: dict[str, Any], mode: str, tokens: int, checkpointed: bool, folder: Any) -> int:
    """Bytes of one micro-batch of a real step, above what stands in memory all the time."""
    from hf_sft import DataArguments, SFTTrainer, TrainingArguments

    torch.manual_seed(0)
    model = memory.build(shape, torch.float32 if mode == "full" else torch.bfloat16)
    model = model if mode == "full" else memory.with_adapter(model, RANK)
    ids = torch.randint(0, shape["vocab_size"], (tokens,)).tolist()
    args = TrainingArguments(
        output_dir=str(folder), max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=1, bf16=True,
        use_cpu=True, activation_checkpointing=checkpointed, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids}] * 2
    data = DataArguments(max_seq_length=tokens)
    trainer = SFTTrainer(model, args, train_dataset=rows, data_args=data, attention_backend="segment")
    step, peaks = trainer.training_step, []

    def watched(*positional: Any, **named: Any) -> Any:
        held = [t for p in trainer.model.parameters() for t in (p, p.grad) if t is not None]
        with Peak(held) as peak:
            result = step(*positional, **named)
        peaks.append(peak.most)
        return result

    trainer.training_step = watched
    trainer.train()
    return peaks[-1]  # gradients are there already


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "whole"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_formula_is_near_the_peak_of_a_real_step(mode: str, checkpointed: bool, tmp_path):
    """Within a tenth: what it leaves out are temporaries of single operations."""
    shape = {**memory._qwen3(256, 768, 4, 8, tied=False), "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096}
    measured = peak_of_a_step(shape, mode, 1024, checkpointed, tmp_path)
    said = memory.activations_of(shape, mode, RANK, 1024).total(4, checkpointed)
    assert 0.9 < said / measured < 1.1


# --- the docs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page, name", [("memory", "models"), ("memory", "activations"), ("recipes", "files")])
def test_the_tables_of_the_docs_are_those_of_the_record(page: str, name: str):
    text = (runs.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- benchmarks/memory.py: {name} -->\n\n(.*?)\n\n", text, re.DOTALL)
    rows = RECORD["files" if name == "files" else "models"]
    assert shown == getattr(memory, f"{name}_table")(rows)


def test_the_record_is_what_the_script_finds():
    assert [row["file"] for row in RECORD["files"]] == [path.stem for path in memory.ready_files()]
    quick = [
        (path, row) for path, row in zip(memory.ready_files(), RECORD["files"], strict=True) if "mamba" not in path.stem
    ]
    assert [row for _, row in quick] == [memory.measure_file(path) for path, _ in quick]


@pytest.mark.slow
def test_the_record_of_the_models_is_what_the_script_finds():
    assert RECORD["models"] == memory.measure_models()
    assert RECORD["files"] == [memory.measure_file(path) for path in memory.ready_files()]
