"""The flash backend: cumulative lengths, windows and the calls of the kernels; definitions in plain torch stand in for those.

On a machine with a GPU the last tests run the kernels themselves.
"""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import pytest
import tiny
import torch
from layouts import attended, brute_force, edge_lengths, packed, tokens
from torch import Tensor
from torch.nn.attention import varlen

from hf_sft import DataArguments, SFTTrainer, TrainingArguments
from hf_sft.attention import flash, selfcheck
from hf_sft.attention.backends import backend_named
from hf_sft.attention.layout import Layout
from hf_sft.attention.selfcheck import check_backend, choose_layout

FLASH = backend_named("flash")
LENGTHS = [5, 1, 30, 12]


def documents_apart(
    q: Tensor, k: Tensor, v: Tensor, cumulative: Tensor, window: tuple[int, int], scale: float, cap: float
):
    """What the kernels compute, [T, H, E]: each stretch of ``cumulative`` by itself; -1 in a window is no limit."""
    assert cumulative.dtype == torch.int32 and cumulative[0] == 0 and cumulative[-1] == len(q)
    assert q.shape[-1] % 8 == 0 and q.shape[-1] == k.shape[-1] == v.shape[-1], "widths that kernels take"
    shared, outputs = q.shape[1] // k.shape[1], []
    for start, end in zip(cumulative[:-1].tolist(), cumulative[1:].tolist(), strict=True):
        keys, values = (x[start:end].repeat_interleave(shared, 1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[start:end], keys) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        hidden = ahead > window[1] if window[1] >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
        hidden = hidden | (-ahead > window[0]) if window[0] >= 0 else hidden
        outputs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):  # fmt: skip
    assert cu_seq_q is cu_seq_k and max_q == max_k == int(cu_seq_q.diff().max()) and type(max_q) is int
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return documents_apart(query, key, value, cu_seq_q, window_size, scale, 0.0)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
):  # fmt: skip
    assert causal and softcap and max_seqlen_q == int(cu_seqlens_q.diff().max()) and not dropout_p
    return documents_apart(q, k, v, cu_seqlens_q, (window_size[0], 0), softmax_scale, softcap)


@pytest.fixture
def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash, "_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(flash, "_DTYPES", (torch.bfloat16, torch.float16, torch.float32, torch.float64))


def learned(family: str, name: str, dtype: torch.dtype, **config: Any) -> list[Tensor]:
    """Logits and gradients of one pack on one backend."""
    batch, model = packed("causal", LENGTHS, 8), tiny.tiny_model(family, **config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # weights large enough that attention matters
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    backend = backend_named(name)
    backend.install(model)
    inputs = backend.inputs(model, Layout.from_batch(batch))
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs).logits
    logits.float().log_softmax(-1)[0, ::2, 3].sum().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "family, config",
    [("llama", {}), ("qwen3", {"head_dim": 12}), ("mistral", {}), ("gemma2", {"attn_logit_softcapping": 0.5})],
)
def test_models_learn_what_they_learn_on_segments(stand_in, family, config, dtype, tolerance) -> None:
    """Heads of 12 are padded to 16; Mistral has a window of 7, Gemma 2 one in every other layer, and a soft cap."""
    tolerance = max(tolerance, 1e-6) if family == "gemma2" else tolerance  # its softmax is in float32 on segments
    for got, want in zip(
        learned(family, "flash", dtype, **config), learned(family, "segment", dtype, **config), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("window", [None, 1, 7, 30, 31])
def test_windows_and_borders_are_those_of_the_rule(stand_in, window: int | None) -> None:
    for lengths in (LENGTHS, edge_lengths(4), [1]):
        layout, row = Layout.from_batch(packed("causal", lengths, 4)), tokens("causal", lengths, 4)
        # Values are unit vectors, wider than the heads: the kernel is called at their width, rounded up.
        seen = attended(flash.flash_attention, len(row), sliding_window=window, hf_sft_layout=layout)
        assert torch.equal(seen, brute_force(row, window)) and torch.equal(seen, layout.allowed(window))


def test_borders_are_made_once_per_micro_batch(stand_in, monkeypatch) -> None:
    made, make = [], flash._borders
    monkeypatch.setattr(flash, "_borders", lambda layout: made.append(layout) or make(layout))
    model, batch = tiny.tiny_model("llama"), packed("causal", LENGTHS, 4)
    FLASH.install(model)
    inputs = FLASH.inputs(model, layout := Layout.from_batch(batch))
    assert len(made) == 1, "before the first layer runs"
    model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)
    assert len(made) == 1
    assert flash.document_borders(layout).cumulative.tolist() == [0, 5, 6, 36, 48]
    assert flash.document_borders(layout).longest == 30


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_selfcheck_passes(stand_in, family: str) -> None:
    verdict = check_backend(tiny.tiny_model(family), FLASH)
    assert verdict.passed, verdict.reason


