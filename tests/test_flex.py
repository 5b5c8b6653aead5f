"""FlexAttention: tile lists against the rule, and forward passes on a CPU against the dense mask."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import tiny
import torch
from layouts import KINDS, brute_force, edge_lengths, noisy_collator, packed, token_rows, tokens
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hf_sft import DataArguments, SFTTrainer, TrainingArguments
from hf_sft.attention import flex
from hf_sft.attention.backends import backend_named
from hf_sft.attention.layout import Layout
from hf_sft.attention.selfcheck import Choice, check_backend
from hf_sft.attention.tiles import TILE, padded_length, tile_lists, tile_table
from hf_sft.collators import CausalCollator, HostParts
from hf_sft.data.bins import BinLoader

FLEX = backend_named("flex")
# The unfused kernel says that it is slow; that is known.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LONG = [1, 130, 400, 97, 255]  # several tiles, with borders of documents inside of them


def tile_counts(allowed: torch.Tensor, padded: int) -> np.ndarray:
    """[n, n] allowed pairs per tile of the padded row; padding sees itself."""
    length = len(allowed)
    whole = torch.eye(padded, dtype=torch.bool)
    whole[:length, :length] = allowed
    return whole.view(padded // TILE, TILE, padded // TILE, TILE).sum((1, 3)).numpy()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [4, 8])
def test_tile_lists_and_rule_give_the_allowed_pairs(block_size: int, kind: str, window: int | None) -> None:
    for lengths in [edge_lengths(block_size), *([length] for length in edge_lengths(block_size))]:
        row = tokens(kind, lengths, block_size)
        layout = Layout.from_batch(packed(kind, lengths, block_size))
        mask = flex.block_mask(layout, window)
        padded = mask.shape[-1]
        table = tile_table(layout, padded, window)
        index = torch.arange(padded)
        rule = mask.mask_mod(None, None, index[:, None], index[None, :])
        partial, full = (torch.from_numpy(tiles).kron(torch.ones(TILE, TILE)).bool() for tiles in table)
        want = brute_force(row, window)
        assert torch.equal((full | (partial & rule))[: len(row), : len(row)], want)
        # What the kernel walks are these tables.
        for tiles, counts, indices in [
            (table.partial, mask.kv_num_blocks, mask.kv_indices),
            (table.full, mask.full_kv_num_blocks, mask.full_kv_indices),
        ]:
            listed = np.zeros_like(tiles)
            for q, count in enumerate(counts[0, 0].tolist()):
                listed[q, indices[0, 0, q, :count].numpy()] = True
            assert (listed == tiles).all()


@pytest.mark.parametrize("block_size", [4, 32, 200])
@pytest.mark.parametrize("window", [None, 1, 100, 255, 600])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LONG, [1200]])
def test_full_tiles_are_full_and_few_tiles_are_empty(
    lengths: list[int], kind: str, window: int | None, block_size: int
) -> None:
    for seed in range(3):
        layout = Layout.from_batch(packed(kind, lengths, block_size, seed))
        padded = padded_length(len(layout.doc))
        count = tile_counts(layout.allowed(window), padded)
        partial, full = tile_table(layout, padded, window)
        assert not (partial & full).any()
        assert (count[full] == TILE * TILE).all()
        assert (count[~(partial | full)] == 0).all()
        if kind == "causal":
            assert ((partial | full) == (count > 0)).all() and (full == (count == TILE * TILE)).all()
        # The host knows the limits of a group's rows up to the span of their anchors, on each of the tiles it stands in.
        span = 0
        for length, groups in layout.pieces or []:
            for group in groups:
                spread = min(length, group.clean + group.length) - group.lower
                span += (spread // TILE + 2) * (group.length // TILE + 2)
        assert (partial | full).sum() - (count > 0).sum() <= span
        assert (count == TILE * TILE).sum() - full.sum() <= span


def test_long_documents_have_mostly_full_tiles() -> None:
    layout = Layout.from_batch(packed("elided", [3000, 1500], 32))
    padded = padded_length(len(layout.doc))
    partial, full = tile_table(layout, padded)
    count = tile_counts(layout.allowed(), padded)
    needed, really_full = (count > 0).sum(), (count == TILE * TILE).sum()
    assert (partial | full).sum() <= 1.1 * needed
    assert full.sum() >= 0.85 * really_full
    assert full.sum() > partial.sum()


def test_rows_are_padded_to_few_lengths() -> None:
    lengths = [padded_length(length) for length in range(1, 40_000)]
    for length, padded in enumerate(lengths, start=1):
        assert padded % TILE == 0 and length <= padded < max(length + TILE, 1.25 * length + 1)
    for power in range(11, 16):
        assert len({padded for padded in lengths if 2 ** (power - 1) < padded <= 2**power}) == 4


@pytest.mark.parametrize("family, kinds", [("llama", 1), ("mistral", 1), ("gemma2", 2)])
def test_tiles_are_listed_once_per_micro_batch_and_kind_of_layer(family: str, kinds: int, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(flex, "tile_lists", lambda *args: made.append(args) or tile_lists(*args))
    model, batch = tiny.tiny_model(family), packed("elided", [9, 4], 4)
    FLEX.install(model)
    inputs = FLEX.inputs(model, Layout.from_batch(batch))
    assert len(made) == kinds, "before the first layer runs"
    with torch.no_grad():
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)
    assert len(made) == kinds


def made_by_workers(model, kind: str, lengths: list[int], seed: int = 0) -> dict:
    """The batch as a loader's worker makes it."""
    collator = CausalCollator() if kind == "causal" else noisy_collator(kind, 8, seed)
    return HostParts(collator, FLEX.host_part(model))([token_rows(lengths, seed)])


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_workers_give_the_same_masks(kind: str, monkeypatch) -> None:
    model = tiny.tiny_model("gemma2")
    batch, own = made_by_workers(model, kind, LONG), packed(kind, LONG, 8)
    assert set(batch["tile_lists"]) == {None, 7} and "tile_lists" not in own
    batch = pickle.loads(pickle.dumps(batch))
    for window in (None, 7):
        want = flex.block_mask(Layout.from_batch(own), window)
        with monkeypatch.context() as patch:
            patch.setattr(flex, "tile_lists", None)  # made already
            got = flex.block_mask(Layout.from_batch(batch), window)
        assert torch.equal(got.to_dense(), want.to_dense()) and got.shape == want.shape
        # The lists for the backward pass are those that torch transposes from the others.
        listed = BlockMask.from_kv_blocks(
            got.kv_num_blocks, got.kv_indices, got.full_kv_num_blocks, got.full_kv_indices, seq_lengths=got.seq_lengths
        )
        for name in ("q", "full_q"):
            counts, tiles = (getattr(got, f"{name}_{part}") for part in ("num_blocks", "indices"))
            assert counts.is_contiguous() and tiles.is_contiguous() and tiles.dtype == counts.dtype == torch.int32
            assert torch.equal(counts, getattr(listed, f"{name}_num_blocks"))
            for key, count in enumerate(counts[0, 0].tolist()):
                assert torch.equal(tiles[0, 0, key, :count], getattr(listed, f"{name}_indices")[0, 0, key, :count])


