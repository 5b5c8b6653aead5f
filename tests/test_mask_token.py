"""Which token stands at mask slots: the order of the sources, and what cannot be one."""

from __future__ import annotations

import logging

import pytest
import tiny
from transformers import AutoTokenizer

from hf_sft.arguments import LoraArguments, ModelArguments
from hf_sft.merging import merge_adapter
from hf_sft.models.adapters import save_adapter
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.mask_token import record_mask_token, recorded_mask_token, resolve_mask_token
from hf_sft.models.wedlm import WeDLMConfig


def config(**fields):
    return tiny.tiny_model("qwen3", **fields).config


def test_the_order_of_the_sources() -> None:
    tokenizer = tiny.tiny_tokenizer(chat_template=None)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})  # 259
    assert resolve_mask_token(tokenizer, config(vocab_size=300)) == 259
    known = config(vocab_size=300)
    known.mask_token_id = 270
    assert resolve_mask_token(tokenizer, known) == 270
    assert resolve_mask_token(tokenizer, known, mask_token_id=271) == 271
    assert resolve_mask_token(tokenizer, known, mask_token="<|mask|>") == 260 == len(tokenizer) - 1
    assert resolve_mask_token(tokenizer, known, mask_token="<|mask|>", mask_token_id=260) == 260
    assert resolve_mask_token(tiny.tiny_tokenizer(), config(vocab_size=151_936)) == 151_665
    assert resolve_mask_token(None, known) == 270 and resolve_mask_token(None, known, mask_token_id=3) == 3
    with pytest.raises(ValueError, match="without a tokenizer"):
        resolve_mask_token(None, config())


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"mask_token_id": 65}, r"'b', ordinary text"),
        ({"mask_token_id": 256}, "eos_token"),
        ({"mask_token_id": 257}, "pad_token"),
        ({"mask_token_id": 258}, "part of the chat template"),
        ({"mask_token_id": 400}, "beyond the vocabulary of 300 rows"),
        ({"mask_token_id": -1}, "beyond the vocabulary"),
        ({"mask_token": "a"}, "a word of the vocabulary"),
        ({"mask_token": " "}, "not blank"),
        ({"mask_token": "<|m|>", "mask_token_id": 3}, "leave out one of the two"),
    ],
)
def test_what_cannot_be_a_mask_token(asked, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_mask_token(tiny.tiny_tokenizer(), config(vocab_size=300), **asked)


def test_ordinary_text_is_a_warning_for_official_checkpoints(caplog) -> None:
    official = WeDLMConfig(vocab_size=259, mask_token_id=65)
    with caplog.at_level(logging.WARNING):
        assert resolve_mask_token(tiny.tiny_tokenizer(), official) == 65
    assert "'b', ordinary text" in caplog.text


def test_tool_response_of_a_stock_tokenizer(shared_data) -> None:
    """In Qwen3's tokenizer 151665 is <tool_response>, an added token that is not special."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    assert resolve_mask_token(tokenizer, config(vocab_size=151_936)) == 151_665  # a row of the padding
    tokenizer.add_tokens(["<tool_response>"], special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<tool_response>") == 151_665
    with pytest.raises(ValueError, match=r"151665 .* is '<tool_response>', ordinary text"):
        resolve_mask_token(tokenizer, config(vocab_size=151_936))


@pytest.mark.parametrize("rows", [259, 300])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_brings_its_mask_token_along(tmp_path, tied: bool, rows: int) -> None:
    """Appended to the vocabulary, or in a row of its padding."""
    base = tiny.save_tiny(tmp_path / "base", "qwen3", tie_word_embeddings=tied, vocab_size=rows)
    arguments = ModelArguments(model_name_or_path=base, train_mode="lora", dtype="float32")
    tokenizer = load_tokenizer(arguments)
    token = resolve_mask_token(tokenizer, config(), mask_token="<|mask|>")
    model = load_model(arguments, LoraArguments(lora_rank=2), tokenizer=tokenizer, input_rows=[token])
    record_mask_token(model, token)
    save_adapter(model, str(tmp_path / "adapter"))
    model.get_base_model().generation_config.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = load_model(ModelArguments(model_name_or_path=str(tmp_path / "merged")))
    assert recorded_mask_token(merged) == token == 259
    import torch

    ids = torch.tensor([[5, 9, token, 7]])
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-6)
    assert recorded_mask_token(tiny.tiny_model()) is None


def test_the_space_of_a_sentencepiece_vocabulary_is_text(shared_data) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    for token in (410, 35):
        with pytest.raises(ValueError, match="ordinary text"):
            resolve_mask_token(tokenizer, config(vocab_size=512), mask_token_id=token)


def test_another_new_special_token_is_not_taken_for_it(shared_data) -> None:
    tokenizer = load_tokenizer(
        ModelArguments(
            model_name_or_path="unused",
            tokenizer_name_or_path=str(shared_data / "tokenizers" / "qwen2.5"),
            new_special_tokens=["<a>"],
        )
    )
    with pytest.raises(ValueError, match=r"151665 .* is '<a>', a new special token"):
        resolve_mask_token(tokenizer, config(vocab_size=151_936))
