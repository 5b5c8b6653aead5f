"""A merged model gives the trained model's logits and needs no PEFT."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import runs
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import KINDS, NEW, load, logits, random_ids, train
from tiny import CHATML, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_sft.arguments import LoraArguments, ModelArguments
from hf_sft.checkpoints import save_arguments
from hf_sft.commands import generate, merge
from hf_sft.merging import load_merged, merge_adapter
from hf_sft.merging.difference import measure_difference
from hf_sft.merging.quantised import training_quantisation
from hf_sft.models.adapters import load_adapter, save_adapter
from hf_sft.models.averages import WeightAverage, trained_parameters
from hf_sft.models.inference import base_arguments, load_for_inference
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.mask_token import record_mask_token, recorded_mask_token
from hf_sft.models.vocabulary import grow_embeddings


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


def add_average(adapter: Path) -> None:
    """An average of what is trained in ``adapter``, as training leaves it beside the weights of a checkpoint."""
    named = base_arguments(str(adapter), None)
    tokenizer = load_tokenizer(replace(named, model_name_or_path=str(adapter)))
    model = cast(Any, load_model(named))
    grow_embeddings(model, len(tokenizer))
    average = WeightAverage(trained_parameters(load_adapter(model, str(adapter), is_trainable=True)), decay=0.9)
    for name, value in average.average.items():
        value.mul_(0.5).add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    average.save(adapter)


@pytest.mark.parametrize(
    ("kind", "tied", "new"),
    [("bias all", False, NEW), ("dora", True, NEW), ("norm saved", False, []), ("head saved", True, NEW)],
)
def test_the_average_is_merged(tmp_path, caplog, kind, tied, new) -> None:
    adapter, ids, expected = trained_adapter(tmp_path, new=new, family="qwen2", tied=tied, **KINDS[kind])
    add_average(adapter)
    if kind == "head saved" and tied:  # a base that stores both: the merged one follows the name that comes first
        stored = load_file(path := tmp_path / "base" / "model.safetensors")
        save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    averaged = logits(load_for_inference(str(adapter))[0], ids)
    assert (averaged - expected).abs().max() > 1e-2
    for name, options, wanted in (("average", {}, averaged), ("raw", {"averaged": False}, expected)):
        out = merge_adapter(str(adapter), str(tmp_path / name), **options)
        merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()) and merged.config.tie_word_embeddings == tied
        torch.testing.assert_close(logits(merged, ids), wanted, rtol=0, atol=1e-5)
        if kind == "head saved":
            in_memory = load_merged(str(adapter), base_arguments(str(adapter), None), **options)[0]
            torch.testing.assert_close(logits(in_memory, ids), wanted, rtol=0, atol=1e-5)
    assert "merged in memory" not in caplog.text


def test_the_average_by_command(tmp_path, capsys) -> None:
    adapter, ids, expected = trained_adapter(tmp_path)
    words = [str(adapter), "--output_dir"]
    with pytest.raises(ValueError, match=r"no average \(ema.safetensors\) in '.*adapter'.*the only ones.*Leave --raw"):
        merge.main([*words, str(tmp_path / "m"), "--raw_weights"])
    with pytest.raises(ValueError, match="the only ones"):
        generate.main([str(adapter), "--prompt", "Hello", "--raw_weights"])
    assert not (tmp_path / "m").exists()
    add_average(adapter)
    for name, raw in (("average", []), ("raw", ["--raw_weights"])):
        assert merge.main([*words, str(tmp_path / name), *raw]) == 0
        told = capsys.readouterr()
        assert ("the weights are the averages in ema.safetensors" in told.err) == (not raw)
        assert float(re.search(r"on its base \(float32\): (\S+),", told.out).group(1)) < 1e-5
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), ids)
        assert ((found - expected).abs().max() < 1e-5) == bool(raw)
    assert measure_difference(str(adapter), str(tmp_path / "raw")).largest > 1e-3
    assert measure_difference(str(adapter), str(tmp_path / "average"), averaged=False).largest > 1e-3
    average = adapter / "ema.safetensors"
    save_file({**load_file(average), "base_model.model.model.norm.weight": torch.ones(32)}, average)
    with pytest.raises(ValueError, match=r"averages base_model.model.model.norm.weight, which .*--raw_weights"):
        merge_adapter(str(adapter), str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_the_average_onto_dequantised_weights(tmp_path) -> None:
    adapter, ids, expected = qlora_run(tmp_path, dtype="float32", use_dora=True)
    add_average(Path(adapter))
    merged = merge_adapter(adapter, str(tmp_path / "m"), onto="dequantized")
    assert measure_difference(adapter, merged).largest < 1e-5
    raw = merge_adapter(adapter, str(tmp_path / "raw"), onto="dequantized", averaged=False)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(raw), ids), expected, rtol=0, atol=1e-5)
    assert (logits(AutoModelForCausalLM.from_pretrained(merged), ids) - expected).abs().max() > 1e-3


# Streaming


class Merged:
    """An adapter that PEFT itself has merged in memory, and the trained model's logits."""

    def __init__(self, folder: Path, base: Any, ids: torch.Tensor, **config: Any) -> None:
        torch.manual_seed(0)
        base.save_pretrained(folder / "base", max_shard_size=config.pop("max_shard_size", "5GB"))
        tiny_tokenizer().save_pretrained(folder / "base")
        base.name_or_path = str(folder / "base")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    step = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.add_(step)
        self.expected = logits(model, ids)
        model.save_pretrained(folder / "adapter")
        tiny_tokenizer().save_pretrained(folder / "adapter")
        self.adapter, self.out = str(folder / "adapter"), str(folder / "merged")

    def check(self, ids: torch.Tensor, caplog: Any, in_memory: bool = False, **options: Any) -> Any:
        merge_adapter(self.adapter, self.out, **options)
        merged = AutoModelForCausalLM.from_pretrained(self.out)
        torch.testing.assert_close(logits(merged, ids), self.expected, rtol=0, atol=1e-5)
        assert ("merged in memory" in caplog.text) == in_memory
        return merged


