"""oneDNN's products are those of the BLAS, in the context alone, and only where they suit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from hf_sft import products
from hf_sft.losses import score_rows


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def machine(request, monkeypatch):
    """A machine of either kind, whatever this one is; gives the calls of oneDNN that it should have seen, or None."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    calls: list[tuple[int, ...]] = []
    product = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda a, b, *bias: calls.append(a.shape) or product(a, b, *bias))
    return calls if request.param else None


def learned(layer: nn.Linear, rows: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    rows = rows.detach().requires_grad_()
    output = layer(rows)
    output.square().mean().backward()
    return [output.detach(), rows.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_layers_compute_the_same_inside_and_as_before_outside(machine, bias):
    torch.manual_seed(0)
    layer, rows = nn.Linear(192, 160, bias=bias), torch.randn(2, 96, 192)
    before, want = learned(layer, rows), learned(layer.double(), rows.double())
    layer.float()
    with products.fast_products():
        with products.fast_products():
            inside = learned(layer, rows)
        assert all(torch.equal(a, b) for a, b in zip(learned(layer, rows), inside, strict=True))
    for got, wanted in zip(inside, want, strict=True):
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    assert all(torch.equal(a, b) for a, b in zip(learned(layer, rows), before, strict=True))
    assert machine is None or len(machine) == 6  # forward and two gradients, twice


def test_the_kernel_is_given_back_after_an_error(machine):
    left, right = torch.randn(128, 128), torch.randn(128, 128)
    before = torch.mm(left, right)
    with pytest.raises(KeyError), products.fast_products():
        raise KeyError
    assert torch.equal(torch.mm(left, right), before) and not products._library


@pytest.mark.parametrize(
    "left, right",
    [
        (torch.randn(0, 128), torch.randn(128, 128)),
        (torch.randn(128, 0), torch.randn(0, 128)),
        (torch.randn(1, 2048), torch.randn(2048, 2048)),
        (torch.randn(4, 4), torch.randn(4, 4)),
        (torch.randn(128, 128, dtype=torch.float64), torch.randn(128, 128, dtype=torch.float64)),
        (torch.randn(128, 128).bfloat16(), torch.randn(128, 128).bfloat16()),
        (torch.ones(128, 128, dtype=torch.int64), torch.ones(128, 128, dtype=torch.int64)),
        (torch.randn(128, 128, device="meta"), torch.randn(128, 128, device="meta")),
    ],
)
def test_what_does_not_suit_goes_to_the_blas_to_the_bit(machine, left, right):
    assert not products.suits(left, right)
    want = torch.mm(left, right)
    with products.fast_products():
        got = torch.mm(left, right)
        added = torch.addmm(left.new_ones(right.shape[1]), left, right, beta=2, alpha=3)
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    if left.device.type != "meta":
        assert torch.equal(got, want)
        assert torch.equal(added, torch.addmm(left.new_ones(right.shape[1]), left, right, beta=2, alpha=3))


def test_shapes_that_do_not_fit_are_torchs_own_error(machine):
    with products.fast_products(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.mm(torch.randn(200, 300), torch.randn(200, 300))


@pytest.mark.parametrize("strided", [False, True])
def test_products_of_any_strides(machine, strided):
    left, right = torch.randn(160, 130), torch.randn(130, 140)
    if strided:
        left, right = left.t().contiguous().t(), torch.randn(130, 280)[:, ::2]
    want = left.double() @ right.double()
    assert (products.product(left, right) - want).norm() <= 1e-6 * want.norm()
    with products.fast_products():
        assert (torch.mm(left, right) - want).norm() <= 1e-6 * want.norm()
    room = torch.empty(200, 140)
    assert (products.product(left, right, room) - want).norm() <= 1e-6 * want.norm()


BIASES = {
    "every other number": torch.randn(320)[::2],
    "one number for all": torch.randn(1).expand(160),
    "a single number": torch.randn(1),
    "a matrix": torch.randn(140, 160),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_a_bias_of_any_strides_is_added_as_it_is(machine, bias):
    left, right = torch.randn(140, 130), torch.randn(130, 160)
    want = bias.double() + left.double() @ right.double()
    with products.fast_products():
        got = torch.addmm(bias, left, right)
        with pytest.raises(RuntimeError, match=r"expand|size"):
            torch.addmm(torch.randn(7), left, right)
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_rows_that_overlap_and_vectors_are_torchs(machine):
    windows = torch.randn(1000).as_strided((512, 128), (1, 2))
    rows = torch.randn(256, 512)
    want = torch.mm(rows, windows)
    with products.fast_products():
        assert torch.equal(torch.mm(rows, windows), want)
        with pytest.raises(RuntimeError, match="mat2 must be a matrix"):
            torch.mm(rows, torch.randn(512))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.suits(torch.randn(200, 200), torch.randn(200, 200))


def with_gaps(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, 2 * columns)[:, :columns]


@pytest.mark.parametrize(
    "left, right",
    [
        (torch.randn(160, 130), with_gaps(130, 140)),
        (torch.randn(160, 130), with_gaps(140, 130).t()),
        (with_gaps(160, 130), torch.randn(130, 140)),
    ],
)
def test_matrices_with_gaps_between_their_rows_are_torchs(machine, left, right):
    """oneDNN would take a thousand times as long for them."""
    want = torch.mm(left, right)
    with products.fast_products():
        assert torch.equal(torch.mm(left, right), want)
    assert not machine


SHAPES = """
import os, re, torch
from pathlib import Path
from hf_sft import products

def resident() -> float:
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024

weight = torch.randn(256, 512)
torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16()  # oneDNN is in use before training begins
with products.fast_products():
    for rows in range(1000, 1100):
        torch.randn(rows, 256) @ weight
    before = resident()
    for rows in range(1100, 1400):
        torch.randn(rows, 256) @ weight
print(resident() - before, os.environ["LRU_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(not products.onednn_is_faster(), reason="this machine's products are the BLAS's")
def test_kernels_of_ever_new_shapes_do_not_pile_up():
    """Packs differ in length, and oneDNN would keep a kernel of each length."""
    own = {name: value for name, value in os.environ.items() if name not in products._CACHES}
    done = subprocess.run([sys.executable, "-c", SHAPES], env=own, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    grown, kept = done.stdout.split()
    assert float(grown) < 120 and int(kept) == 16  # MiB; 300 and more with oneDNN's own 1,024


def test_contexts_of_several_threads_end_together(machine):
    with products.fast_products():
        other = products.fast_products()
        threads = [threading.Thread(target=other.__enter__), threading.Thread(target=other.__exit__, args=(None,) * 3)]
        threads[0].start(), threads[0].join()
        assert machine is None or products._depth == 2
    assert bool(products._library) == (machine is not None)
    threads[1].start(), threads[1].join()
    assert not products._library and products._depth == 0


def test_the_head_scores_the_same_rows(machine):
    """Chunks of 40, 40 and 5 rows: the last is too small for oneDNN."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(85, 64), torch.randn(600, 64) * 0.1
    target, row_weight = torch.randint(600, (85,)), torch.rand(85)
    found = {}
    for dtype in (torch.float32, torch.float64):
        rows, head = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        scores = score_rows(rows, head, None, target, row_weight, chunk_rows=40)
        scores.loss.backward()
        found[dtype] = [scores.loss.detach(), scores.nll, rows.grad, head.grad]
        assert head.grad.is_contiguous()
    for got, want in zip(*found.values(), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_the_machine_is_told_by_its_processor_alone(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "Path", lambda name: cpuinfo)
    told = {"AuthenticAMD\nflags: avx2": True, "GenuineIntel\nflags: avx2": False, "AuthenticAMD\nflags: sse": False}
    for text, faster in told.items():
        cpuinfo.write_text(f"vendor_id : {text}\n")
        products.onednn_is_faster.cache_clear()
        libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        assert products.onednn_is_faster() == (faster and libraries)
    cpuinfo.unlink()
    products.onednn_is_faster.cache_clear()
    assert not products.onednn_is_faster()
    monkeypatch.undo()
    products.onednn_is_faster.cache_clear()
