"""Adapters: what they cover, what is trained, and that a saved one gives the trained model back."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import checkpoint_activations, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from hf_sft.arguments import LoraArguments, ModelArguments
from hf_sft.checkpoints import CheckpointError, verify_adapter
from hf_sft.models.adapters import save_adapter
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.sharded import summary, trainable_parameters
from hf_sft.models.targets import target_modules
from hf_sft.models.vocabulary import grow_embeddings

NEW = ["<|tool|>", "<|mask|>"]
KINDS = {
    "plain": {},
    "bias all": {"lora_bias": "all"},
    "bias of adapted layers": {"lora_bias": "lora_only"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "norm saved": {"modules_to_save": ["norm"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_tiny(tmp_path / "base")


def load(folder: str, mode: str = "lora", *, new: list[str] | None = None, dtype: str | None = "float32", **lora):
    named = ModelArguments(model_name_or_path=folder, train_mode=mode, dtype=dtype, new_special_tokens=new or [])
    torch.manual_seed(0)
    return load_model(named, LoraArguments(**{"lora_rank": 4, **lora}), tokenizer=load_tokenizer(named))


def random_ids(vocabulary: int = 259) -> torch.Tensor:
    ids = torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    ids[:, 3::7] = vocabulary - 1
    return ids


def train(model, ids: torch.Tensor, steps: int = 2) -> torch.Tensor:
    """A few steps, so that B and all that starts at zero is not zero; returns the logits [2, L, V] afterwards."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return logits(model, ids)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


# Coverage


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "mamba"])
def test_all_linear_is_every_linear_layer_but_the_head(family) -> None:
    model = tiny_model(family)
    names, excluded, parameters = target_modules(model, ["all-linear"])
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    read_directly = {"x_proj", "dt_proj", "out_proj"} if family == "mamba" else set()
    assert set(names) == linear - {head} - read_directly
    assert excluded == [] and parameters == []


def test_named_layers(folder) -> None:
    model = load(folder, lora_target_modules=["0.self_attn.q_proj", "up_proj"])
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert {n.removeprefix("base_model.model.model.layers.") for n in adapted} == {
        "0.self_attn.q_proj",
        "0.mlp.up_proj",
        "1.mlp.up_proj",
    }
    with_head = load(folder, lora_target_modules=["all-linear", "lm_head"])
    assert any("lm_head.lora_A" in n for n, _ in with_head.named_parameters())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_target_modules": ["q_prj"]}, "'q_prj' matches no layer.*q_proj"),
        ({"lora_target_modules": ["mlp"]}, "LlamaMLP"),
        ({"lora_target_modules": []}, "empty"),
        ({"modules_to_save": ["lmhead"]}, "'lmhead' matches no module.*lm_head"),
        ({"modules_to_save": ["layers"]}, r"\['layers'\]: model\.layers is a list of layers"),
        ({"modules_to_save": ["model"]}, r"\['model'\] holds every layer of lora_target_modules"),
        ({"modules_to_save": ["mlp", "self_attn"]}, "nothing is left for the adapter"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_wrong_arguments(folder, lora, message) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **lora)


def test_tied_embedding_takes_no_adapter_of_its_own(tmp_path) -> None:
    tied = save_tiny(tmp_path, tie_word_embeddings=True)
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match="share one weight"):
            load(tied, lora_target_modules=[name])


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_are_trained(tmp_path, bias) -> None:
    source = save_tiny(tmp_path, "gpt_neox")
    model = load(source, lora_bias=bias, lora_target_modules=["query_key_value"])
    trained = {n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad}
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    adapted = {n for n in biases if "query_key_value.base_layer" in n}
    assert len(adapted) == 2
    assert trained == {"none": set(), "all": biases, "lora_only": adapted}[bias]


def test_trainable_parameters_count_quantised_weights_whole(folder) -> None:
    plain = trainable_parameters(load(folder))
    assert plain[1] - plain[0] == sum(p.numel() for p in tiny_model().parameters())
    assert (
        summary(load(folder))
        == f"Trainable parameters: {plain[0]:,} of {plain[1]:,} ({100 * plain[0] / plain[1]:.3g} %)"
    )
    pytest.importorskip("bitsandbytes")
    assert trainable_parameters(load(folder, "qlora")) == plain