def other_model(family: str, **fields: Any) -> Any:
    common = dict(vocab_size=259, bos_token_id=None, eos_token_id=256, pad_token_id=257)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**common, **fields}), dtype=torch.float32)


def gpt2() -> Any:
    return other_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=True)


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_weights_and_embeddings(tmp_path, caplog, dora) -> None:
    """Conv1D layers hold [in, out]; an adapter on a tied embedding alone makes two weights of the one."""
    ids = random_ids()
    case = Merged(tmp_path, gpt2(), ids, target_modules=["c_attn", "c_proj", "wte"], use_dora=dora)
    merged = case.check(ids, caplog)
    assert not merged.config.tie_word_embeddings
    assert "no longer tied" in caplog.text


def test_names_without_the_models_prefix(tmp_path, caplog) -> None:
    ids = random_ids()
    case = Merged(tmp_path, gpt2(), ids, target_modules=["c_attn"], trainable_token_indices=[3, 258])
    path = tmp_path / "base" / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in stored
    save_file({**stored, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path, metadata={"format": "pt"})
    merged = case.check(ids, caplog)
    assert merged.config.tie_word_embeddings
    assert "no place in the model" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"lora_bias": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}]
)
def test_what_peft_alone_writes(tmp_path, caplog, changes) -> None:
    ids = random_ids()
    Merged(tmp_path, tiny_model("qwen2"), ids, target_modules=["q_proj", "k_proj"], **changes).check(ids, caplog)


def mixtral() -> Any:
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    return other_model("mixtral", **sizes, num_local_experts=2, max_position_embeddings=64)


@pytest.mark.parametrize("why", ["experts", "bin", "parameters", "two tied tensors"])
def test_what_is_merged_in_memory_instead(tmp_path, caplog, why) -> None:
    ids = random_ids()
    model = mixtral() if why == "experts" else tiny_model("llama", tie_word_embeddings=why == "two tied tensors")
    parameters = ["gate_proj.weight"] if why == "parameters" else None
    case = Merged(tmp_path, model, ids, target_modules=["q_proj"], target_parameters=parameters)
    path = tmp_path / "base" / "model.safetensors"
    if why == "bin":
        torch.save(load_file(path), tmp_path / "base" / "pytorch_model.bin")
        path.unlink()
    if why == "two tied tensors":
        stored = load_file(path)
        save_file(
            {**stored, "lm_head.weight": stored["model.embed_tokens.weight"] + 1}, path, metadata={"format": "pt"}
        )
        merge_adapter(case.adapter, case.out)
        assert "stored with different numbers" in caplog.text
        return
    case.check(ids, caplog, in_memory=True)


