"""The matrix of model families: each cell is compared with a plain computation, or refused with the sentence of the table."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import family_table
import pytest
import tiny
import torch
from family_table import ROWS
from peft import PeftModel
from test_attention import assert_same, learned, reference, rows
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_sft import DataArguments, LoraArguments, ModelArguments, SFTTrainer, TrainingArguments, merge_adapter
from hf_sft.attention.backends import BACKENDS, restore_attention
from hf_sft.attention.selfcheck import check_backend, choose_layout
from hf_sft.collators import CausalCollator
from hf_sft.data.texts import TextEncoder
from hf_sft.models.adapters import save_adapter
from hf_sft.models.families import PAD_NAMES, end_tokens, ensure_pad_token, router_loss_coefficient
from hf_sft.models.head import HeadScorer
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.quantization import keep_trainable_on_cpu
from hf_sft.models.routers import RouterRecorder
from hf_sft.models.targets import linear_layers
from hf_sft.models.twin import random_twin
from hf_sft.models.wrappers import base_model

FAMILIES = list(ROWS)
MIXTURES = [family for family, row in ROWS.items() if "experts" in " ".join(row.left_out)]
MODES = ["full", "lora", "qlora"]
IDS = torch.randint(0, 255, (2, 30), generator=torch.Generator().manual_seed(3))


# ---- models ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], str]:
    """The folder of a family's tiny model, with weights large enough that attention and experts matter."""
    root, made = tmp_path_factory.mktemp("families"), set()

    def folder(family: str) -> str:
        path = root / family
        if family not in made:
            model = tiny.tiny_model(family)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1 and not name.endswith("A_log"):
                        parameter.mul_(3.0)
            model.save_pretrained(path)
            tiny.tiny_tokenizer().save_pretrained(path)
            made.add(family)
        return str(path)

    return folder


