"""What activation checkpointing keeps: counted operations, the same bits under every policy, and every refusal."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import torch
from layouts import packed
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sft import DataArguments, SFTTrainer, TrainingArguments, WeDLMArguments
from hf_sft.attention.backends import backend_named
from hf_sft.attention.layout import Layout
from hf_sft.checks import checkpointing_problems
from hf_sft.models.checkpointing import keep_in_layers

POLICIES = ("full", "attention", "products")


class Counting(TorchDispatchMode):
    """How often each operation runs; what checkpointing has kept does not."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func.name()] += 1
        return func(*args, **kwargs or {})


def backward_operations(
    model: torch.nn.Module, backend: str, policy: str | None
) -> tuple[Counter[str], list[torch.Tensor]]:
    """What a backward pass runs, and the gradients."""
    batch, chosen = packed("causal", [5, 30, 12], 8), backend_named(backend)
    chosen.install(model)
    model.train().zero_grad()
    if policy is not None:
        tiny.checkpoint_activations(model, use_reentrant=False)
    if policy not in (None, "full"):
        keep_in_layers(model, policy, None)
    inputs = chosen.inputs(model, Layout.from_batch(batch))
    states = model.base_model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)
    with Counting() as counting:
        states.last_hidden_state.square().sum().backward()
    return counting.ran, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def counted() -> dict[str | None, tuple[Counter[str], list[torch.Tensor]]]:
    return {policy: backward_operations(tiny.tiny_model("qwen3"), "segment", policy) for policy in (None, *POLICIES)}


def test_what_is_kept_is_not_computed_again(counted) -> None:
    """2 layers, 3 documents, 7 products in a layer; the last one of a layer is needed by nothing in it."""
    names = "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::silu"
    plain = [counted[None][0][name] for name in names]
    assert plain[1:] == [0, 0] and plain[0] == 2 * 2 * 7, "each product has two gradients"
    again = {
        policy: [counted[policy][0][name] - n for name, n in zip(names, plain, strict=True)] for policy in POLICIES
    }
    assert again == {"full": [12, 6, 2], "attention": [12, 0, 2], "products": [0, 0, 2]}


def test_gradients_are_the_same_bits(counted) -> None:
    for policy in POLICIES:
        for got, want in zip(counted[policy][1], counted[None][1], strict=True):
            assert torch.equal(got, want), policy


def test_written_out_scores_are_computed_again() -> None:
    """Eager attention: two products per layer, scores [heads, T, T] and what they weigh; the second one is kept."""
    ran = {}
    for policy in (None, "full", "products"):
        model = tiny.tiny_model("llama")
        model.set_attn_implementation("eager")
        ran[policy] = backward_operations(model, "dense", policy)[0]
    again = {policy: ran[policy]["aten::bmm"] - ran[None]["aten::bmm"] for policy in ("full", "products")}
    assert again == {"full": 4, "products": 2}
    assert ran["products"]["aten::mm"] == ran[None]["aten::mm"]


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_experts_sinks_and_soft_caps(family: str) -> None:
    """gpt-oss adds the biases of its experts in place to products, which must not be kept then."""
    found = {policy: backward_operations(tiny.tiny_model(family), "segment", policy) for policy in (None, "products")}
    assert all(torch.equal(got, want) for got, want in zip(found["products"][1], found[None][1], strict=True))
    assert found["products"][0]["aten::mm"] == found[None][0]["aten::mm"]


def trained(folder: Any, policy: str | None, objective: str = "causal", **options: Any) -> SFTTrainer:
    torch.manual_seed(0)
    checkpointing = {} if policy is None else {"activation_checkpointing": True}
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
        learning_rate=1e-2, **checkpointing,
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny.tiny_model("qwen3"), args, train_dataset=tiny.conversations(12), processing_class=tiny.tiny_tokenizer(),
        data_args=DataArguments(max_seq_length=128, objective=objective),
        wedlm_args=WeDLMArguments(mask_token="<|mask|>", block_size=8) if objective == "wedlm" else None,
        activation_checkpointing_policy=policy or "full", **options,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["full", "lora", "wedlm"])
def test_a_training_gives_the_same_weights(kind: str, tmp_path) -> None:
    options: dict[str, Any] = {"objective": "wedlm"} if kind == "wedlm" else {}
    found = {}
    for policy in (None, *POLICIES):
        adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if kind == "lora" else {}
        trainer = trained(tmp_path, policy, **options, **adapter)
        found[policy] = trainer.model.state_dict()
        text = trainer.args.to_json_string()
        assert "context_fn" not in text and json.loads(text)["activation_checkpointing"] == (policy is not None)
    for policy in POLICIES:
        assert all(torch.equal(found[policy][name], value) for name, value in found[None].items()), policy


def test_from_the_command_line(tmp_path) -> None:
    values = runs.arguments(
        tmp_path, max_steps=1, activation_checkpointing=True, activation_checkpointing_policy="products"
    )
    folder, trainer = runs.train_in_memory(values)
    assert trainer.activation_checkpointing_policy == "products"
    layer = trainer.model.model.layers[0]
    assert layer.gradient_checkpointing and "context_fn" in layer._gradient_checkpointing_func.keywords
    saved = json.loads((folder / "args.json").read_text())
    assert "context_fn" not in json.dumps(saved) and '"activation_checkpointing_policy": "products"' in json.dumps(
        saved
    )


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"activation_checkpointing": True, "activation_checkpointing_kwargs": None} | changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"activation_checkpointing": False}, "activation_checkpointing is not true: set it"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant true.*set it to false"),
        (
            {"activation_checkpointing": False, "fsdp_config": {"activation_checkpointing": True}},
            "FSDP's own activation checkpointing.*beside fsdp_config instead",
        ),
        ({"torch_compile": True}, "torch_compile is true.*leave one of them out"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], words: str) -> None:
    for policy in POLICIES:
        found = [*checkpointing_problems(policy, settings(**changes))]
        assert len(found) == (policy != "full")
        if found:
            with pytest.raises(ValueError, match=words):
                raise ValueError(found[0])
    assert not [*checkpointing_problems("products", settings())]


def test_an_unknown_policy(tmp_path) -> None:
    with pytest.raises(ValueError, match="'most': choose full, attention, products"):
        trained(tmp_path, "most")