def test_shards_are_the_bases_unless_asked_otherwise(tmp_path, caplog) -> None:
    ids = random_ids()
    case = Merged(tmp_path, tiny_model("qwen2"), ids, target_modules=["q_proj", "up_proj"], max_shard_size="40KB")

    def files(folder: Path) -> list[list[str]]:
        names = sorted(path for path in folder.glob("*.safetensors"))
        assert len(names) == 1 or all(f"-of-{len(names):05}." in path.name for path in names)
        return [sorted(load_file(path)) for path in names]

    case.check(ids, caplog)
    assert len(files(tmp_path / "base")) > 2
    assert files(tmp_path / "merged") == files(tmp_path / "base")
    untouched = load_file(next((tmp_path / "base").glob("*00001-of*")))
    again = load_file(next((tmp_path / "merged").glob("*00001-of*")))
    assert all(torch.equal(again[name], tensor) for name, tensor in untouched.items() if "proj" not in name)
    for size, count in ((10**9, 1), ("20 kB", None)):
        case.out = str(tmp_path / f"merged-{size}")
        case.check(ids, caplog, max_shard_size=size)
        assert count is None or len(files(Path(case.out))) == count
    largest = max(path.stat().st_size for path in Path(case.out).glob("*.safetensors"))
    assert largest < 259 * 32 * 4 + 2000  # the embedding alone
    for wrong in ("5 cows", "0", -3):
        with pytest.raises(ValueError, match="max_shard_size"):
            merge_adapter(case.adapter, str(tmp_path / "new"), max_shard_size=wrong)


def test_a_base_in_several_types_keeps_them(tmp_path) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    model = tiny_model().bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path / "base")
    stored = load_file(Path(merge_adapter(str(adapter), str(tmp_path / "merged"))) / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {"model.norm.weight"}


@pytest.mark.parametrize("damage", ["cut", "no shard", "broken header"])
def test_a_damaged_base(tmp_path, damage) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "broken header":
        path.write_bytes(b"x" * 100)
    else:
        tiny_model().save_pretrained(tmp_path / "base", max_shard_size="40KB")
        path.unlink(missing_ok=True)
        next((tmp_path / "base").glob("*00002-of*")).unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_numbers_that_are_not_finite(tmp_path) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    next(tensor for name, tensor in weights.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ValueError, match="not finite"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_peak_memory(tmp_path, kind) -> None:
    """Resident memory above that before, in a process of its own: below 1.5 x the largest shard plus the adapter."""
    done = runs.launch([str(Path(__file__).with_name("peak_of_merging.py")), str(tmp_path), kind])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["shards"] >= 6
    assert found["largest_shard"] > 30e6
    assert found["peak"] < 1.5 * found["largest_shard"] + found["adapter"]
    assert found["difference"] < 1e-5


# Quantised bases


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


def qlora_run(folder: Path, record: bool = True, base_dtype: str = "float32", **fields: Any):
    """(adapter folder, ids, logits of the adapter on its quantised base), args.json beside it; widths that 4 bits spoil."""
    pytest.importorskip("bitsandbytes")
    family = fields.pop("family", "qwen2")
    lora = {name: fields.pop(name) for name in ("use_dora", "lora_bias") if name in fields}
    source = save_tiny(folder / "base", family, tie_word_embeddings=family == "qwen2")
    if base_dtype != "float32":
        tiny_model(family, tie_word_embeddings=True).to(getattr(torch, base_dtype)).save_pretrained(source)
    named = ModelArguments(model_name_or_path=source, train_mode="qlora", new_special_tokens=NEW, **fields)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(named)
    model = load_model(named, LoraArguments(lora_rank=4, **lora), tokenizer=tokenizer)
    ids = random_ids(261)
    expected = train(model, ids).float()
    adapter = folder / "adapter"
    save_adapter(model, str(adapter))
    tokenizer.save_pretrained(adapter)
    if record:
        save_arguments(adapter, {"model": asdict(named)})
    return str(adapter), ids, expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"double_quantization": False},
        {"use_dora": True},
        {"lora_bias": "all"},
        {"base_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_merged_onto_dequantised_weights_is_the_qlora_model(tmp_path, caplog, fields) -> None:
    adapter, ids, expected = qlora_run(tmp_path, dtype="float32", **fields)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, str(tmp_path / "m"), onto="dequantized"))
    assert merged.dtype == torch.float32  # of the products: NF4 values have no exact place in bfloat16
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)
    assert "merged in memory" not in caplog.text
    original = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, str(tmp_path / "o")), dtype=torch.float32)
    assert (logits(original, ids) - expected).abs().max() > 1e-3