def test_the_selfcheck_finds_wrong_borders(stand_in, monkeypatch) -> None:
    monkeypatch.setattr(flash, "_borders", lambda layout: flash.Borders(torch.tensor([0, 41], dtype=torch.int32), 41))
    assert "see each other" in check_backend(tiny.tiny_model("llama"), FLASH).reason


def test_without_a_layout_it_runs_like_sdpa() -> None:
    model, ids = tiny.tiny_model("llama"), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [7] * 9])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **options)
    FLASH.install(model)
    assert model.generate(ids, **options).tolist() == want.tolist()


# --- refusals ---------------------------------------------------------------------------------------------------------


def call(dtype: torch.dtype = torch.bfloat16, width: int = 8, kind: str = "causal", **options: Any) -> None:
    layout = Layout.from_batch(packed(kind, [3], 4))
    x = torch.zeros(1, 1, len(layout.doc), width, dtype=dtype)
    flash.flash_attention(torch.nn.Identity(), x, x, x, None, hf_sft_layout=layout, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dropout": 0.1}, r"attention dropout is 0\.1, and the flash backend has none: set attention_dropout to 0"),
        ({"s_aux": torch.zeros(1)}, "no attention sinks: choose attention_backend segment or dense"),
        ({"kind": "elided"}, "cannot be told which block of the noisy stream sees what"),
        ({"dtype": torch.float32}, "bfloat16 and float16 alone, and queries are torch.float32: set bf16 to true"),
        ({"width": 264}, "heads are 264 wide, and flash kernels take up to 256: choose"),
    ],
)
def test_what_kernels_lack_is_refused(monkeypatch, options: dict[str, Any], words: str) -> None:
    monkeypatch.setattr(flash, "_DEVICES", ("cuda", "cpu"))
    with pytest.raises(ValueError, match=words):
        call(**options)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="runs on CUDA alone, and the model is on cpu: choose"):
        call()
    with pytest.raises(
        ValueError, match="attention_backend is flash and the training is on a CPU, where flash kernels do not run"
    ):
        choose_layout(tiny.tiny_model("llama"), "flash")


def test_models_that_kernels_cannot_run_are_refused_at_once(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        FLASH.install(tiny.tiny_model("llama", attention_dropout=0.1))
    with pytest.raises(ValueError, match="heads are 512 wide"):
        FLASH.install(tiny.tiny_model("llama", head_dim=512))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(
        ValueError, match=r"varlen_attn cannot, and the flash-attn package is not there.*pip install flash-attn"
    ):
        FLASH.install(tiny.tiny_model("gemma2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 \(Ampere\) or newer: choose"):
        FLASH.install(tiny.tiny_model("llama"))


def test_releases_that_cannot_say_it_are_refused(stand_in, monkeypatch) -> None:
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None: query
    )
    with pytest.raises(ValueError, match="does not take window_size, enable_gqa: update it, or choose"):
        FLASH.install(tiny.tiny_model("llama"))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ValueError, match=r"needs torch 2\.11 or later"):
        FLASH.install(tiny.tiny_model("llama"))
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", lambda q, k, v, causal, window_size: q)
    with pytest.raises(ValueError, match="this release of flash-attn does not take softcap, deterministic"):
        flash.load_flash_attn()


# --- the choice -------------------------------------------------------------------------------------------------------