def load(folder: str, mode: str, *targets: str) -> Any:
    """As train.py loads it; the B matrices of a new adapter are not zero."""
    torch.manual_seed(0)
    named = ModelArguments(model_name_or_path=folder, train_mode=mode, dtype="float32")  # type: ignore[arg-type]
    model = load_model(named, LoraArguments(lora_rank=4, lora_target_modules=list(targets or ["all-linear"])))
    keep_soft_caps(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def keep_soft_caps(model: Any) -> None:
    """transformers before 5.21 drops them under sdpa."""
    if getattr(base_model(model).config, "attn_logit_softcapping", None):
        base_model(model).set_attn_implementation("eager")


def plain_model(folder: str, mode: str, *targets: str) -> Any:
    """The same numbers with nothing of ours in the way: of a quantised base, its dequantised weights in float32."""
    if mode != "qlora":
        return load(folder, mode, *targets)
    import bitsandbytes as bnb

    model, held = load(folder, "lora", *targets), dict(load(folder, mode, *targets).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            state = getattr(held[name], "quant_state", None)
            value = held[name] if state is None else bnb.functional.dequantize_4bit(held[name].data, state)
            transposed = state is not None and "Conv1D" in type(model.get_submodule(name.rpartition(".")[0])).__name__
            parameter.copy_(value.T if transposed else value)
    return model


def plain_loss(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss [] and gradients: documents one by one, cross entropy from full logits, the router loss from transformers."""
    nll, _ = reference(model)  # leaves the gradients of the sum
    coefficient = getattr(base_model(model).config, "router_aux_loss_coef", 0.0)
    router = torch.zeros(())
    if coefficient:
        batch = padded(scored_rows())
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        router = coefficient * model(**inputs, use_cache=False, output_router_logits=True).aux_loss
        (len(nll) * router).backward()
    gradients = {name: p.grad / len(nll) for name, p in model.named_parameters() if p.grad is not None}
    return nll.sum() / len(nll) + router.detach(), gradients


def scored_rows() -> list[dict]:
    return [row for row in rows() if (row["labels"][1:] != -100).any()]


def padded(examples: list[dict]) -> dict[str, Any]:
    return CausalCollator(packed=False, pad_token_id=257)(examples)


@contextmanager
def log_lines():
    """What our loggers say within."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_sft")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


# ---- the matrix ----


class Step(NamedTuple):
    """One micro-batch of a trainer, as the helpers of test_attention have it."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def make_trainer(model: Any, folder: Path, steps: int = 6) -> SFTTrainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3, use_cpu=True,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    data = DataArguments(max_seq_length=128)
    return SFTTrainer(model, args, train_dataset=scored_rows(), data_args=data)


def one_step(trainer: SFTTrainer) -> Step:
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return Step(loss.detach()[None], gradients)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    keep_soft_caps(model)
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_checkpointing_and_saving(family: str, mode: str, saved, tmp_path) -> None:
    """One after the other on one model: gradients of the first step, the same under activation checkpointing, losses that fall,
    and what is saved gives the logits of what was trained."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    check_cell(family, mode, saved(family), tmp_path)


def check_cell(family: str, mode: str, source: str, folder: Path, *targets: str) -> SFTTrainer:
    trainer = make_trainer(load(source, mode, *targets), folder)
    assert trainer.layout.name == ROWS[family].layout
    assert trainer.scorer.chunked, "the head is a plain linear layer and its logits are what the config says"
    step = one_step(trainer)
    loss, gradients = plain_loss(plain_model(source, mode, *targets))
    assert_same(step, (loss[None], gradients))

    base = base_model(trainer.model)
    tiny.checkpoint_activations(base)
    first, calls = next(m for m in base.modules() if hasattr(m, "weight") and "Linear" in str(type(m).__mro__)), []
    first = next((m for m in base.modules() if "Conv1D" in type(m).__name__), first)
    hook = first.register_forward_pre_hook(lambda *_: calls.append(1))
    again = one_step(trainer)
    hook.remove()
    assert len(calls) == 2, "layers run a second time in the backward pass"
    assert torch.equal(step.loss, again.loss)
    assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in step.gradients.items())

    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1, losses
    trainer.save_model(str(folder))
    restore_attention(base)
    assert torch.equal(logits(read_again(base, mode, source, folder)), logits(trainer.model))
    return trainer


def read_again(base: Any, mode: str, source: str, folder: Path) -> Any:
    """What was saved, as a user of transformers and PEFT reads it."""
    if mode == "full":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantised = {} if mode == "lora" else {"quantization_config": base.config.quantization_config}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **quantised)
    if quantised:
        keep_trainable_on_cpu(model)
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(family: str, saved) -> None:
    """Padded batches and every backend give what a plain computation gives, or are refused with the table's sentence."""
    row = ROWS[family]

    def fresh() -> Any:
        return load(saved(family), "full")

    model = fresh()
    choice = choose_layout(model)
    assert choice.name == row.layout
    for name, sentence in row.refused.items():
        assert re.search(f"{name}: .*({sentence})", choice.reason)
    restore_attention(model)
    want = reference(model)
    assert_same(learned(fresh(), [padded(rows())]), want)
    batch = CausalCollator()([rows()])
    for name, backend in BACKENDS.items():
        model = fresh()
        if name in row.refused:
            verdict = check_backend(model, backend)
            assert not verdict.passed and re.search(row.refused[name], verdict.reason)
            with pytest.raises(ValueError, match=f"'{name}' was asked for, and .*({row.refused[name]})"):
                choose_layout(model, name)
            continue
        assert choose_layout(model, name).name == name
        assert_same(learned(model, [batch], backend), want)
    if row.layout == "padded":
        with pytest.raises(ValueError, match=r"packing was asked for, and .* cannot be packed"):
            choose_layout(fresh(), packing=True)
    else:
        assert choose_layout(fresh(), packing=True).name == row.layout