def test_dequantised_in_memory(tmp_path, caplog) -> None:
    adapter, ids, expected = qlora_run(tmp_path, dtype="float32")
    path = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "base" / "pytorch_model.bin")
    path.unlink()
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, str(tmp_path / "m"), onto="dequantized"))
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)
    assert "merged in memory, with its whole base: the base has no safetensors files" in caplog.text


def test_what_the_run_was_is_read_or_told(tmp_path) -> None:
    adapter, ids, expected = qlora_run(tmp_path, record=False, dtype="float32", double_quantization=False)
    assert training_quantisation(adapter) is None
    with pytest.raises(ValueError, match=r"nothing says.*--quantization nf4"):
        merge_adapter(adapter, str(tmp_path / "m"), onto="dequantized")
    assert not (tmp_path / "m").exists()
    told = dict(quantization="nf4", double_quantization=False, compute_dtype="float32")
    merged = merge_adapter(adapter, str(tmp_path / "m"), onto="dequantized", **told)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged), ids), expected, rtol=0, atol=1e-5)
    assert str(training_quantisation(adapter, "nf4")) == "nf4 twice quantised, bfloat16 products"  # train's defaults
    fields = dict(train_mode="qlora", quantization="int8", double_quantization=True, dtype=None)
    save_arguments(tmp_path, {"model": fields})  # of the run, whose checkpoint the adapter is
    assert str(training_quantisation(adapter)) == "int8, bfloat16 products"
    save_arguments(tmp_path, {"model": {"train_mode": "lora"}})
    assert training_quantisation(adapter) is None
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match=r"args.json cannot be read"):
        training_quantisation(adapter)
    for wrong in ({"onto": "quantized"}, {"quantization": "int4"}, {"compute_dtype": "int8"}):
        with pytest.raises(ValueError, match="choose one of"):
            merge_adapter(adapter, str(tmp_path / "new"), **wrong)


@pytest.mark.parametrize(
    ("kind", "onto", "limit"), [("nf4", "dequantized", 0.03), ("int8", "dequantized", 0.03), ("nf4", "original", 0.5)]
)
def test_the_difference_is_printed(tmp_path, capsys, kind, onto, limit) -> None:
    """With bfloat16 products, and with 8 bits, whose activations are quantised as well, nothing is exact."""
    adapter, _, _ = qlora_run(tmp_path, quantization=kind)
    assert merge.main([adapter, "--output_dir", str(tmp_path / "m"), "--onto", onto]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("Compared:"))
    assert ("--onto dequantized, with another --output_dir, merges into" in printed) is (onto == "original")
    largest, share = re.search(rf"base \({kind}.* products\): (\S+), (\S+) of their spread", line).groups()
    assert float(largest) > 1e-6
    assert 0 < float(share) < limit


def test_exact_merges_print_next_to_nothing(tmp_path, capsys) -> None:
    adapter, _, _ = qlora_run(tmp_path, dtype="float32")
    merge.main([adapter, "--output_dir", str(tmp_path / "m"), "--onto", "dequantized"])
    assert measure_difference(adapter, str(tmp_path / "m")).largest < 1e-5
    assert "Compared: largest difference" in capsys.readouterr().out


def test_the_comparison_can_be_left_out(tmp_path, capsys, monkeypatch) -> None:
    adapter, _, _ = trained_adapter(tmp_path)
    monkeypatch.setattr("hf_sft.merging.difference.load_for_inference", None)
    merge.main([str(adapter), "--output_dir", str(tmp_path / "quiet"), "--no_check"])
    assert "ompared" not in capsys.readouterr().out
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    merge.main([str(adapter), "--output_dir", str(tmp_path / "large")])
    assert "Not compared with the adapter on its base: the model has 0.0 GB, more than half" in capsys.readouterr().out


def test_qlora_is_merged_without_bitsandbytes(tmp_path, capsys, monkeypatch) -> None:
    adapter, _, _ = qlora_run(tmp_path)
    monkeypatch.setattr("hf_sft.models.quantization.importlib.util.find_spec", lambda name: None)
    assert merge.main([adapter, "--output_dir", str(tmp_path / "m")]) == 0
    assert "Not compared with the adapter on its base: train_mode qlora needs bitsandbytes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        merge_adapter(adapter, str(tmp_path / "n"), onto="dequantized")
    assert not (tmp_path / "n").exists()


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
    monkeypatch.setattr("hf_sft.merging.merge._verify", lambda *args: (_ for _ in ()).throw(RuntimeError("broken")))
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