def test_a_model_runs_on_the_lists_of_workers() -> None:
    model = sharp_model("mistral")
    want = logits_of(model, "flex", packed("elided", [1, 23, 6, 90], 8))
    assert torch.equal(logits_of(model, "flex", made_by_workers(model, "elided", [1, 23, 6, 90])), want)


def test_a_trainer_has_them_made_by_its_workers(tmp_path) -> None:
    model = tiny.tiny_model("mistral")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=2)
    trainer = SFTTrainer(model, args, train_dataset=tiny.conversations(8), processing_class=tiny.tiny_tokenizer(),
                         data_args=DataArguments(max_seq_length=128))  # fmt: skip
    assert not any("tile_lists" in batch for batch in trainer.get_train_dataloader()), (
        "other backends do not pay for it"
    )
    trainer.layout = Choice(FLEX, "a CPU does not train with it")
    trainer._read_model(model, trainer.processing_class, args)
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    assert batches and isinstance(trainer.get_train_dataloader(), BinLoader)
    for batch in batches:
        assert torch.equal(batch["tile_lists"][7], tile_lists(Layout.from_batch(batch), 7))
        assert "tile_lists" not in trainer._model_inputs(batch)


def logits_of(model, name: str, batch) -> torch.Tensor:
    backend = backend_named(name)
    backend.install(model)
    inputs = backend.inputs(model, Layout.from_batch(batch))
    with torch.no_grad():
        return model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs).logits