@pytest.mark.parametrize("family", [family for family, row in ROWS.items() if row.layout == "segment"])
def test_generation_is_left_as_it_was(family: str, saved) -> None:
    """Calls without a layout go through our attention function as well, here with a cache and padding on the left."""
    model = load(saved(family), "full").eval()
    mask = torch.ones_like(IDS[:, :12])
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    want = model.generate(IDS[:, :12], **options)
    choose_layout(model, "segment")
    assert torch.equal(model.generate(IDS[:, :12], **options), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_twin_stands_for_the_model(family: str) -> None:
    """Where weights are sharded, a twin of two layers is measured instead, in the type of the weights."""
    for dtype in (torch.float32, torch.bfloat16):
        twin = random_twin(tiny.tiny_model(family, num_hidden_layers=5).to(dtype), torch.device("cpu"))
        assert twin.config.num_hidden_layers == 2
        assert choose_layout(twin).name == ROWS[family].layout
        assert HeadScorer(twin).verify(twin, IDS[:1, :16])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_linear_adapts_and_says(family: str, saved) -> None:
    row = ROWS[family]
    with log_lines() as lines:
        model = load(saved(family), "lora")
    base = model.get_base_model()
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    plain = tiny.tiny_model(family)
    linear = {name for name, module in linear_layers(plain) if module is not plain.get_output_embeddings()}
    assert adapted <= linear
    assert tuple(sorted({name.rpartition(".")[2] for name in adapted})) == row.adapted
    said = [line for line in lines if line.startswith("all-linear leaves out ")]
    assert len(said) == bool(row.left_out)
    assert all(part in said[0] for part in row.left_out)
    assert all(name.rpartition(".")[2] in said[0] for name in linear - adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nf4_reaches_and_says(family: str, saved) -> None:
    pytest.importorskip("bitsandbytes")
    row = ROWS[family]
    with log_lines() as lines:
        model = load(saved(family), "qlora").get_base_model()
    said = [line for line in lines if line.startswith("nf4 leaves ")]
    assert [line.rpartition(": ")[2].rstrip(".") for line in said] == ([", ".join(row.whole)] if row.whole else [])
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not head:
            packed = module.weight.dtype == torch.uint8
            assert packed != (".".join(name.split(".")[-2:]) in row.whole), name
    assert head.weight.dtype == torch.float32


def test_a_model_that_nf4_cannot_reach_is_refused(saved, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers.models.falcon import modeling_falcon

    class Own(torch.nn.Linear):
        pass

    monkeypatch.setattr("hf_sft.models.families._OWN_LINEAR_LAYERS", {})
    monkeypatch.setattr(modeling_falcon, "FalconLinear", Own)
    with pytest.raises(ValueError, match=r"nf4 reaches no layer of FalconForCausalLM.* Use train_mode lora"):
        load(saved("falcon"), "qlora")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_not_held_in_int8(family: str, saved) -> None:
    pytest.importorskip("bitsandbytes")
    named = ModelArguments(model_name_or_path=saved(family), train_mode="qlora", quantization="int8")
    with pytest.raises(ValueError, match=r"quantization is int8, and the latent attention of a deepseek_v. model"):
        load_model(named)


def test_the_docs_say_what_is_measured() -> None:
    assert family_table.documented() == family_table.table(), "run python tests/family_table.py"
    assert set(FAMILIES) == set(tiny.FAMILIES) - {"llama"}, "llama is llama3 without its scaling of RoPE"


# ---- mixtures of experts ----


@pytest.mark.parametrize("mode", ["lora", "qlora"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_adapted_where_they_are_named(family: str, mode: str, saved, tmp_path) -> None:
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    trainer = check_cell(family, mode, saved(family), tmp_path, "all-linear", "experts")
    adapted = {name for name, p in trainer.model.named_parameters() if ".experts." in name and p.requires_grad}
    layers = sum(type(module).__name__.endswith("Experts") for module in trainer.model.modules())
    assert len(adapted) == layers * 2 * 2, "two parameters per layer, A and B for each"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # [E, out, in] and [E, in, out]
def test_each_expert_has_an_update_of_its_own(family: str, saved) -> None:
    model = load(saved(family), "lora", "experts.down_proj")
    before = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32).state_dict()
    found = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=0, atol=5e-6)
    changed = {
        name: value - before[name]
        for name, value in merged.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert len(changed) == 2 and all(name.endswith("experts.down_proj") for name in changed)
    for update in changed.values():
        values = torch.linalg.svdvals(update)
        assert (values[:, 3] > 1e-3).all() and (values[:, 4:] < 1e-5).all(), "rank 4 for each expert"


@pytest.mark.parametrize(
    ("names", "lora", "message"),
    [
        (["experts"], {"lora_dropout": 0.1}, "names experts.down_proj, experts.gate_up_proj, and lora_dropout is 0.1"),
        (["experts"], {"use_dora": True}, "use_dora is True"),
        (["experts.w1"], {}, "'experts.w1' matches no layer. Candidates: all-linear, .*experts"),
        (
            ["gate_proj"],
            {},
            "under the name 'gate_proj' PEFT adapts the routed experts of a deepseek_v3 model; name experts",
        ),
    ],
)
def test_what_adapters_on_experts_cannot_be(names, lora, message, saved) -> None:
    named = ModelArguments(model_name_or_path=saved("deepseek_v3"), train_mode="lora")
    with pytest.raises(ValueError, match=message):
        load_model(named, LoraArguments(lora_target_modules=names, **lora))


def test_adapters_on_experts_are_not_sharded(saved, tmp_path) -> None:
    class Training:
        seed, fsdp = 0, ["full_shard"]

    named = ModelArguments(model_name_or_path=saved("mixtral"), train_mode="lora")
    with pytest.raises(ValueError, match=r"experts.down_proj.* which ZeRO-3 and FSDP cut into pieces"):
        load_model(named, LoraArguments(lora_target_modules=["experts.down_proj"]), training=Training())


def test_saved_adapters_on_experts_go_on_and_merge(saved, tmp_path) -> None:
    model = load(saved("qwen3_moe"), "lora", "q_proj", "experts")
    save_adapter(model, str(tmp_path))
    named = ModelArguments(model_name_or_path=saved("qwen3_moe"), train_mode="lora", dtype="float32")
    again = load_model(named, LoraArguments(lora_rank=4, adapter_name_or_path=str(tmp_path)))
    assert torch.equal(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    merge_adapter(str(tmp_path), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_of_the_router_loss(family: str) -> None:
    config = tiny.tiny_model(family).config
    if ROWS[family].router_loss:
        assert router_loss_coefficient(config) == config.router_aux_loss_coef == 0.001
        assert router_loss_coefficient(config, 0.5) == 0.5
    else:
        assert router_loss_coefficient(config) == 0
        with pytest.raises(ValueError, match=f"is 0.5, and a {config.model_type} model has no router loss"):
            router_loss_coefficient(config, 0.5)
    assert router_loss_coefficient(config, 0.0) == 0
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="use 0 or a positive number"):
            router_loss_coefficient(config, wrong)


@pytest.mark.parametrize("family", [family for family, row in ROWS.items() if row.router_loss])
def test_the_router_loss_is_that_of_transformers(family: str, saved, tmp_path) -> None:
    """With padding, and for one packed row, whose mask transformers' own function cannot read."""
    model = load(saved(family), "full")
    recorder = RouterRecorder(model)
    batch = padded(rows())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with recorder.recording() as routed:
        want = model(**inputs, use_cache=False, output_router_logits=True).aux_loss
    torch.testing.assert_close(recorder.loss(routed, batch["attention_mask"]), want, rtol=1e-6, atol=0)
    trainer = make_trainer(load(saved(family), "full"), tmp_path)
    (packed,) = trainer.get_train_dataloader()
    with trainer.routers.recording() as routed:
        trainer.model(**trainer._model_inputs(packed))
    alone = padded(scored_rows())
    want = model(
        input_ids=alone["input_ids"], attention_mask=alone["attention_mask"], use_cache=False, output_router_logits=True
    ).aux_loss
    torch.testing.assert_close(trainer.routers.loss(routed), want, rtol=1e-6, atol=0)
    with pytest.raises((RuntimeError, AttributeError)):
        trainer.model(**trainer._model_inputs(packed), output_router_logits=True)


# ---- tokenizers ----


@pytest.mark.parametrize("name", PAD_NAMES)
def test_a_pad_token_is_found_in_the_vocabulary(name: str) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer, "x")
    names = {"<|endoftext|>", name}  # the tiny vocabulary holds the first anyway
    assert tokenizer.pad_token == next(pad for pad in PAD_NAMES if pad in names)


def test_pad_is_eos_where_nothing_else_is_left() -> None:
    """Llama 2 has <unk>; GPT-2's and Pythia's <|endoftext|> is eos and bos as well."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = "<|endoftext|>"
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer, "x")
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize(
    ("known", "first", "want"),
    [
        (None, (), []),
        (None, (5,), [5]),
        (7, (5,), [5, 7]),
        ([128001, 128008, 128009], (128009,), [128009, 128001, 128008]),  # Llama 3
        ([1, 106], (106,), [106, 1]),  # Gemma: <eos> and <end_of_turn>
        ([32000, 32001, 32007], (32007,), [32007, 32000, 32001]),  # Phi-3
    ],
)
def test_several_tokens_end_a_text(known, first, want) -> None:
    assert end_tokens(GenerationConfig(eos_token_id=known), *first) == want


def test_a_beginning_token_that_the_tokenizer_adds_is_read_once_and_not_learned(tmp_path) -> None:
    """As Llama's and Gemma's tokenizers do for texts; in conversations the template writes it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 258)])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelArguments(tokenizer_name_or_path=str(tmp_path)))
    (row,) = TextEncoder(tokenizer).encode(["ab"])
    ids, labels = list(row["input_ids"]), list(row["labels"])
    assert ids[0] == 258 and ids.count(258) == 1 and labels[0] == -100
    assert labels[1:] == ids[1:]