def test_adapter_weights_are_float32_on_a_bfloat16_base(folder) -> None:
    """Saved modules too, which PEFT leaves in the base's type; the model runs with and without autocast."""
    model = load(folder, dtype=None, modules_to_save=["lm_head", "embed_tokens", "norm"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    ids = random_ids()
    plain = model(input_ids=ids, labels=ids, use_cache=False)
    assert plain.logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids=ids, labels=ids, use_cache=False)
    torch.testing.assert_close(plain.loss, mixed.loss.to(plain.loss.dtype), rtol=1e-2, atol=0)
    (plain.loss + mixed.loss).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_reentrant_checkpointing_gets_a_graph(folder) -> None:
    class Training:
        seed = 0
        activation_checkpointing = True
        activation_checkpointing_kwargs = {"use_reentrant": True}

    named = ModelArguments(model_name_or_path=folder, train_mode="lora", dtype="float32")
    model = load_model(named, LoraArguments(), training=Training())
    checkpoint_activations(model.get_base_model(), use_reentrant=True)
    model(input_ids=random_ids(), labels=random_ids(), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# New tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [259, 320])
def test_only_the_rows_of_new_tokens_are_trained(tmp_path, tied, rows) -> None:
    source = save_tiny(tmp_path / "base", vocab_size=rows, tie_word_embeddings=tied)
    model = load(source, new=NEW)
    base = model.get_base_model()
    before = base.get_input_embeddings().weight.detach().clone()
    ids = random_ids(261)
    train(model, ids)
    after = base.get_input_embeddings().weight
    assert torch.equal(after[:259], before[:259])
    assert torch.equal(after[261:], before[261:])
    assert (after[259:261] != before[259:261]).any(dim=1).tolist() == [False, True] if not tied else [True, True]
    trained = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert all(p.shape == (2, 32) for p in trained.values())
    assert len(trained) == (1 if tied else 2)  # embedding, and a head that is not the embedding
    save_adapter(model, str(tmp_path / "adapter"))
    verify_adapter(tmp_path / "adapter", model)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == trainable_parameters(model)[0]


def test_new_tokens_and_a_head_with_a_bias(tmp_path) -> None:
    """PEFT's wrapper of the head would drop the bias: such a head is left alone, and that is said."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "phi", vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has a bias"):
        adapted = load(str(tmp_path), new=NEW)
    ids = random_ids()
    torch.testing.assert_close(logits(adapted, ids)[..., :259], logits(model, ids), rtol=0, atol=1e-6)


# Saving and loading


@pytest.mark.parametrize("new", [[], NEW], ids=["", "new tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_gives_the_trained_logits(tmp_path, kind, tied, new) -> None:
    source = save_tiny(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    model = load(source, new=new, **KINDS[kind])
    ids = random_ids(259 + len(new))
    trained = train(model, ids)
    assert not torch.allclose(
        trained[..., :259], logits(tiny_model("qwen2", tie_word_embeddings=tied), ids % 259), atol=1e-3
    )
    save_adapter(model, str(tmp_path / "adapter"))
    verify_adapter(tmp_path / "adapter", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT says that the grown vocabulary is saved whole
        model.save_pretrained(tmp_path / "as HF saves it")
    verify_adapter(tmp_path / "as HF saves it", model)
    for saved in ("adapter", "as HF saves it"):
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if new:
            base.resize_token_embeddings(261)
        fresh = PeftModel.from_pretrained(base, tmp_path / saved)
        torch.testing.assert_close(logits(fresh, ids), trained, rtol=0, atol=1e-6)
    ours = load(source, new=new, adapter_name_or_path=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(ours, ids), trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "dora", "head saved"])
def test_qlora_adapter_round_trip(tmp_path, kind) -> None:
    pytest.importorskip("bitsandbytes")
    source = save_tiny(tmp_path / "base")
    model = load(source, "qlora", new=NEW, **KINDS[kind])
    ids = random_ids(261)
    trained = train(model, ids)
    save_adapter(model, str(tmp_path / "adapter"))
    verify_adapter(tmp_path / "adapter", model)
    again = load(source, "qlora", new=NEW, adapter_name_or_path=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again, ids), trained, rtol=0, atol=1e-6)
    assert trainable_parameters(again) == trainable_parameters(model)


def test_going_on_with_an_adapter(folder, tmp_path) -> None:
    """The same steps with and without a stop in between."""
    ids = random_ids()
    whole = load(folder)
    train(whole, ids, steps=4)
    first = load(folder)
    train(first, ids, steps=2)
    save_adapter(first, str(tmp_path / "adapter"))
    second = load(folder, adapter_name_or_path=str(tmp_path / "adapter"))
    train(second, ids, steps=2)
    for (name, a), (_, b) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b), name


def test_an_existing_adapter_keeps_its_shape(folder, tmp_path) -> None:
    save_adapter(load(folder), str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match=r"lora_rank 8 \(the adapter has 4\)"):
        load(folder, adapter_name_or_path=str(tmp_path / "adapter"), lora_rank=8)
    with pytest.raises(ValueError, match="Merge it first"):
        load(folder, new=NEW, adapter_name_or_path=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_size": 64}, "size mismatch"),
        ("llama", {"num_hidden_layers": 1}, "no place for 14"),
        ("llama", {"num_hidden_layers": 3}, "lacks 14"),
        ("gpt_neox", {}, "not found in the base"),
    ],
)
def test_adapter_of_another_base(folder, tmp_path, family, overrides, message) -> None:
    save_adapter(load(folder), str(tmp_path / "adapter"))
    other = save_tiny(tmp_path / "other", family, **overrides)
    with pytest.raises(ValueError, match=f"(?s)does not fit the base.*{message}"):
        load(other, adapter_name_or_path=str(tmp_path / "adapter"))


def test_folders_that_are_no_adapter(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="no adapter_config"):
        load(folder, adapter_name_or_path=folder)
    with pytest.raises(ValueError, match="No adapter could be read"):
        load(folder, adapter_name_or_path=str(tmp_path / "nowhere"))


def test_a_damaged_adapter_is_found(folder, tmp_path) -> None:
    model = load(folder)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_adapter(model, str(tmp_path))
    whole = file.read_bytes()
    tensors = load_file(file)
    name = sorted(tensors)[0]

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            verify_adapter(tmp_path, model)
        file.write_bytes(whole)
        verify_adapter(tmp_path, model)

    save_file({**tensors, name: torch.zeros(0)}, file)
    refused(f"1 tensors are empty, for example {name}")
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    refused("1 of 28 tensors are missing")
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    refused("has shape")
    save_file({**tensors, "stranger": torch.zeros(1)}, file)
    refused("stranger")
    file.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read")
    file.write_bytes(b"")
    refused("0 bytes")
    file.unlink()
    refused("is missing")
    config.unlink()
    with pytest.raises(CheckpointError, match="adapter_config"):
        verify_adapter(tmp_path, model)


def test_merging_keeps_the_vocabulary_of_a_grown_base(folder) -> None:
    model = load(folder, new=NEW)
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight.shape[0] == 261
    grow_embeddings(merged, 300)
    assert merged.config.vocab_size == merged.get_output_embeddings().weight.shape[0] == 300