def sharp_model(family: str, **options):
    """Weights large enough that attention matters."""
    model = tiny.tiny_model(family, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model.eval()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_forward_on_cpu_agrees_with_dense(family: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    batch = packed(kind, [1, 23, 6, 90, 2], 8)
    model = sharp_model(family).to(dtype)
    dense, got = logits_of(model, "dense", batch), logits_of(model, "flex", batch)
    torch.testing.assert_close(got, dense, rtol=0, atol=tolerance * dense.abs().max().item())


def test_two_kinds_of_layers_and_a_soft_cap() -> None:
    batch = packed("elided", [1, 23, 60], 8)
    want_model = sharp_model("gemma2", attn_logit_softcapping=0.5).double()
    want_model.set_attn_implementation("eager")  # sdpa knows no soft cap
    want = logits_of(want_model, "dense", batch)
    got = logits_of(sharp_model("gemma2", attn_logit_softcapping=0.5).double(), "flex", batch)
    # Gemma 2's own attention takes its softmax in float32.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * want.abs().max().item())


def test_autocast() -> None:
    """Qwen3's norms leave queries and keys in float32 where values are bfloat16."""
    batch, model = packed("elided", [1, 23, 60], 8), sharp_model("qwen3")
    with torch.autocast("cpu", torch.bfloat16):
        want, got = logits_of(model, "dense", batch), logits_of(model, "flex", batch)
    assert (got - want).abs().max() <= 3e-2 * (want.max() - want.min())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_the_selfcheck_passes(family: str) -> None:
    verdict = check_backend(tiny.tiny_model(family), FLEX)
    assert verdict.passed, verdict.reason


def test_training_on_a_cpu_is_refused() -> None:
    model, batch = tiny.tiny_model("llama"), packed("causal", [3, 4], 4)
    FLEX.install(model)
    inputs = FLEX.inputs(model, Layout.from_batch(batch))
    with pytest.raises(ValueError, match="no backward pass on a CPU: train with attention_backend segment or dense"):
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)


def test_a_kernel_is_compiled_once_per_length_and_window(monkeypatch) -> None:
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_kernel", lambda device: compiled)
    q = torch.zeros(1, 2, 700, 8)

    def run(lengths: list[int], window: int | None, seed: int) -> None:
        layout = Layout.from_batch(packed("elided", lengths, 8, seed))
        x = q[:, :, : len(layout.doc)]
        assert padded_length(len(layout.doc)) == 256
        flex.flex_layout_attention(torch.nn.Identity(), x, x, x, None, sliding_window=window, hf_sft_layout=layout)

    for seed in range(4):
        run([20, 90], None, seed)
        run([3, 100, 10], None, seed)
    assert counter.frame_count == 1
    run([20, 90], 7, 0)
    run([20, 80, 3], 7, 1)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="compiling for a CPU needs a C++ compiler"
)
@pytest.mark.parametrize("window", [None, 100])
def test_the_fused_kernel_reads_the_tile_lists(window: int | None, monkeypatch) -> None:
    """The unfused path evaluates the rule everywhere; the compiled one walks the lists, and trusts full tiles."""
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "_kernel", lambda device: compiled)
    torch.manual_seed(0)
    for kind in KINDS:
        layout = Layout.from_batch(packed(kind, LONG, 32))
        q, k, v = (torch.randn(1, heads, len(layout.doc), 16) for heads in (4, 2, 2))
        got, _ = flex.flex_layout_attention(
            torch.nn.Identity(), q, k, v, None, sliding_window=window, hf_sft_layout=layout
        )
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=layout.allowed(window), enable_gqa=True
        )
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=2e-6)
