"""Checkpoints of ZeRO and FSDP, written by two processes, come out as the gathered weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sharded_checkpoints import KINDS
from test_adapters import logits, random_ids
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft.commands import export
from hf_sft.converting import convert_checkpoint
from hf_sft.merging import merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SCRIPT = str(Path(__file__).with_name("sharded_checkpoints.py"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(found: Path, expected: Path) -> None:
    one, other = weights(found), weights(expected)
    assert set(one) == set(other)
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_real_checkpoints(tmp_path, engine) -> None:
    if engine != "fsdp":
        pytest.importorskip("deepspeed")
    done = runs.launch([SCRIPT, str(tmp_path), engine], processes=2, DS_ACCELERATOR="cpu")
    assert len(list(tmp_path.glob("done-*"))) == 2, done.stderr[-3000:]
    ids = random_ids()
    for number, kind in enumerate(KINDS):
        case = tmp_path / str(number)
        for checkpoint in sorted(case.glob("checkpoint-*")):
            out = case / f"out-{checkpoint.name}"
            convert_checkpoint(str(checkpoint), str(out))
            assert_same(out, case / "whole")
        names = {path.name for path in out.iterdir()}
        assert {"tokenizer.json", "tokenizer_config.json"} <= names
        AutoTokenizer.from_pretrained(out)
        base = AutoModelForCausalLM.from_pretrained(case / "base")
        if kind.startswith("full"):
            whole, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(info.values())
            assert not torch.equal(logits(whole, ids), logits(base, ids))  # it was trained
        else:
            assert names >= {"adapter_config.json", "adapter_model.safetensors"}
            assert "config.json" not in names
            trained = logits(PeftModel.from_pretrained(base, out), ids)
            merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(out), str(case / "merged")))
            torch.testing.assert_close(logits(merged, ids), trained, rtol=0, atol=1e-5)
    if engine == "zero3":
        _wrong_checkpoints(tmp_path / "0")


def _wrong_checkpoints(case: Path) -> None:
    checkpoint, out = case / "checkpoint-1", str(case / "new")
    step = checkpoint / "global_step1"
    convert_checkpoint(str(step), str(case / "by step"))
    for pattern, message in (
        ("*rank_1*optim*", "Expected 2|some are missing"),
        ("*rank_1*model_states*", "some are missing"),
    ):
        (path,) = step.glob(pattern)
        path.rename(case / "aside")
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(str(checkpoint), out)
        (case / "aside").rename(path)
    (path,) = step.glob("*rank_1*optim*")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint(str(checkpoint), out)
    path.write_bytes(content)
    (checkpoint / "latest").write_text("global_step7")
    with pytest.raises(ValueError, match="names 'global_step7'"):
        convert_checkpoint(str(checkpoint), out)
    (checkpoint / "latest").unlink()
    with pytest.raises(ValueError, match="It holds global_step1 and no file 'latest'"):
        convert_checkpoint(str(checkpoint), out)
    assert not Path(out).exists()


# FSDP's files need no processes


def write_file(folder: Path, family: str = "qwen2", **changes: torch.Tensor) -> Path:
    """A checkpoint of one file, with config and tokenizer above it."""
    save_tiny(folder, family)
    shutil.move(next(folder.glob("model.safetensors")), folder / "gone")
    checkpoint = folder / "checkpoint-7"
    checkpoint.mkdir()
    state = tiny_model(family, seed=5).state_dict()
    torch.save(
        {**{f"_fsdp_wrapped_module.{name}": tensor for name, tensor in state.items()}, **changes},
        checkpoint / "pytorch_model_fsdp.bin",
    )
    return checkpoint


def test_command_type_and_shards(tmp_path, capsys) -> None:
    checkpoint, out = write_file(tmp_path / "run"), tmp_path / "out"
    words = ["--format", "safetensors", "--output_dir", str(out), "--dtype", "bfloat16", "--max_shard_size", "20KB"]
    assert export.main([str(checkpoint), *words]) == 0
    assert f"Exported model: {out}" in capsys.readouterr().out
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    expected = tiny_model("qwen2", seed=5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name].bfloat16()), name
    assert not (out / "gone").exists()
    with pytest.raises(ValueError, match="not empty"):
        export.main([str(checkpoint), *words])
    for extra in (["--base", "x"], ["--mask_token_id", "3"]):
        with pytest.raises(ValueError, match="has no place in --format safetensors"):
            export.main([str(checkpoint), *words, *extra])
    with pytest.raises(ValueError, match="--dtype has no place in --format wedlm"):
        export.main([str(checkpoint), "--format", "wedlm", "--output_dir", "y", "--dtype", "float32"])


def test_fused_experts_are_stored_as_their_family_stores_them(tmp_path) -> None:
    from test_merging import mixtral

    model = mixtral()
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "run")
    torch.save(model.state_dict(), tmp_path / "run" / "pytorch_model_fsdp.bin")
    convert_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"))
    assert_same(tmp_path / "out", tmp_path / "plain")


def test_what_is_no_checkpoint(tmp_path) -> None:
    out = str(tmp_path / "deep" / "out")
    for source, message in (
        (tmp_path / "none", "does not exist"),
        (Path(save_tiny(tmp_path / "plain")), "loads as it is, nothing is to convert"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(str(source), out)
    checkpoint = write_file(tmp_path / "run")
    for wrong in ({"dtype": "int8"}, {"max_shard_size": "0"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert_checkpoint(str(checkpoint), out, **wrong)
    (tmp_path / "run" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"No config.json is in .*checkpoint-7 or .*run; copy"):
        convert_checkpoint(str(checkpoint), out)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"hidden_size": 64}, "embed_tokens.weight has shape .259, 32. and must have .259, 64."),
        ({"num_hidden_layers": 1, "layer_types": None}, "tensors are not the model's"),
        ({"num_hidden_layers": 3, "layer_types": None}, "lacks 12 tensors.*adapter_config.json would be needed"),
    ):
        (checkpoint / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(str(checkpoint), out)
    file = checkpoint / "pytorch_model_fsdp.bin"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint(str(file), out)
    assert not (tmp_path / "deep").exists()


def test_a_rank_is_missing(tmp_path) -> None:
    import torch.distributed.checkpoint as dcp

    save_tiny(tmp_path / "run", "qwen2")
    folder = tmp_path / "run" / "pytorch_model_fsdp_0"
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save({"model": tiny_model("qwen2").state_dict()}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    convert_checkpoint(str(folder), str(tmp_path / "out"))
    assert_same(tmp_path / "out", tmp_path / "run")
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint(str(folder), str(tmp_path / "again"))
    file.unlink()
    with pytest.raises(ValueError, match=f"lacks {file.name}: the file of a rank is missing"):
        convert_checkpoint(str(tmp_path / "run"), str(tmp_path / "again"))
    (folder / ".metadata").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint(str(folder), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_without_deepspeed(tmp_path, monkeypatch) -> None:
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "latest").write_text("global_step1\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        convert_checkpoint(str(tmp_path), str(tmp_path / "out"))
