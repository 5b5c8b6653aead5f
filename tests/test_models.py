"""Loading: types, sizes, vocabularies, quantised bases, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer

from hf_sft.arguments import LoraArguments, ModelArguments
from hf_sft.models.loading import check_max_seq_length, load_config, load_model, load_tokenizer
from hf_sft.models.vocabulary import (
    add_special_tokens,
    added_token_ids,
    grow_embeddings,
    resize_embeddings,
    vocabulary_rows,
)

NEW = ["<|tool|>", "<|mask|>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "base"))


def arguments(folder: Path | str, **fields) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(folder), **fields)


def ids_and_labels(count: int = 40, vocabulary: int = 259) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (2, count), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


# Types


@pytest.mark.parametrize(
    ("fields", "lora", "expected"),
    [
        ({}, {}, torch.float32),
        ({"train_mode": "lora"}, {}, torch.bfloat16),
        ({"train_mode": "lora", "dtype": "float32"}, {}, torch.float32),
        ({"train_mode": "lora", "dtype": "float16"}, {}, torch.float16),
        ({"train_mode": "lora"}, {"lora_bias": "all"}, torch.float32),
    ],
)
def test_type_of_the_weights(folder, fields, lora, expected) -> None:
    model = load_model(arguments(folder, **fields), LoraArguments(**lora))
    frozen = {p.dtype for n, p in model.named_parameters() if not p.requires_grad or not fields}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert frozen == {expected}
    assert trained == {torch.float32}


# From scratch


def test_from_scratch(folder) -> None:
    tokenizer = load_tokenizer(arguments(folder, new_special_tokens=NEW))
    scratch = ModelArguments(
        config_name_or_path=str(folder / "config.json"), config_overrides='{"num_hidden_layers": 3, "hidden_size": 64}'
    )
    torch.manual_seed(0)
    model = load_model(scratch, tokenizer=tokenizer)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 64, 261)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape == (261, 64)
    torch.manual_seed(0)
    again = load_model(scratch, tokenizer=tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("layers", [1, 3])
def test_from_scratch_layer_types_follow_the_number_of_layers(tmp_path, layers) -> None:
    source = save_tiny(tmp_path, "gemma3_text")
    model = load_model(ModelArguments(config_name_or_path=source, config_overrides={"num_hidden_layers": layers}))
    assert len(model.config.layer_types) == layers == len(model.model.layers)


def test_from_scratch_vocabulary_is_only_raised(folder) -> None:
    tokenizer = tiny_tokenizer()
    wide = ModelArguments(config_name_or_path=str(folder), config_overrides={"vocab_size": 320})
    assert load_model(wide, tokenizer=tokenizer).config.vocab_size == 320
    narrow = ModelArguments(config_name_or_path=str(folder), config_overrides={"vocab_size": 100})
    with pytest.warns(UserWarning, match="100 raised to the tokenizer's 259"):
        assert load_model(narrow, tokenizer=tokenizer).config.vocab_size == 259


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hiden_layers": 3}, "num_hiden_layers.*nearest: num_hidden_layers"),
        ({"num_attention_heads": 5}, "do not fit"),
        ('{"hidden_size": ', "no JSON object"),
        ("[1]", "must be an object"),
    ],
)
def test_wrong_overrides(folder, overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(config_name_or_path=str(folder), config_overrides=overrides))


# Vocabulary


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [259, 260, 320])
def test_new_tokens_never_shrink_a_padded_vocabulary(tmp_path, tied, rows) -> None:
    source = save_tiny(tmp_path, vocab_size=rows, tie_word_embeddings=tied)
    before = tiny_model(vocab_size=rows, tie_word_embeddings=tied)
    tokenizer = load_tokenizer(arguments(source, new_special_tokens=[*NEW, "<|im_end|>"]))
    assert added_token_ids(tokenizer) == [259, 260]
    model = load_model(arguments(source), tokenizer=tokenizer)
    assert model.config.vocab_size == max(rows, 261)
    for old, new in zip(
        (before.get_input_embeddings(), before.get_output_embeddings()),
        (model.get_input_embeddings(), model.get_output_embeddings()),
        strict=True,
    ):
        assert new.weight.shape == (max(rows, 261), 32)
        assert torch.equal(new.weight[:259], old.weight[:259])
        assert torch.equal(new.weight[261:], old.weight[261:])
        torch.testing.assert_close(new.weight[259:261], old.weight[:259].mean(0).expand(2, -1), rtol=1e-6, atol=1e-8)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_tokenizer_of_another_model_is_warned_of(folder, caplog) -> None:
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING):
        add_special_tokens(tokenizer, ["<|new|>"])
        load_model(arguments(folder), tokenizer=tokenizer)
        assert not caplog.records
        tokenizer.add_tokens(["<|foreign|>"])
        model = load_model(arguments(folder), tokenizer=tokenizer)
    assert "261 tokens and the model 259 rows: 1 tokens" in caplog.text
    assert vocabulary_rows(model) == 261


def test_a_vocabulary_is_never_cut(folder) -> None:
    model = load_model(arguments(folder))
    assert resize_embeddings(model, tiny_tokenizer()) == []
    with pytest.raises(ValueError, match="never cut"):
        grow_embeddings(model, 100)


def test_tokens_that_exist_are_not_reset(tmp_path) -> None:
    """A checkpoint whose tokenizer has the token already goes on with the row it has learned."""
    source = save_tiny(tmp_path / "base")
    tokenizer = load_tokenizer(arguments(source, new_special_tokens=NEW))
    model = load_model(arguments(source), tokenizer=tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[259:] += 1
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    again = arguments(tmp_path / "trained", new_special_tokens=NEW)
    tokenizer = load_tokenizer(again)
    assert len(tokenizer) == 261
    assert added_token_ids(tokenizer) == []
    loaded = load_model(again, tokenizer=tokenizer)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_new_special_tokens_are_one_token_and_saved(tmp_path, folder) -> None:
    tokenizer = load_tokenizer(arguments(folder, new_special_tokens=NEW), chat_template="{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(arguments(tmp_path / "saved"))
    assert saved("a<|mask|>b")["input_ids"] == tokenizer("a<|mask|>b")["input_ids"]
    assert saved.convert_tokens_to_ids("<|mask|>") in saved("a<|mask|>b")["input_ids"]
    assert saved.chat_template == "{{ messages[0]['content'] }}"


def test_pad_token(tmp_path) -> None:
    for name, (pad, expected) in {"eos": (["<|endoftext|>"], "<|im_end|>"), "unused": ([], "<|endoftext|>")}.items():
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}
        path.write_text(json.dumps(config))
        if pad:  # a vocabulary without any name for padding
            core = tmp_path / name / "tokenizer.json"
            core.write_text(core.read_text().replace(pad[0], "<|other|>"))
        loaded = load_tokenizer(ModelArguments(tokenizer_name_or_path=str(tmp_path / name)))
        assert loaded.pad_token == expected
        assert loaded.padding_side == "right"


# What is refused


def _broken(folder: Path, copy: Path, kind: str) -> Path:
    shutil.copytree(folder, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no head":
        save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, weights, {"format": "pt"})
    elif kind == "other sizes":
        config.write_text(json.dumps({**fields, "intermediate_size": 64}))
    elif kind == "quantised":
        config.write_text(
            json.dumps({**fields, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
        )
    elif kind == "no config":
        config.unlink()
    elif kind == "not causal":
        config.write_text('{"model_type": "t5"}')
    elif kind == "no JSON":
        config.write_text("{")
    elif kind == "adapter":
        config.rename(copy / "adapter_config.json")
    return copy


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "no weights; to train from scratch"),
        ("truncated", "could not be loaded"),
        ("no head", r"lack 1 of the model's tensors.*lm_head\.weight"),
        ("other sizes", r"down_proj\.weight is \(32, 48\) and must be \(32, 64\)"),
        ("quantised", "quantised already"),
        ("no config", r"no config\.json"),
        ("not causal", "'t5' model"),
        ("no JSON", "config"),
        ("adapter", "adapter_name_or_path"),
    ],
)
def test_folders_that_are_no_whole_model(folder, tmp_path, kind, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(arguments(_broken(folder, tmp_path / "broken", kind)))


def test_missing_places(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_model(arguments(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(arguments(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is a file"):
        load_model(arguments(folder / "config.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"No tokenizer is in .*empty': it holds no tokenizer\.json\. Set tokenizer_name_or_path"
    ):
        load_tokenizer(arguments(tmp_path / "empty"))
    with pytest.raises(ValueError, match="No tokenizer is named"):
        load_tokenizer(ModelArguments())
    with pytest.raises(ValueError, match="not blank"):
        load_tokenizer(arguments(folder, new_special_tokens=[" "]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither is set"),
        ({"model_name_or_path": "a", "config_name_or_path": "b"}, "both are set"),
        ({"config_name_or_path": "b", "train_mode": "lora"}, "needs a trained base"),
        ({"model_name_or_path": "a", "quantization": "nf4"}, "qlora"),
    ],
)
def test_contradictions(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(**fields))


def test_unexpected_weights_are_named(folder) -> None:
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), "extra.weight": torch.zeros(3)}, weights, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        load_model(arguments(folder))


def test_max_seq_length() -> None:
    model = tiny_model()
    check_max_seq_length(model, 512)
    with pytest.raises(ValueError, match=r"513.*512"):
        check_max_seq_length(model.config, 513)
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    check_max_seq_length(model, 2048)
    check_max_seq_length(tiny_model("mamba"), 10**6)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_real_model(shared_data, mode) -> None:
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    named = arguments(shared_data / "models" / "stories260k", train_mode=mode)
    tokenizer = load_tokenizer(named, chat_template="{{ messages }}")
    model = load_model(named, LoraArguments(lora_rank=4), tokenizer=tokenizer)
    ids = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")["input_ids"]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert loss.item() < {"full": 1.2, "lora": 1.2, "qlora": 1.7}[mode]  # a quarter of the 6.2 of a random model
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_adapter_is_no_model(tmp_path):
    """Said wherever a model's config is read, with the way out."""
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds an adapter, not a model. Set adapter_name_or_path to it"):
        load_config(str(tmp_path), ModelArguments())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert load_config(str(tmp_path), ModelArguments()).model_type == "llama"
