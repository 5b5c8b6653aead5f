"""What is exported for the WeDLM engine is the source's function, in a form that the engine reads."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import load, random_ids, train
from test_wedlm_model import renamed
from tiny import CHATML, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints import CheckpointError
from hf_sft.commands import export
from hf_sft.data.templates import resolve_template
from hf_sft.exporting import export_wedlm, inexpressible
from hf_sft.merging import load_merged
from hf_sft.models.adapters import save_adapter
from hf_sft.models.averages import WeightAverage
from hf_sft.models.inference import base_arguments, load_for_inference
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.mask_token import record_mask_token
from hf_sft.models.wedlm import WeDLMForCausalLM

MASK, END = 259, 256
THETA = 5000.0
SOURCES = ["qwen2", "qwen3", "llama", "wedlm of qwen2", "wedlm of qwen3"]
IDS = random_ids(260)


def mask_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    return tokenizer


def save_source(folder: Path, family: str = "qwen3", tokenizer=None, mask: int | None = MASK, **fields) -> str:
    """A model that says it was trained as WeDLM with a mask token of its own; in float32, as training leaves it."""
    if family.startswith("wedlm"):
        renamed(folder, family.rsplit(" ", 1)[-1], rope_theta=THETA, vocab_size=259)
        model = load_model(ModelArguments(model_name_or_path=str(folder)))
        model.resize_token_embeddings(260)
    else:
        model = tiny_model(family, **{"rope_theta": THETA, "vocab_size": 260, **fields})
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms of a fresh model are 0 and 1
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    if mask is not None:
        record_mask_token(model, mask)
    model.save_pretrained(folder)
    (tokenizer or mask_tokenizer()).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits_of(folder: str, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()(ids).logits


def engine_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, L, V] float64: what the engine computes from the folder, written from its description: raw config, raw tensors."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert config["rope_scaling"] is None and config["hidden_act"] == "silu"
    heads, shared, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]

    def take(name: str) -> torch.Tensor:
        return tensors.pop(name)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight

    embedding = take("model.embed_tokens.weight")
    batch, length = ids.shape
    frequency = config["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angle = torch.arange(length)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    x = embedding[ids]
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}."
        h = norm(x, take(place + "input_layernorm.weight"))
        parts = []
        for kind, count in (("q", heads), ("k", shared), ("v", shared)):
            part = h @ take(f"{place}self_attn.{kind}_proj.weight").T
            if config["attention_bias"]:
                part = part + take(f"{place}self_attn.{kind}_proj.bias")
            part = part.view(batch, length, count, width)
            if not config["attention_bias"] and kind != "v":
                part = norm(part, take(f"{place}self_attn.{kind}_norm.weight"))
            part = part.transpose(1, 2)
            parts.append((rotate(part) if kind != "v" else part).repeat_interleave(heads // count, 1))
        q, k, v = parts
        scores = (q @ k.mT / math.sqrt(width)).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, heads * width)
        x = x + attended @ take(place + "self_attn.o_proj.weight").T
        h = norm(x, take(place + "post_attention_layernorm.weight"))
        gate, up = (h @ take(f"{place}mlp.{name}_proj.weight").T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ take(place + "mlp.down_proj.weight").T
    x = norm(x, take("model.norm.weight"))
    result = x @ (embedding if config["tie_word_embeddings"] else take("lm_head.weight")).T
    assert tensors == {}, "the engine fails on tensors that it has no place for"
    return result


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", SOURCES)
def test_the_export_is_the_sources_function(tmp_path, family, tied) -> None:
    if tied and family.startswith("wedlm"):
        pytest.skip("the same network as qwen2's and qwen3's")
    fields = {} if family.startswith("wedlm") else {"tie_word_embeddings": tied}
    source = save_source(tmp_path / "source", family, **fields)
    folder = Path(export_wedlm(source, str(tmp_path / "out")))

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, WeDLMForCausalLM) and model.dtype == torch.bfloat16 and not any(info.values())
    expected = logits_of(source)
    with torch.no_grad():
        found = model.eval()(IDS).logits
    if family == "llama":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * (expected.max() - expected.min()).item())
    else:
        assert torch.equal(found, expected)
    # The same weights in float32: no rounding hides a wrong base, norm or bias.
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float().eval()(IDS).logits
        ours = model.float()(IDS).logits
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(engine_logits(folder, IDS), exact.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", SOURCES)
def test_what_the_engine_reads(tmp_path, family) -> None:
    folder = Path(export_wedlm(save_source(tmp_path / "source", family), str(tmp_path / "out")))
    config = json.loads((folder / "config.json").read_text())
    biases = not family.endswith("qwen3")
    wanted = {
        "model_type": "wedlm", "architectures": ["WeDLMForCausalLM"], "torch_dtype": "bfloat16", "dtype": "bfloat16",
        "rope_theta": THETA, "rope_scaling": None, "attention_bias": biases, "qk_norm": not biases, "head_dim": 8,
        "mask_token_id": MASK, "eos_token_id": END, "vocab_size": 260, "tie_word_embeddings": False, "hidden_act": "silu",
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "use_sliding_window": False,
    }  # fmt: skip
    assert {name: config.get(name, "absent") for name in wanted} == wanted
    assert "rope_parameters" not in config and "layer_types" not in config
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "configuration_wedlm.py", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    # Without this class, versions of transformers that do not know the type cannot read config.json.
    module, name = config["auto_map"]["AutoConfig"].split(".")
    fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "torch_dtype")}
    theirs = runpy.run_path(str(folder / f"{module}.py"))[name](**fields)
    assert theirs.model_type == "wedlm" and theirs.mask_token_id == MASK and theirs.attention_bias is biases
    # transformers 4 has no TokenizersBackend, and takes no list of extra_special_tokens.
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in tokenizer
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == END
    again = AutoTokenizer.from_pretrained(folder)
    assert again.eos_token_id == END and len(again) == 260 and again.chat_template == CHATML


def test_an_export_can_be_exported_and_trained_again(tmp_path) -> None:
    first = export_wedlm(save_source(tmp_path / "source"), str(tmp_path / "one"))
    second = export_wedlm(first, str(tmp_path / "two"))
    assert torch.equal(logits_of(first), logits_of(second))
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        assert Path(first, name).read_text() == Path(second, name).read_text()
    assert load_model(ModelArguments(model_name_or_path=first)).dtype == torch.float32


def trained_adapter(tmp_path: Path) -> Path:
    """An adapter with a trained row for a new mask token, as training writes it; its base is beside it."""
    source = save_tiny(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    model = load(source, new=["<|mask|>"])
    train(model, IDS)
    record_mask_token(model, MASK)
    save_adapter(model, str(tmp_path / "adapter"))
    model.get_base_model().generation_config.save_pretrained(tmp_path / "adapter")
    named = ModelArguments(model_name_or_path=source, new_special_tokens=["<|mask|>"])
    load_tokenizer(named).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_with_its_new_rows(tmp_path) -> None:
    from hf_sft.merging import merge_adapter

    adapter = trained_adapter(tmp_path)
    merged = merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert json.loads(Path(merged, "config.json").read_text())["mask_token_id"] == MASK
    out = export_wedlm(str(adapter), str(tmp_path / "out"))
    assert torch.equal(logits_of(out), logits_of(merged))
    assert json.loads(Path(out, "config.json").read_text())["mask_token_id"] == MASK
    (tmp_path / "base").rename(tmp_path / "moved")
    again = export_wedlm(str(adapter), str(tmp_path / "again"), base=str(tmp_path / "moved"))
    assert torch.equal(logits_of(again), logits_of(out))


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_average_is_exported(tmp_path, capsys, kind) -> None:
    source = save_source(tmp_path / "source", "qwen2") if kind == "whole" else str(trained_adapter(tmp_path))
    words = [source, "--format", "wedlm", "--output_dir"]
    with pytest.raises(ValueError, match=r"no average \(ema.safetensors\) in .*the only ones"):
        export.main([*words, str(tmp_path / "none"), "--raw_weights"])
    before = logits_of(export_wedlm(source, str(tmp_path / "before")))
    average = WeightAverage(dict(load_for_inference(source, dtype="float32")[0].named_parameters()), decay=0.5)
    if kind == "adapter":
        average.average = {name: value for name, value in average.average.items() if ".lora_" in name}
    for name, value in average.average.items():
        value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    average.save(source)
    assert export.main([*words, str(tmp_path / "average")]) == 0
    assert "the weights are the averages in ema.safetensors" in capsys.readouterr().err
    if kind == "whole":
        expected = load_for_inference(source, dtype="bfloat16")[0]
    else:
        expected = load_merged(source, base_arguments(source, None), dtype="bfloat16")[0].eval()
    with torch.no_grad():
        assert torch.equal(logits_of(str(tmp_path / "average")), expected(IDS).logits)
    assert not torch.equal(before, logits_of(str(tmp_path / "average")))
    assert export.main([*words, str(tmp_path / "raw"), "--raw_weights"]) == 0
    assert torch.equal(before, logits_of(str(tmp_path / "raw")))
    words[2] = "safetensors"
    with pytest.raises(ValueError, match="--raw_weights has no place in --format safetensors"):
        export.main([*words, str(tmp_path / "none"), "--raw_weights"])
    with pytest.raises(ValueError, match="What loads are the raw weights"):
        export.main([*words, str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_base_of_another_mask_token(tmp_path) -> None:
    adapter = trained_adapter(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "mask_token_id": 3}))
    out = export_wedlm(str(adapter), str(tmp_path / "out"))
    assert json.loads(Path(out, "config.json").read_text())["mask_token_id"] == MASK


def test_a_real_model(tmp_path, shared_data, caplog) -> None:
    named = ModelArguments(model_name_or_path=str(shared_data / "models/stories260k"), new_special_tokens=["<|mask|>"])
    tokenizer = load_tokenizer(named)
    tokenizer.chat_template = resolve_template(tokenizer, "plain")
    model = load_model(named, tokenizer=tokenizer)
    record_mask_token(model, tokenizer.convert_tokens_to_ids("<|mask|>"))
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    out = export_wedlm(str(tmp_path / "source"), str(tmp_path / "out"))
    assert "adds tokens around each text ('<s>')" in caplog.text  # the template writes it too
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a little girl named Lily.")])
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16).float()(ids).logits
    torch.testing.assert_close(engine_logits(Path(out), ids), exact.double(), rtol=0, atol=1e-4)


# What cannot be exported


def config_of(family: str, **fields):
    from transformers import AutoConfig

    common = dict(vocab_size=260, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return AutoConfig.for_model(family, **common, **fields)


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("mistral", {}, "model_type is 'mistral'"),
        ("qwen3_moe", {}, "model_type is 'qwen3_moe'"),
        ("gemma2", {}, "model_type is 'gemma2'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, r"rope scaling is 'linear' \(factor 4.0\)"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, r"sliding_window 7"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, r"sliding_window 9"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"attention_bias": True}, "attention_bias is True, which gives o_proj a bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, and it has biases or query and key norms"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ],
)  # fmt: skip
def test_networks_that_the_engine_does_not_have(family, fields, message) -> None:
    (problem,) = inexpressible(config_of(family, **fields))
    assert re.search(message, problem), problem


def test_all_reasons_are_given_at_once_before_weights_are_read(tmp_path) -> None:
    config_of("llama", mlp_bias=True, hidden_act="gelu").save_pretrained(tmp_path / "source")  # and no weights at all
    with pytest.raises(ValueError, match=r"cannot run this model: hidden_act is 'gelu'.*; mlp_bias is True"):
        export_wedlm(str(tmp_path / "source"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_window_that_no_layer_has_is_no_window(tmp_path) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
    source = save_source(tmp_path / "source", "qwen2", **fields)
    out = export_wedlm(source, str(tmp_path / "out"))
    assert torch.equal(logits_of(out), logits_of(source))


def test_the_mask_token(tmp_path, caplog) -> None:
    plain = save_source(tmp_path / "plain", mask=None)
    with pytest.raises(ValueError, match=r"not trained as WeDLM.*--mask_token_id"):
        export_wedlm(plain, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="ordinary text"):
        export_wedlm(plain, str(tmp_path / "out"), mask_token_id=65)
    with pytest.raises(ValueError, match="beyond the vocabulary of 260"):
        export_wedlm(plain, str(tmp_path / "out"), mask_token_id=260)
    out = export_wedlm(plain, str(tmp_path / "out"), mask_token_id=MASK)
    assert json.loads(Path(out, "config.json").read_text())["mask_token_id"] == MASK
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    tokenizer = mask_tokenizer()
    tokenizer.add_tokens(["<|other|>"], special_tokens=True)
    trained = save_source(tmp_path / "trained", vocab_size=261, tokenizer=tokenizer)
    out = export_wedlm(trained, str(tmp_path / "other"), mask_token_id=260)
    assert json.loads(Path(out, "config.json").read_text())["mask_token_id"] == 260
    assert "trained with mask token 259, and is exported with 260" in caplog.text


def test_eos_becomes_the_end_of_turn(tmp_path, caplog) -> None:
    tokenizer = mask_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    out = export_wedlm(save_source(tmp_path / "source", tokenizer=tokenizer), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    assert "eos was '<|endoftext|>' and is now the end of turn '<|im_end|>'" in caplog.text
    assert json.loads(Path(out, "config.json").read_text())["eos_token_id"] == END
    caplog.clear()
    tokenizer.chat_template = None
    out = export_wedlm(save_source(tmp_path / "base", tokenizer=tokenizer), str(tmp_path / "texts"))
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"
    assert "there is no chat template" in caplog.text


def test_tokenizers_that_do_not_fit(tmp_path) -> None:
    tokenizer = mask_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ eos_token }}" + CHATML
    with pytest.raises(ValueError, match=r"a turn ends with '<\|im_end\|>'.*eos_token '<\|endoftext\|>'"):
        export_wedlm(save_source(tmp_path / "a", tokenizer=tokenizer), str(tmp_path / "out"))
    tokenizer = mask_tokenizer()
    tokenizer.add_tokens(["more", "and more"])
    with pytest.raises(ValueError, match="has 262 tokens and the model 260 rows"):
        export_wedlm(save_source(tmp_path / "b", tokenizer=tokenizer), str(tmp_path / "out"))
    tokenizer = mask_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, None
    with pytest.raises(ValueError, match="it has none"):
        export_wedlm(save_source(tmp_path / "c", tokenizer=tokenizer), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        export_wedlm(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        export_wedlm(save_source(tmp_path / "source"), str(tmp_path / "out"), base=str(tmp_path / "source"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty; an exported model"):
        export_wedlm(str(tmp_path / "source"), str(tmp_path / "full"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]


# The checks of what was written


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] *= 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_type(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def spoil_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_field(name: str, value):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return spoil


def spoil_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"'))


def spoil_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"A":', '"_":').replace('"B":', '"A":').replace('"_":', '"B":'))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_weights, r"model\.norm\.weight"),
        (spoil_type, r"float32\) is not the model's tensor in bfloat16"),
        (spoil_tensor, r"missing.*model\.layers\.1\.mlp\.up_proj"),
        (spoil_field("rope_theta", 1e6), "rope_theta is 1000000.0"),
        (spoil_field("rope_scaling", {"factor": 2}), "rope_scaling is"),
        (spoil_field("mask_token_id", None), "mask_token_id is None"),
        (spoil_field("qk_norm", False), "attention_bias is False, qk_norm is False"),
        (spoil_eos, "eos_token_id is"),
        (spoil_vocabulary, "otherwise than the model's"),
    ],
)
def test_a_spoilt_folder_is_not_left_behind(tmp_path, monkeypatch, spoil, message) -> None:
    import hf_sft.exporting as exporting

    original = exporting._write_texts
    monkeypatch.setattr(exporting, "_write_texts", lambda folder, *rest: (original(folder, *rest), spoil(folder)))
    with pytest.raises(CheckpointError, match=message):
        export_wedlm(save_source(tmp_path / "source"), str(tmp_path / "new" / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_wrong_network_shows_in_the_logits(tmp_path, monkeypatch) -> None:
    import hf_sft.exporting as exporting

    original = exporting.engine_config
    for field, value in (("rope_theta", 9000.0), ("rms_norm_eps", 1e-3)):
        monkeypatch.setattr(exporting, "engine_config", lambda *rest, f=field, v=value: {**original(*rest), f: v})
        for family in ("qwen3", "llama"):
            source = save_source(tmp_path / f"{family} {field}", family)
            with pytest.raises(CheckpointError, match="logits differ"):
                export_wedlm(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, capsys) -> None:
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    assert export.main([source, "--format", "wedlm", "--output_dir", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert torch.equal(logits_of(str(out)), logits_of(source))
    with pytest.raises(ValueError, match="not empty"):
        export.main([source, "--format", "wedlm", "--output_dir", str(out)])
    with pytest.raises(SystemExit, match="0"):
        export.main(["--help"])
    with pytest.raises(ValueError, match="invalid choice: 'gguf'"):
        export.main([source, "--format", "gguf", "--output_dir", str(out)])
