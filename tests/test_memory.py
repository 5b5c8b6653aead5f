"""Counting memory: parameters of public models, bytes that runs really allocate, and docs that say what the script says."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from transformers import Trainer
from transformers.optimization import Adafactor

from hf_sft import DataArguments, SFTTrainer, TrainingArguments, products
from hf_sft.arguments import LoraArguments
from hf_sft.memory.activations import MicroBatch, Run, activations_of
from hf_sft.memory.counting import LiveBytes, allocated
from hf_sft.memory.plan import Plan, estimate, fits
from hf_sft.memory.states import State, nf4_bytes, optimizer_bytes, state_of, step_bytes

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import memory
import memory_error

# As the models' own pages and papers say.
PARAMETERS = {
    "EleutherAI/pythia-410m": 405_334_016,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "bigscience/bloom-1b1": 1_065_314_304,
    "state-spaces/mamba-1.4b-hf": 1_372_178_432,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "google/gemma-2b": 2_506_172_416,
    "state-spaces/mamba-2.8b-hf": 2_768_345_600,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
}
# Families, and whether head and embeddings are one.
FAMILIES = {"llama": False, "qwen2": True, "gpt_neox": False, "bloom": True, "mamba": True, "mixtral": False}
# All of them were compared in each mode once; these are in every run of the tests.
_RUN = {"full": ("llama", "bloom"), "lora": ("qwen2", "mamba", "mixtral"), "qlora": ("gpt_neox", "mamba", "mixtral")}
RANK = 3
LORA = LoraArguments(lora_rank=RANK)
RECORD = json.loads(memory.RECORD.read_text(encoding="utf-8"))["results"]
ERRORS = json.loads((memory.RECORD.parent / "memory_error.json").read_text(encoding="utf-8"))["results"]
HALF = torch.bfloat16


def config_of(family: str, **changes: Any) -> Any:
    return tiny.tiny_model(family, **changes).config


# --- counted against allocated ----------------------------------------------------------------------------------------


def test_the_models_have_the_parameters_that_their_makers_state():
    found = {row["model"]: row["parameters"] for row in RECORD["models"]}
    assert found == PARAMETERS
    for name in ("Qwen/Qwen3-0.6B", "bigscience/bloom-1b1", "meta-llama/Llama-3.1-70B"):
        config = memory.config_of(memory.SHAPES[name])
        assert state_of(config, "full", LORA).trained == PARAMETERS[name]


@pytest.mark.parametrize(
    "family, mode",
    [(family, mode) for family, mode in itertools.product(FAMILIES, ("full", "lora", "qlora")) if family in _RUN[mode]],
)
def test_the_state_is_counted_to_the_byte(family: str, mode: str, tmp_path):
    """After a step and a backward pass: weights, gradients, moments of a run as train.py makes it."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    changes = {"tie_word_embeddings": FAMILIES[family]}
    tiny.save_tiny(tmp_path / f"model-{family}", family, **changes)
    adapter = {} if mode == "full" else {"train_mode": mode, "lora_rank": RANK}
    values = runs.arguments(tmp_path, family, max_steps=1, bf16=True, **adapter)
    _, trainer = runs.train_in_memory(values)
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))

    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    moments = [value for p in trained for value in trainer.optimizer.state[p].values()]
    counted = state_of(config_of(family, **changes), mode, LORA)
    assert allocated(p.data for p in trained) == counted.trained_weights
    frozen = [p.data for p in parameters if not p.requires_grad]
    weights = memory_error.tensors_of(trainer.model)
    of_frozen = [t for t in weights if not any(t is other for other in [*trained, *(p.grad for p in trained)])]
    buffers = list(trainer.model.buffers())
    assert allocated([*frozen, *of_frozen]) - allocated(buffers) == counted.frozen_weights
    assert sum(p.grad.nbytes for p in trained) == counted.gradients
    assert allocated(moments) == counted.optimizer
    assert sum(p.numel() for p in trained) == counted.trained


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_the_states_of_optimizers_are_counted_to_the_byte(optim: str, tmp_path):
    model = tiny.tiny_model("llama")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir=str(tmp_path), optim=optim))
    optimizer = kind(model.parameters(), **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held, counted = optimizer_bytes(optim)
    assert counted and allocated(memory_error.optimizer_tensors(optimizer)) == sum(map(held, model.parameters()))


@pytest.mark.parametrize("optim, options", [("sgd", "momentum=0.9"), ("rmsprop", "momentum=0.9, centered=true")])
def test_options_of_optimizers_are_read(optim: str, options: str, tmp_path):
    model = tiny.tiny_model("llama")
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, optim_args=options)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind(model.parameters(), **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held, _ = optimizer_bytes(optim, optim_args=options)
    assert allocated(memory_error.optimizer_tensors(optimizer)) == sum(map(held, model.parameters()))
    with pytest.raises(ValueError, match="optim_args has 'momentum': write name=value"):
        optimizer_bytes(optim, optim_args="momentum")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_the_temporaries_of_a_step_are_counted_to_the_byte(optim: str, decay: float, device: str):
    """What PyTorch does on CUDA unless told otherwise, ``foreach``, can be asked of it on a CPU."""
    shapes = [(300, 100), (200, 100), (64, 10), (250, 100)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    if optim == "adafactor":
        settings: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
    else:
        settings = {"fused": True} if optim == "adamw_torch_fused" else {"foreach": device == "cuda"}
    kind = kinds.get(optim, Adafactor if optim == "adafactor" else torch.optim.AdamW)
    optimizer = kind(parameters, lr=0.1, weight_decay=decay, **settings)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with torch.no_grad(), LiveBytes([*parameters, *gradients, *memory_error.optimizer_tensors(optimizer)]) as live:
        optimizer.step()
    found = step_bytes(optim, shapes, device, decays=decay > 0)
    assert found == pytest.approx(live.most, abs=4000 if optim == "adafactor" else 16)  # and its rows and columns
    assert (found == 0) is (optim == "adamw_torch_fused" or (optim == "sgd" and not decay))


@pytest.mark.parametrize(
    "optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit", "adamw_apex_fused"]
)
def test_kernels_of_others_make_nothing(optim: str):
    assert step_bytes(optim, [(4096, 4096)], "cuda") == step_bytes(optim, [(4096, 4096)], "cpu") == 0
    assert optimizer_bytes(optim)[1]


def test_a_step_on_cuda_has_no_temporaries_of_all_weights_unless_all_are_taken_at_once():
    config = config_of("qwen3")
    matrices = sum(math.prod(shape) for shape in state_of(config, "full", LORA).shapes if len(shape) > 1)
    largest = max(math.prod(shape) for shape in state_of(config, "full", LORA).shapes)

    def made(**settings: Any) -> int:
        plan = Plan(config, batch=MicroBatch(1, 16), **settings)
        return estimate(plan).moments["optimizer step"]["temporaries"]

    assert made(optim="adamw_torch") == 4 * matrices == made(optim="rmsprop") == made(optim="adagrad") // 2
    assert made(optim="rmsprop", decays=True) == 8 * matrices and made(optim="sgd", decays=True) == 4 * matrices
    norms = ("*proj*", "*embed*", "*lm_head*")  # all but these is frozen: what has one dimension does not decay
    assert made(optim="rmsprop", decays=True, freeze=norms) == made(optim="rmsprop", freeze=norms) > 0
    assert made(optim="adafactor") <= 12 * largest < 4 * matrices
    assert made() == made(optim="sgd") == made(optim="paged_adamw_8bit") == made(optim="lion_32bit") == 0
    # FSDP2 has a share of each row of weights, ZeRO a flat one whose gradient is made float32 for the step.
    halves = [(-(-shape[0] // 2), *shape[1:]) for shape in state_of(config, "full", LORA).shapes if len(shape) > 1]
    assert made(optim="adamw_torch", engine="fsdp", devices=2) == 4 * sum(map(math.prod, halves))
    assert made(engine="zero2", devices=2) == 4 * matrices // 2
    assert made(optim="adamw_torch", engine="zero2", devices=2) == (2 + 4) * matrices // 2
    assert made(optim="adamw_torch", engine="zero3", devices=2, sub_group=100) == (2 + 4) * 100
    assert made(optim="adamw_torch", engine="zero3", devices=2, offload_optimizer=True) == 0


@pytest.mark.parametrize(
    "optim, kind, bits",
    [
        ("adamw_8bit", "AdamW", 8),
        ("paged_adamw_32bit", "AdamW", 32),
        ("lion_8bit", "Lion", 8),
        ("lion_32bit", "Lion", 32),
    ]
    + [("rmsprop_bnb", "RMSprop", 32), ("rmsprop_bnb_8bit", "RMSprop", 8)],
)
def test_moments_of_bitsandbytes(optim: str, kind: str, bits: int):
    bnb = pytest.importorskip("bitsandbytes")
    embedding = torch.nn.Embedding(100, 64)
    weight, small = torch.nn.Parameter(torch.ones(100, 50)), torch.nn.Parameter(torch.ones(63, 64))
    held, counted = optimizer_bytes(optim, torch.nn.ModuleList([embedding]))
    optimizer = getattr(bnb.optim, kind)([weight, small], optim_bits=bits)
    for parameter in (weight, small):
        parameter.grad = torch.ones_like(parameter)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        tables = {"qmap1", "qmap2"}  # 2 KiB for all parameters together
        found = [v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor) and k not in tables]
        assert counted and allocated(found) == held(parameter)
    assert held(embedding.weight) == (2 if kind == "AdamW" else 1) * 4 * 6400
    assert optimizer_bytes("galore_adamw")[1] is False


def test_state_per_device():
    state = State(100, 10, 200, 40, 40, 80)
    assert state.total == 360 == state.per_device("none", 1).total
    assert state.per_device("ddp", 8).total == 360 + 40
    assert state.per_device("zero1", 5).total == 200 + (4 + 12 / 5) * 10
    assert state.per_device("zero2", 7).total == 200 + (2 + 2) * 10
    assert state.per_device("zero3", 8).total == state.per_device("fsdp", 8).total == (200 + 160) / 8
    assert state.per_device("zero3", 8, half=False).total == (200 + 200) / 8
    gathered = 2 * (100 + 10)  # what is frozen as well
    assert state.per_device("fsdp", 8, reshard=False).total == (200 + 160) / 8 + gathered
    plain, one = replace(state, moments=0, optimizer=0), replace(state, moments=1, optimizer=40)
    assert plain.per_device("zero2", 2).optimizer == 4 * 10 / 2 and one.per_device("zero2", 2).optimizer == 8 * 10 / 2
    assert plain.per_device("fsdp", 2).optimizer == 0 and one.per_device("fsdp", 2).optimizer == 4 * 10 / 2
    assert plain.per_device("ddp", 2).optimizer == 0
    with pytest.raises(ValueError, match="choose none, ddp, zero1, zero2, zero3 or fsdp"):
        state.per_device("zero", 8)


def test_live_bytes_follow_storages():
    known = torch.ones(10)
    with LiveBytes([known]) as live:
        first = torch.zeros(100)
        view = first[10:]
        known.add_(1)
        assert live.now == 400 == live.most
        del first
        assert live.now == 400  # the view holds it
        del view
        assert (live.now, live.most) == (0, 400)
        live.restart()
        assert live.most == 0
        for _ in range(20):  # where a known one was, another may come to stand
            with LiveBytes([known := torch.ones(10)]) as live:
                del known
                kept = [torch.zeros(100) for _ in range(8)]
                assert live.now == 400 * len(kept)


# --- a micro-batch ------------------------------------------------------------------------------------------------------


def test_activations_grow_with_the_tokens():
    config = config_of("llama", max_position_embeddings=2048)
    run = Run("lora", HALF, HALF, lora=LORA, checkpointing=True, device="cpu")
    one, two = (activations_of(config, run, MicroBatch(rows, 640)) for rows in (1, 2))
    assert (one.tokens, two.tokens) == (640, 1280)
    assert one.layer == 640 * 32 * 2 and two.layer == 2 * one.layer  # a layer's input in bf16
    full = activations_of(config, Run("full", autocast=HALF, checkpointing=True), MicroBatch(1, 640))
    linear = [w.numel() for n, w in tiny.tiny_model("llama").named_parameters() if "_proj" in n]
    assert full.copies(2) == 2 * sum(linear) and full.layer == 640 * 32 * 4
    for engine in (Run("full", HALF, uniform=True, checkpointing=True), Run("full", checkpointing=True)):
        assert activations_of(config, engine, MicroBatch(1, 640)).copies(2) == 0


def test_dense_holds_a_mask_and_policies_keep_more():
    config = config_of("qwen3")

    def kept(**settings: Any) -> Any:
        return activations_of(config, Run(autocast=HALF, **settings), MicroBatch(2, 96))

    assert (
        0 <= kept(attention="dense").mask - 192 * 192 < 2000 and kept(attention="segment").mask == 0
    )  # and its integers
    whole = kept().layer
    full, attention, products = (
        kept(checkpointing=True, policy=policy).layer for policy in ("full", "attention", "products")
    )
    heads, width = 4, 8
    assert attention - full == 192 * heads * (2 * width + 4)  # the output in bf16 and a float32 for each row and head
    linear = 32 + 2 * 16 + 32 + 2 * 48 + 32  # outputs of q, k, v, o, gate, up, down
    assert products - attention == pytest.approx(2 * 192 * linear, rel=0.5)
    assert full < attention < products < whole


def test_wedlm_has_two_streams_and_a_pair_two_documents():
    config = config_of("qwen3")
    tokens = {
        objective: activations_of(config, Run(), MicroBatch(1, 96, objective)).tokens
        for objective in ("causal", "wedlm", "dpo")
    }
    assert tokens["causal"] == 96 and tokens["dpo"] == 192 and 150 < tokens["wedlm"] <= 192


def test_an_adapter_on_the_head_is_scored_as_training_scores_it():
    """Through the head's own forward, in chunks; under ZeRO-3, which gathers its parts one by one, whole."""
    config = config_of("qwen3", vocab_size=4096, hidden_size=64, tie_word_embeddings=False)
    adapted = LoraArguments(lora_rank=RANK, lora_target_modules=["q_proj", "lm_head"])
    batch, logits = MicroBatch(1, 512), 512 * 4096 * 4

    def head(mode: str = "lora", lora: LoraArguments = adapted, **settings: Any) -> Any:
        return activations_of(config, Run(mode, HALF, HALF, lora=lora, **settings), batch)

    full, frozen, found, whole = head("full"), head(lora=LORA), head(), head(partitioned=True)
    gradient = 4096 * 64 * 4
    assert full.head_kept > gradient > found.head_kept > 4 * RANK * 4096 > frozen.head_kept - 512 * 64 * 4
    assert found.head > frozen.head and found.head_backward < full.head_backward
    assert whole.head_kept > logits > found.head_kept and whole.head_backward > 2 * logits
    assert head(lora=LORA, partitioned=True).head == frozen.head  # a plain head is gathered whole
    engines = {name: Plan(config, "lora", adapted, batch=batch, engine=name, devices=2) for name in ("zero2", "zero3")}
    assert engines["zero3"].activations.head_kept > logits // 2 > engines["zero2"].activations.head_kept


def test_zero3_keeps_the_inputs_of_frozen_products():
    """It saves them whatever needs a gradient: of both norms and of the last product, in bf16; the rest is kept anyway."""
    config = config_of("qwen3", hidden_size=64, intermediate_size=160)

    def layer(mode: str, **settings: Any) -> int:
        return activations_of(config, Run(mode, HALF, lora=LORA, **settings), MicroBatch(1, 128)).layer

    assert layer("lora", partitioned=True) - layer("lora") == 2 * 128 * (64 + 64 + 160)
    assert layer("full", partitioned=True) == layer("full")
    assert layer("qlora", partitioned=True) == layer("qlora"), "bitsandbytes' products keep nothing for frozen weights"
    assert torch.nn.functional.linear.__name__ == "linear", "nothing is left behind"


@pytest.mark.parametrize("case", ["float32", "half", "frozen", "small"])
def test_onednn_adds_to_nothing(monkeypatch, case: str):
    """Two sums of the gradient of a trained float32 head stand in memory where oneDNN makes the products."""
    size = 8 if case == "small" else 64
    config = config_of("qwen3", vocab_size=4096, hidden_size=size, tie_word_embeddings=False)
    run = Run(
        "lora" if case == "frozen" else "full", autocast=HALF if case == "half" else None, lora=LORA, device="cpu"
    )
    most = []
    for faster in (True, False):
        monkeypatch.setattr(products, "onednn_is_faster", lambda faster=faster: faster)
        most.append(activations_of(config, run, MicroBatch(1, 512)).head)
    assert most[0] - most[1] == (4096 * size * 4 if case == "float32" else 0)


@pytest.mark.parametrize("kinds", [["full_attention"], ["sliding_attention", "full_attention"]])
def test_masks_stand_once_for_each_kind_of_layer(kinds: list[str]):
    def found(layers: int) -> Any:
        shape = config_of("gemma2", num_hidden_layers=layers, sliding_window=16)
        shape.layer_types = (kinds * layers)[:layers]
        return activations_of(shape, Run("full", attention="dense"), MicroBatch(1, 64))

    two, six = found(2), found(6)
    assert two == six and six.mask > 64 * 64 * len(kinds)
    one = found(1)
    assert (one.mask * len(kinds), one.layer) == (six.mask, six.layer)


def test_log_softmax_has_memory_of_its_own_on_cuda():
    config = config_of("llama")
    on = {
        device: activations_of(config, Run("full", device=device), MicroBatch(1, 64)).head for device in ("cpu", "cuda")
    }
    assert on["cuda"] - on["cpu"] == 63 * config.vocab_size * 4


@pytest.mark.parametrize(
    "family", ["gpt_neox", "bloom", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba2"]
)
def test_other_families_are_counted(family: str):
    shape = config_of(family)
    found = activations_of(shape, Run("full", autocast=HALF), MicroBatch(1, 32))
    assert found.layer > 0 and found.head > 0 and found.backward > 0


# --- the peak -----------------------------------------------------------------------------------------------------------

SMALL = {**memory_error.QWEN, "num_hidden_layers": 3, "hidden_size": 128, "head_dim": 16, "vocab_size": 2048}
CASES = [
    memory_error.Case("full", SMALL, length=256),
    memory_error.Case("first layer", {**SMALL, "num_hidden_layers": 6}, length=256, checkpointing=True),
    memory_error.Case(
        "last layer", {**SMALL, "vocab_size": 512}, mode="lora", length=1024, checkpointing=True, accumulation=2
    ),
    memory_error.Case("accumulated", SMALL, length=256, accumulation=2, checkpointing=True),
    memory_error.Case(
        "lora", {**SMALL, "vocab_size": 512}, mode="lora", length=512, checkpointing=True, policy="products"
    ),
    memory_error.Case("wedlm", SMALL, objective="wedlm", length=256, backend="dense", precision=None),
    memory_error.Case("head adapted", SMALL, mode="lora", length=512, adapted=("q_proj", "lm_head")),
    memory_error.Case("step", {**SMALL, "vocab_size": 32000}, length=8, optim="adamw_torch"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_estimate_is_near_the_peak_of_a_real_step(case: Any, tmp_path: Path):
    watch = memory_error._Watch(0)
    memory_error.train(case, tmp_path, watch)
    assert watch.peak is not None
    found = estimate(memory_error.planned(case, "cpu"))
    at_head = found.moment == "scoring of the head" and case.objective == "causal"
    # Elsewhere a layer's own gradients are counted as temporaries as well; WeDLM has the noise of eight blocks.
    assert found.total == pytest.approx(watch.peak, rel=0.005 if at_head else 0.06)
    if case.name == "step":
        assert found.moment == "optimizer step"
    if case.name.endswith("layer"):
        assert found.moment == f"backward pass, {case.name}"


def test_the_estimate_is_near_the_peak_of_an_evaluation(tmp_path: Path):
    case = memory_error.Case("evaluation", SMALL, length=256)
    ids = torch.arange(2, 258).tolist()
    rows = [{"input_ids": ids, "labels": ids}] * 6
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=6,
        bf16=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model, data = memory_error.load(case, tmp_path / "model"), DataArguments(max_seq_length=256)
    trainer = SFTTrainer(model, args, eval_dataset=rows, data_args=data, attention_backend="segment")
    with LiveBytes(memory_error.tensors_of(trainer.model)) as live:
        trainer.evaluate()
    said = estimate(replace(memory_error.planned(case, "cpu"), eval_rows=6)).moments["evaluation"]
    assert said["batch of the evaluation"] == pytest.approx(live.most, rel=0.03)


def test_the_record_of_the_error_is_below_a_tenth():
    assert {row["case"] for row in ERRORS["cases"]} == {case.name for case in memory_error.CASES}
    assert max(abs(row["error"]) for row in ERRORS["cases"]) < 0.1


def test_what_stands_beside_the_model():
    plan = Plan(config_of("qwen3"), batch=MicroBatch(1, 64), device="cpu")
    plain = estimate(plan)
    trained = plan.state.trained

    def more(**changes: Any) -> Any:
        return estimate(Plan(plan.config, **{"batch": plan.batch, "device": "cpu", **changes}))

    assert more(average="device").total - plain.total == 4 * trained
    assert more(average="host").total == plain.total
    assert more(engine="ddp", devices=2).total - plain.total == 4 * trained
    assert more(batch=MicroBatch(1, 64, "dpo"), reference=True).parts["reference model"] == 4 * trained
    away = more(engine="zero2", devices=2, offload_optimizer=True)
    assert "optimizer" not in away.parts and away.host == 12 * trained // 2 + 2 * trained // 2
    assert more(eval_rows=50).moment == "evaluation"


def test_a_card_keeps_room_for_what_is_not_counted():
    assert fits(70 * 2**30, 80) and not fits(71 * 2**30, 80)


def test_nf4_counts_odd_sizes():
    assert nf4_bytes(torch.empty(65)) == 33 + 2 + 1024 + 4 + 4 + 64
    assert nf4_bytes(torch.empty(65), double=False) == 33 + 8 + 64


# --- the docs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page, name", [("memory", "models"), ("memory", "activations"), ("recipes", "files")])
def test_the_tables_of_the_docs_are_those_of_the_record(page: str, name: str):
    text = (runs.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- benchmarks/memory.py: {name} -->\n\n(.*?)\n\n", text, re.DOTALL)
    rows = RECORD["files" if name == "files" else "models"]
    assert shown == getattr(memory, f"{name}_table")(rows)


def test_the_table_of_errors_is_that_of_the_record():
    text = (runs.ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- benchmarks/memory_error.py -->\n\n(.*?)\n\n", text, re.DOTALL)
    assert shown == memory_error.table(ERRORS["cases"])


def test_the_record_is_what_the_script_finds():
    assert [row["file"] for row in RECORD["files"]] == [path.stem for path in memory.ready_files()]
    every = dict(zip(memory.ready_files(), RECORD["files"], strict=True))
    for path, row in every.items():
        if path.stem in ("gemma-2b-sft-qlora", "llama3.1-8b-sft-fsdp", "wedlm-8b-sft-full-zero2"):
            assert row == memory.measure_file(path)
    (row,) = (row for row in RECORD["models"] if row["model"] == "Qwen/Qwen3-0.6B")
    assert row == memory.measure_model("Qwen/Qwen3-0.6B")
