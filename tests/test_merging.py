"""A merged model gives the trained model's logits and needs no PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_adapters import KINDS, NEW, load, logits, random_ids, train
from tiny import CHATML, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft.arguments import ModelArguments
from hf_sft.commands import merge
from hf_sft.merging import load_merged, merge_adapter
from hf_sft.models.adapters import save_adapter
from hf_sft.models.inference import base_arguments
from hf_sft.models.loading import load_tokenizer
from hf_sft.models.mask_token import record_mask_token, recorded_mask_token


def trained_adapter(tmp_path: Path, mode: str = "lora", new: list[str] | None = None, family: str = "llama", **lora):
    """(adapter folder, ids, logits of the trained model); the base is beside it, tied heads included."""
    source = save_tiny(tmp_path / "base", family, tie_word_embeddings=lora.pop("tied", False))
    model = load(source, mode, new=new, **lora)
    ids = random_ids(259 + len(new or []))
    expected = train(model, ids)
    adapter = tmp_path / "adapter"
    save_adapter(model, str(adapter))
    load_tokenizer(ModelArguments(model_name_or_path=source, new_special_tokens=new or [])).save_pretrained(adapter)
    return adapter, ids, expected


@pytest.mark.parametrize("new", [[], NEW], ids=["", "new tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_trained_model(tmp_path, kind, tied, new) -> None:
    adapter, ids, expected = trained_adapter(tmp_path, new=new, family="qwen2", tied=tied, **KINDS[kind])
    out = merge_adapter(str(adapter), str(tmp_path / "merged"))
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert merged.dtype == torch.float32
    assert merged.config.vocab_size == 259 + len(new)
    assert merged.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 259 + len(new)
    assert tokenizer.chat_template == CHATML
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "mamba"])
def test_other_families(tmp_path, family) -> None:
    adapter, ids, expected = trained_adapter(tmp_path, new=NEW, family=family)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(adapter), str(tmp_path / "merged")))
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "dora"])
def test_qlora_adapters_merge_into_the_original_weights(tmp_path, kind) -> None:
    pytest.importorskip("bitsandbytes")
    adapter, ids, expected = trained_adapter(tmp_path, "qlora", use_dora=kind == "dora")
    out = merge_adapter(str(adapter), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert getattr(merged.config, "quantization_config", None) is None
    error = (logits(merged, ids) - expected).norm()
    without = (logits(tiny_model(), ids) - expected).norm()
    assert error < 0.7 * without  # what is left is the base's quantisation error


def test_type_of_the_merged_weights(tmp_path) -> None:
    adapter, ids, expected = trained_adapter(tmp_path)
    half = merge_adapter(str(adapter), str(tmp_path / "half"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(merge_adapter(str(adapter), str(tmp_path / "whole")))
    low = AutoModelForCausalLM.from_pretrained(half)
    for (name, exact), rounded in zip(whole.named_parameters(), low.parameters(), strict=True):
        assert torch.equal(exact.bfloat16(), rounded), name  # rounded once
    torch.testing.assert_close(logits(low, ids).float(), expected, rtol=0, atol=0.05)


def test_a_base_in_bfloat16_keeps_its_type(tmp_path) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    tiny_model().bfloat16().save_pretrained(tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(adapter), str(tmp_path / "merged")))
    assert merged.dtype == torch.bfloat16


def test_rotary_frequencies_are_not_rounded_with_the_weights(tmp_path) -> None:
    adapter, ids, _ = trained_adapter(tmp_path, family="qwen2")
    in_memory, _ = load_merged(str(adapter), base_arguments(str(adapter), None), dtype="bfloat16")
    assert {p.dtype for p in in_memory.parameters()} == {torch.bfloat16}
    written = merge_adapter(str(adapter), str(tmp_path / "merged"), dtype="bfloat16")
    assert torch.equal(logits(in_memory, ids), logits(AutoModelForCausalLM.from_pretrained(written), ids))


def test_the_mask_token_of_the_adapter(tmp_path) -> None:
    """An adapter has no config of its own: its generation config names the token, and the merged model's config as well."""
    adapter, _, _ = trained_adapter(tmp_path, new=NEW)
    base = tiny_model()
    record_mask_token(base, 260)
    base.generation_config.save_pretrained(adapter)
    merged = merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert recorded_mask_token(AutoModelForCausalLM.from_pretrained(merged)) == 260


def test_the_base_may_have_moved(tmp_path) -> None:
    adapter, ids, expected = trained_adapter(tmp_path)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match="does not exist"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    merged = merge_adapter(str(adapter), str(tmp_path / "merged"), base=str(tmp_path / "moved"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged), ids), expected, rtol=0, atol=1e-5)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    target = tmp_path / "merged"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        merge_adapter(str(adapter), str(target))
    (target / "mine.txt").unlink()
    monkeypatch.setattr("hf_sft.merging._verify", lambda *args: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        merge_adapter(str(adapter), str(target))
    assert list(target.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    monkeypatch.undo()
    merge_adapter(str(adapter), str(target))
    assert (target / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="no adapter"):
        merge_adapter(str(target), str(tmp_path / "new" / "deep" / "folder"))
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_another_base(tmp_path) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    other = save_tiny(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(str(adapter), str(tmp_path / "merged"), base=other)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="--base"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))
    with pytest.raises(ValueError, match="no adapter"):
        merge_adapter(other, str(tmp_path / "merged"))
    with pytest.raises(ValueError, match="choose float32"):
        merge_adapter(str(adapter), str(tmp_path / "merged"), dtype="int8")


def test_command(tmp_path, capsys) -> None:
    adapter, ids, expected = trained_adapter(tmp_path)
    out = tmp_path / "merged"
    assert merge.main([str(adapter), "--output_dir", str(out), "--dtype", "float32"]) == 0
    assert str(out) in capsys.readouterr().out
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out), ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not empty"):
        merge.main([str(adapter), "--output_dir", str(out)])
    with pytest.raises(SystemExit, match="0"):
        merge.main(["--help"])
