"""Products of float32 matrices on CPUs where oneDNN is faster than the BLAS of PyTorch.

PyTorch's builds for x86 hand float32 products to MKL, which keeps its fast kernels to Intel's processors. oneDNN, which the same
builds bring along, compiles its kernels for the instructions that are there: on an AMD EPYC with AVX-512 it multiplies at twice
MKL's rate (``benchmarks/causal_step.py`` measures both). The sums are float32 in both, in another order.

Which of the two is taken depends on the machine and on shapes alone, never on a measurement: a run that goes on computes what it
would have computed.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

# oneDNN compiles a kernel for every shape, of float32 and of bf16, and keeps 1,024 in each of two caches, 1 to 4 MB apiece, while
# rows of packs are ever of another number. These suffice for the layers of a step; they are read with a process's first product.
_CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
for _name, _value in _CACHES.items():
    os.environ.setdefault(_name, _value)

# Below this a product is done before a call from Python would pay; both sizes are numbers, not bytes.
_SMALLEST_SIDE, _SMALLEST_WORK = 16, 1 << 20


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products of this machine go to oneDNN: an x86 processor with AVX2 that is not Intel's, and a build that
    has both libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and cpuinfo.is_file()):
        return False
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "avx2" in text and "vendor_id" in text and "GenuineIntel" not in text


def suits(left: Tensor, right: Tensor) -> bool:
    """Whether ``left`` [M, K] times ``right`` [K, N] goes to oneDNN: float32 on such a CPU, and large enough."""
    if not (_is_plain(left, 2) and _is_plain(right, 2) and torch.backends.mkldnn.enabled):
        return False
    (rows, inner), (others, columns) = left.shape, right.shape
    return inner == others and fits_onednn(rows, inner, columns) and _is_dense(left) and _is_dense(right)


def fits_onednn(*sides: int) -> bool:
    """Whether a product of [M, K] and [K, N] float32 numbers is large enough for oneDNN, on a machine where that is faster."""
    return min(sides) >= _SMALLEST_SIDE and math.prod(sides) >= _SMALLEST_WORK and onednn_is_faster()


def _is_plain(part: Tensor, dimensions: int) -> bool:
    """No subclass: tensors without storage, and shards, have products of their own."""
    simple = type(part) in (Tensor, nn.Parameter) and part.layout is torch.strided and part.dim() == dimensions
    return simple and part.dtype is torch.float32 and part.device.type == "cpu"


def _is_dense(matrix: Tensor) -> bool:
    """Whether its rows or its columns stand one after the other without gaps: with gaps between the rows of ``right`` oneDNN has
    no fast kernel, and takes seconds for what the BLAS does in milliseconds."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def product(left: Tensor, right: Tensor, room: Tensor | None = None) -> Tensor:
    """[M, N] ``left`` [M, K] times ``right`` [K, N], without autograd.

    Args:
        room: [at least M, N], which the result may be written into.
    """
    if suits(left, right):
        return _onednn(left, right)
    return torch.mm(left, right, out=None if room is None else room[: len(left)])


@contextmanager
def fast_products() -> Iterator[None]:
    """Within this context every such product of the process goes to oneDNN, those of layers and of their gradients as well, in
    whatever thread.

    Another kernel is registered for ``aten::mm`` and ``aten::addmm`` on the CPU, below autograd, autocast and everything that
    looks at operations; it is taken away again afterwards. Where oneDNN is not faster nothing is done. May be nested, and entered
    by several threads.
    """
    if not onednn_is_faster():
        yield
        return
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


_depth, _changes_depth = 0, threading.Lock()
_library: list[torch.library.Library] = []


def _enter(change: int) -> None:
    """One context more or less, of any thread; the first registers the kernels, and with the last they go."""
    global _depth
    with _changes_depth:
        _depth += change
        if _depth == 0:
            _library[:] = []  # its end takes the kernels away
        elif not _library:
            _register()


def _register() -> None:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl("mm", _mm, "CPU", allow_override=True)
        library.impl("addmm", _addmm, "CPU", allow_override=True)
    _library.append(library)


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch's own compiler calls for linear layers on a CPU.
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if suits(left, right):
        return _onednn(left, right)
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(0))  # the kernel behind the one that is replaced


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    # oneDNN reads as many numbers as there are columns, one after the other, whatever the bias is.
    fits = _is_plain(bias, 1) and bias.shape[0] == right.shape[-1] and bias.is_contiguous()
    if beta == 1 and alpha == 1 and fits and suits(left, right):
        return _onednn(left, right, bias)
    return torch.ops.aten.addmm.out(bias, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))