def test_auto_prefers_flash_on_cuda(stand_in, monkeypatch) -> None:
    base = types.SimpleNamespace(device=torch.device("cuda"))
    assert selfcheck._candidates(base, wedlm=False) == ("flash", "segment", "dense")
    assert selfcheck._candidates(base, wedlm=True) == ("flex", "segment", "dense")
    assert selfcheck._candidates(types.SimpleNamespace(device=torch.device("cpu")), wedlm=False) == ("segment", "dense")
    monkeypatch.setattr(selfcheck, "_candidates", lambda base, wedlm: ("flash", "segment", "dense"))
    choice = choose_layout(tiny.tiny_model("llama"), autocast=True)
    assert choice.name == "flash" and "packed and apart differ by" in choice.reason
    choice = choose_layout(tiny.tiny_model("llama"))
    assert choice.name == "segment"
    assert (
        "flash: its kernels take bfloat16 and float16 alone, and the model computes in float32; set bf16"
        in choice.reason
    )
    assert choose_layout(tiny.tiny_model("llama").bfloat16()).name == "flash"
    monkeypatch.setattr(selfcheck, "_NOT_ON_CPU", {})
    with pytest.raises(
        ValueError, match=r"attention_backend is flash: its kernels take bfloat16.*or choose segment or dense"
    ):
        choose_layout(tiny.tiny_model("llama"), "flash")


def test_a_training_runs_on_it(stand_in, monkeypatch, tmp_path) -> None:
    """bf16 is what makes a float32 model fit for the kernels, and evaluation computes in it as well."""
    monkeypatch.setattr(selfcheck, "_NOT_ON_CPU", {})
    monkeypatch.setattr(flash, "_DTYPES", (torch.bfloat16,))
    losses = {}
    for backend in ("segment", "flash"):
        args = TrainingArguments(
            str(tmp_path), max_steps=2, bf16=True, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True
        )
        trainer = SFTTrainer(
            tiny.tiny_model("qwen3"), args, train_dataset=tiny.conversations(12), eval_dataset=tiny.conversations(3),
            processing_class=tiny.tiny_tokenizer(), data_args=DataArguments(max_seq_length=128), attention_backend=backend,
        )  # fmt: skip
        assert trainer.layout.name == backend
        trainer.train()
        losses[backend] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        losses[backend].append(trainer.evaluate()["eval_loss"])
    assert losses["flash"] == pytest.approx(losses["segment"], rel=2e-3)
    with pytest.raises(ValueError, match="the model computes in float32; set bf16 to true"):
        SFTTrainer(tiny.tiny_model("qwen3"), TrainingArguments(str(tmp_path), use_cpu=True), attention_backend="flash")


def test_torchs_kernel_is_called_by_its_names() -> None:
    """A release that renames what is called here must be noticed without a GPU."""
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {name: parameters[name].default for name in ("scale", "window_size", "enable_gqa")} == {
        "scale": None, "window_size": (-1, -1), "enable_gqa": False,
    }  # fmt: skip
    schema = torch.ops.torch_attn._varlen_attn.default._schema
    assert schema.name == "torch_attn::_varlen_attn", "the name by which activation checkpointing keeps its output"


# --- the kernels themselves -------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU or newer"
)


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_auto_takes_the_kernel(family: str) -> None:
    choice = choose_layout(tiny.tiny_model(family).cuda(), autocast=True)
    assert choice.name == "flash", choice.reason


@needs_gpu
@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_against_segments(window: int | None) -> None:
    layout = Layout.from_batch({key: value.cuda() if isinstance(value, Tensor) else value
                                for key, value in packed("causal", [100, 1, 300], 8).items()})  # fmt: skip
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 401, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    found = []
    for name in ("segment", "flash"):
        rows = [x.clone().requires_grad_() for x in (q, k, v)]
        function = type(backend_named(name)).function
        output, _ = function(torch.nn.Identity(), *rows, None, sliding_window=window, hf_sft_layout=layout)
        output.float().square().sum().backward()
        found.append([output, *(row.grad for row in rows)])
    for want, got in zip(*found, strict=True):
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()
