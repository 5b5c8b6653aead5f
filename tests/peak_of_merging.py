"""Merges an adapter into a base of several shards and prints what it took: ``peak_of_merging.py FOLDER KIND`` (Linux)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sft.merging import merge_adapter

WIDE = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=14)


def write_case(folder: Path, base: PreTrainedModel, kind: str) -> torch.Tensor:
    """A base in shards of 40 MB and an adapter on it; returns the logits of the two."""
    base.save_pretrained(folder / "base", max_shard_size="40MB")
    tiny_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", use_dora=kind == "dora")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(24)[None], use_cache=False).logits


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak), bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(folder: Path, kind: str) -> None:
    if not (folder / "large" / "adapter").exists():  # what the large model took must not be at hand for the merge
        small = tiny_model()
        write_case(folder / "small", small, kind)
        expected = write_case(folder / "large", tiny_model(**WIDE), kind)
        torch.save(expected, folder / "expected.pt")
        os.execv(sys.executable, [sys.executable, *sys.argv])
    merge_adapter(str(folder / "small" / "adapter"), str(folder / "small" / "merged"))  # all that is imported late
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    merge_adapter(str(folder / "large" / "adapter"), str(folder / "large" / "merged"))
    peak = resident("VmHWM") - before
    shards = [path.stat().st_size for path in (folder / "large" / "base").glob("*.safetensors")]
    adapter = sum(path.stat().st_size for path in (folder / "large" / "adapter").glob("*.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "large" / "merged")
    difference = (logits(merged) - torch.load(folder / "expected.pt")).abs().max().item()
    found = {"peak": peak, "shards": len(shards), "largest_shard": max(shards), "adapter": adapter}
    print(json.dumps({**found, "difference": difference}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
