"""Regions of a model under torch.compile: the same training, names and files, and few compilations whatever the lengths."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

from hf_sft.arguments import DataArguments, WeDLMArguments
from hf_sft.models import compiling
from hf_sft.models.compiling import compile_regions, regions
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments, refusals


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    return [
        {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
        for ids in (torch.randint(256, (length,), generator=generator).tolist() for length in lengths)
    ]


def trainer_of(folder, model=None, data=None, **options):
    settings = dict(
        output_dir=str(folder), use_cpu=True, max_steps=4, gradient_accumulation_steps=2, logging_steps=1,
        per_device_train_batch_size=1, learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    more = {key: options.pop(key) for key in ("eval_dataset", "wedlm_args") if key in options}
    return SFTTrainer(
        tiny.tiny_model("qwen3") if model is None else model, TrainingArguments(**settings | options), train_dataset=rows(40),
        processing_class=tiny.tiny_tokenizer(), data_args=data or DataArguments(max_seq_length=64), **more,
    )  # fmt: skip


def test_regions_are_norms_and_feed_forward_networks_of_layers():
    each = ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn.k_norm", "self_attn.q_norm"]
    model = tiny.tiny_model("qwen3")
    assert sorted(regions(model)) == [f"model.layers.{i}.{name}" for i in (0, 1) for name in each]
    assert len(regions(get_peft_model(model, LoraConfig(target_modules="all-linear")))) == 10
    for family in ("gemma2", "gpt_neox", "phi3", "granite", "bloom", "falcon", "stablelm", "qwen3_moe"):
        assert len(regions(tiny.tiny_model(family))) >= 4, family


def adapted():
    return get_peft_model(tiny.tiny_model("qwen3"), LoraConfig(target_modules="all-linear", lora_dropout=0.0))


KINDS = {
    "full": dict(eval_dataset=rows(5, seed=1)),
    "lora": dict(model=adapted),
    "autocast": dict(bf16=True),
    "checkpointing": dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}),
    "wedlm": dict(
        data=DataArguments(max_seq_length=64, objective="wedlm"),
        wedlm_args=WeDLMArguments(mask_token="<|mask|>", block_size=8),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_without_compilation(kind, tmp_path):
    found = []
    for name, backend in (("plain", None), ("compiled", "aot_eager")):
        options = dict(KINDS[kind])
        if "model" in options:
            options["model"] = options["model"]()
        compiled = {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}
        trainer = trainer_of(tmp_path / name, **options, **compiled)
        assert trainer.accelerator.state.dynamo_plugin.backend.value.lower() == "no"
        trainer.train()
        assert bool(counters["stats"]["unique_graphs"]) is bool(compiled)
        if "eval_dataset" in options:
            found.append(trainer.evaluate()["eval_loss"])
        found.append((trainer.state.log_history, {n: p.detach() for n, p in trainer.model.state_dict().items()}))
    plain, compiled = found[len(found) // 2 - 1], found[-1]
    losses = [[line["loss"] for line in log if "loss" in line] for log, _ in (plain, compiled)]
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5 if kind != "autocast" else 5e-3, atol=0)
    assert plain[1].keys() == compiled[1].keys()
    for name, weight in plain[1].items():
        torch.testing.assert_close(compiled[1][name], weight, rtol=0, atol=2e-3 if kind == "autocast" else 2e-5)
    if kind == "full":
        assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_few_compilations_for_many_lengths(monkeypatch):
    """Each kind of region is compiled once per mode, however many layers and lengths there are; decoding compiles no more."""
    model, counter = tiny.tiny_model("qwen3", num_hidden_layers=4), CompileCounter()
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    compile_regions(model, counter, None)
    for length in (5, 9, 12, 17, 30):
        model(torch.arange(length)[None], use_cache=False).logits.sum().backward()
    trained = counter.frame_count
    assert 0 < trained <= 6, "two widths of norms and one feed-forward network, behind an embedding and behind a layer"
    with torch.no_grad():
        for length in (6, 8, 21):
            model(torch.arange(length)[None], use_cache=False)
    evaluated = counter.frame_count
    assert evaluated <= 2 * trained
    plain = tiny.tiny_model("qwen3", num_hidden_layers=4)
    prompt = torch.arange(5)[None]
    answers = [each.generate(prompt, max_new_tokens=6, do_sample=False).tolist() for each in (model, plain)]
    assert answers[0] == answers[1] and counter.frame_count <= evaluated + 3  # rows of one token


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    model = tiny.tiny_model()
    with pytest.raises(ValueError, match="modes are inductor's"):
        compile_regions(model, "aot_eager", "default")
    with pytest.raises(ValueError, match="leave it out"):
        compile_regions(torch.nn.Linear(2, 2), "eager", None)

    def no_compiler():
        raise InvalidCxxCompiler()

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    with pytest.raises(ValueError, match="install g\\+\\+"):
        compile_regions(model, "inductor", None)
    monkeypatch.setattr(compiling, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        compile_regions(model, "eager", None)


def test_a_backend_or_a_mode_asks_for_compilation():
    """And nothing rounds float32 products for it."""
    before = torch.backends.cuda.matmul.allow_tf32
    args = TrainingArguments(use_cpu=True, torch_compile_mode="default")
    assert (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode) == (True, "inductor", "default")
    plain = TrainingArguments(use_cpu=True)
    assert (plain.torch_compile, plain.torch_compile_backend, plain.torch_compile_mode) == (False, None, None)
    assert torch.backends.cuda.matmul.allow_tf32 is before
    for name, value in itertools.product(("torch_compile_backend", "torch_compile_mode"), ("tvm", "reduce-overhead")):
        assert list(refusals({name: value}, packing=True)) == [name]
