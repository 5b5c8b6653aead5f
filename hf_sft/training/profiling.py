"""What a training costs: peak memory, model FLOPs utilisation, and a trace of chosen steps."""

from __future__ import annotations

import gzip
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_sft.models.sharded import whole_numel

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
_HALF = (torch.bfloat16, torch.float16)
# Name of the device -> dense TFLOP/s of its tensor cores with float32 sums, and the types that reach it. NVIDIA's tables give
# most numbers "with sparsity": these are halved.
_PEAKS: tuple[tuple[str, float, tuple[torch.dtype, ...]], ...] = (
    (r"A100\b.*", 312.0, _HALF),  # A100 datasheet: 312 (PCIe and SXM)
    (r"H100 80GB HBM3", 989.5, _HALF),  # H100 datasheet, SXM: 1979 sparse
    (r"H100 PCIe", 756.5, _HALF),  # H100 datasheet of 2022, PCIe: 1513 sparse
    (r"H200", 989.5, _HALF),  # H200 datasheet, SXM: 1979 sparse
    (r"B200", 2250.0, _HALF),  # HGX B200 datasheet: 36 PFLOP/s sparse for 8
    (r"L4", 121.0, _HALF),  # L4 datasheet: 242 sparse
    (r"L40S", 362.0, _HALF),  # L40S datasheet: 362.05, 733 sparse
    (r"GeForce RTX 3090", 71.0, _HALF),  # GA102 whitepaper, FP32 accumulate: 71, 142 sparse
    (r"GeForce RTX 4090", 165.2, _HALF),  # Ada whitepaper, FP32 accumulate: 165.2, 330.4 sparse
    (r"V100S.*", 130.0, (torch.float16,)),  # V100 datasheet, S PCIe
    (r"V100-SXM2.*", 125.0, (torch.float16,)),  # V100 datasheet, NVLink
    (r"V100-PCIE.*", 112.0, (torch.float16,)),  # V100 datasheet, PCIe
)
_LARGE = 32 * 2**20  # bytes; a larger trace is compressed, which its viewers read as well
_OPERATORS = 30  # in the table beside a trace


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of the device of this name in ``dtype``; None where that is not known."""
    name = re.sub(r"^(NVIDIA|Tesla)\s+", "", re.sub(r"^NVIDIA\s+(?=Tesla)", "", name.strip()))
    if "MIG " in name:  # a part of a device
        return None
    for pattern, tera, dtypes in _PEAKS:
        if re.fullmatch(pattern, name):
            return tera * 1e12 if dtype in dtypes else None
    return None


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """:func:`peak_flops` of ``device``."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def flops_per_token(model: nn.Module) -> int:
    """6 FLOPs per parameter (Kaplan et al., arXiv 2001.08361): 2 for the forward pass, 2 for the gradient of the activations, 2
    for that of the weight, which frozen ones do without.

    Embeddings are left out, with heads that are tied to them, and so is attention beside its weights; parameters that are used
    twice, and experts, of which a token meets some, count once.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    counted = (weight for weight in model.parameters() if id(weight) not in embeddings)
    return sum((6 if weight.requires_grad else 4) * whole_numel(weight) for weight in counted)


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory so far, in GiB: what PyTorch has allocated on a CUDA device, else what of the process was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) / 2**20  # ru_maxrss would begin at the size of the process that started this one
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Meter:
    """``memory_gib`` and ``mfu`` of the lines of the log.

    mfu = model FLOPs / (seconds * peak FLOP/s * processes), as in arXiv 2204.02311, appendix B: what activation checkpointing
    computes again does not count.

    Args:
        device: of this process.
        peak: FLOP/s of one process's device; None: no ``mfu``.
        processes: their number.
    """

    def __init__(self, device: torch.device, peak: float | None, processes: int) -> None:
        self.device, self.peak, self.processes = device, peak, processes
        self._flops = 0.0

    @classmethod
    def of(cls, args: Any, model: Any) -> Meter:
        """For a training of ``model``; without ``mfu`` for a mixture of experts, whose FLOPs :func:`flops_per_token` does not
        know."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        mixture = getattr(model.config.get_text_config(), "num_experts_per_tok", None) is not None
        return cls(args.device, None if mixture else device_peak(args.device, dtype), args.world_size)

    def begin(self, flops: float) -> None:
        """A training begins, or goes on, that has ``flops`` of all processes behind it."""
        self._flops = flops

    def read(self, flops: float, seconds: float) -> dict[str, float]:
        """What the ``seconds`` since the last call came to, with ``flops`` of all processes behind the training now."""
        done, self._flops = flops - self._flops, flops
        found = {"memory_gib": peak_memory_gib(self.device)}
        if self.peak is not None and seconds > 0:
            found["mfu"] = done / (seconds * self.peak * self.processes)
        return found


class ProfileSteps(TrainerCallback):
    """PyTorch's profiler over optimizer steps, each process for itself.

    Writes ``profile/rankR-steps-A-B.json`` (a Chrome trace; ``.json.gz`` if it is large), and beside it, as ``.txt``, the table
    of the operators that took the longest.

    Args:
        first, last: steps, counted from 1.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._profiler: Any = None
        self._began = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None:  # of a training that failed
            self._profiler.stop()
            self._profiler = None
        first, last = max(self.first, state.global_step + 1), min(self.last, state.max_steps)
        if first > last:
            what = "nothing is recorded"
        elif (first, last) != (self.first, self.last):
            what = f"{first} to {last} are recorded"
        else:
            return
        if state.is_world_process_zero:
            logger.warning(
                "profile_steps is %d:%d, and this training takes the steps %d to %d: %s",
                self.first, self.last, state.global_step + 1, state.max_steps, what,
            )  # fmt: skip

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None or not self.first <= state.global_step + 1 <= self.last:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
        self._began = state.global_step + 1
        self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last:
            self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        folder = Path(str(args.output_dir), PROFILE_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"rank{args.process_index}-steps-{self._began}-{state.global_step}.json"
        profiler.export_chrome_trace(str(trace))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_OPERATORS)
        trace.with_suffix(".txt").write_text(table, encoding="utf-8")
        if trace.stat().st_size > _LARGE:
            trace = _compressed(trace)
        logger.info("profile of steps %d to %d: %s", self._began, state.global_step, trace)


def _compressed(file: Path) -> Path:
    target = file.with_name(f"{file.name}.gz")
    with file.open("rb") as source, gzip.open(target, "wb", compresslevel=5) as packed:
        shutil.copyfileobj(source, packed)
    file.unlink()
    return target
