"""Noticing at the next line of the log that a training diverges, and naming the rows that it may be due to.

Shapes: R scored rows of a micro-batch, D its documents (P its pairs).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hf_sft.data.bins import Bins, Examples
from hf_sft.data.chat import IGNORE
from hf_sft.data.live import LazyBins, LiveRecords, StreamBins
from hf_sft.data.prepared import PreparedData
from hf_sft.jumps import LINES, jumped
from hf_sft.training.together import gathered

logger = logging.getLogger(__name__)

_KEPT = 10_000  # micro-batches whose losses are remembered
_NAMED = 5  # rows in a message
_QUIET = 10  # lines of the log between two warnings
_EXCERPT = 80  # letters

Origin = tuple[int, int, int]  # number in the data set, number of the source, record of the source; -1: not known
_UNKNOWN: Origin = (-1, -1, -1)


@dataclass(frozen=True)
class Suspect:
    """A document (or pair) that was learned from, and its loss at that step."""

    step: int
    batch: int  # number of the micro-batch, in its process
    loss: float
    origin: Origin


def document_losses(nll_R: Tensor, doc_R: Tensor, documents: int) -> Tensor:
    """[D] mean nll in nats of the scored rows of each document; -inf for one without any. Does not wait for the device."""
    columns = torch.stack([nll_R, torch.ones_like(nll_R)], dim=1)
    total, count = columns.new_zeros(documents, 2).index_add_(0, doc_R, columns).unbind(1)
    return torch.where(count > 0, total / count, -math.inf)


class DivergenceWatch:
    """Keeps the losses of single documents on the device, and reads them where a line of the log shows that something is wrong.

    Args:
        stop: raise at such a line, instead of a warning.
        unit: what the losses are of, in words: document or pair.
    """

    def __init__(self, stop: bool, unit: str = "document") -> None:
        self.stop, self.unit = stop, unit
        self.begin()

    def begin(self) -> None:
        """A training begins."""
        self._kept: deque[tuple[int, Sequence[Origin], Tensor]] = deque(maxlen=_KEPT)
        self._line = 0  # the step of the newest line of the log
        self._quiet = 0

    def add(self, step: int, origins: Sequence[Origin] | None, losses: Tensor) -> None:
        """Remember the losses [D] of a micro-batch of ``step``; origins None: not known; none: nothing was learned from."""
        origins = [_UNKNOWN] * len(losses) if origins is None else origins
        if origins:
            self._kept.append((step, origins, losses.detach()))

    def look(self, history: Sequence[dict[str, Any]], rows: RowTeller, *, scaled: bool = False) -> None:
        """Look at the newest line of the log, which is one of training; every process must.

        Args:
            history: the lines of the log, the same in all processes.
            rows: names rows.
            scaled: whether gradients are scaled (fp16): a norm that is not finite is a step that was left out then.

        Raises:
            ValueError: it has diverged, and ``stop`` is set.
        """
        line, since, self._quiet = history[-1], self._line, self._quiet - 1
        self._line = line["step"]
        kind, problem = _problem(history, scaled)
        if kind is not None and (self.stop or self._quiet < 0):
            self._quiet = _QUIET - 1
            text = f"{problem} in the log of step {line['step']}. {self._account(kind, line['step'], since, rows)}"
            if self.stop:
                raise ValueError(
                    f"training has diverged: {text}\nNothing is saved at this step. Lower learning_rate, raise warmup_steps, set "
                    "max_grad_norm or mend these records, and start in a new output_dir or from a checkpoint before that step; "
                    "or leave stop_on_divergence out to train on."
                )
            if rows.speaks:
                logger.warning("training diverges: %s", text)
        while self._kept and self._kept[0][0] < self._line:
            self._kept.popleft()

    def _account(self, kind: str, step: int, since: int, rows: RowTeller) -> str:
        """Which rows it may be due to; what the processes know is put together."""
        mine = self._read()
        broken = [each for each in mine if not math.isfinite(each.loss)]
        if kind == "loss":
            firsts = gathered(broken[0].step if broken else None)
            first = min((each for each in firsts if each is not None), default=None)
            return (
                f"The loss of every {self.unit} by itself is finite."
                if first is None
                else self._tell_broken(mine, first, rows)
            )
        worst = _worst(each for each in mine if (each.step == step if kind == "norm" else each.step > since))
        where = f"in step {step}" if kind == "norm" else f"since step {since}"
        return f"The {self.unit}s with the highest loss {where}:{rows.tell(_worst(_together(worst)))}"

    def _tell_broken(self, mine: list[Suspect], step: int, rows: RowTeller) -> str:
        """``step`` is the first with a loss that is not finite."""
        own = [each for each in mine if each.step == step]
        broken = [each for each in own if not math.isfinite(each.loss)]
        counts = gathered((len(broken), len(own), len({each.batch for each in own})))
        found, whole, batches = map(sum, zip(*counts, strict=True))
        names, unit = rows.tell(_together(broken[:_NAMED])[:_NAMED], found), f"{self.unit}s of step {step}"
        before = _together(_worst(each for each in mine if each.step == step - 1))
        if found < whole:
            return f"Without a finite loss are {found} of {whole} {unit}:{names}"
        if batches == 1:
            return f"None of the {unit} has a finite loss (one spoils the micro-batch, or the weights broke before):{names}"
        told = f", whose {self.unit}s with the highest loss are:{rows.tell(_worst(before))}" if before else "."
        return f"None of the {unit} has a finite loss: the weights broke in step {step - 1}{told}"

    def _read(self) -> list[Suspect]:
        """What is remembered, without documents that have no loss (waits for the device)."""
        if not self._kept:
            return []
        values = iter(torch.cat([losses.float() for _, _, losses in self._kept]).tolist())
        found = [
            Suspect(step, batch, next(values), origin)
            for batch, (step, origins, _) in enumerate(self._kept)
            for origin in origins
        ]
        return [each for each in found if each.loss != -math.inf]


def _problem(history: Sequence[dict[str, Any]], scaled: bool) -> tuple[str | None, str]:
    """What is wrong with the newest line (loss, jump, norm, or None), and how to say it."""
    loss, norm = history[-1]["loss"], history[-1].get("grad_norm") or 0.0
    if not math.isfinite(loss):
        return "loss", f"loss is {loss}"
    before = (history[place] for place in range(len(history) - 2, -1, -1))
    losses = (each["loss"] for each in before if math.isfinite(each.get("loss", math.nan)))
    if (middle := jumped(loss, list(islice(losses, LINES)))) is not None:
        return "jump", f"loss is {loss:.4g}, and the median of the lines before is {middle:.4g},"
    return ("norm", f"grad_norm is {norm}") if not math.isfinite(norm) and not scaled else (None, "")


def _worst(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Those with the highest loss first; what is no number counts as the highest."""
    return sorted(suspects, key=lambda each: -each.loss if each.loss == each.loss else -math.inf)[:_NAMED]


def _together(suspects: list[Suspect]) -> list[Suspect]:
    return [each for share in gathered(suspects) for each in share]


# ---- naming rows ----


def source_names(dataset: Any) -> list[str]:
    """Where the rows of a data set come from: the names that its rows' ``source`` counts."""
    if isinstance(dataset, LiveRecords):
        return [source.name for source in dataset.sources]
    if isinstance(dataset, PreparedData):
        return [str(each["source"]) for each in dataset.report.get("sources", [])]
    return []


class RowTeller:
    """Names rows of a training data set, as far as it is known where they come from.

    Args:
        dataset: what the batches are made of.
        names: of its sources.
        tokenizer: for excerpts; None: none.
        speaks: whether this process warns.
    """

    def __init__(self, dataset: Any, names: Sequence[str], tokenizer: Any, *, speaks: bool = True) -> None:
        self.dataset, self.names, self.tokenizer, self.speaks = dataset, names, tokenizer, speaks

    def tell(self, suspects: Sequence[Suspect], count: int | None = None) -> str:
        """A line for each; ``count``: how many there are in all."""
        lines = [
            f"\n  {self._place(each.origin)}, loss {each.loss:.4g}{self._excerpt(each.origin)}" for each in suspects
        ]
        more = 0 if count is None else count - len(lines)
        return "".join(lines) + (f"\n  and {more} more" if more else "")

    def _place(self, origin: Origin) -> str:
        number, source, record = origin
        if isinstance(self.dataset, Bins) and number >= 0:
            source, record = self.dataset.origin(number)
        row = f"row {number}" if number >= 0 else "a row whose number is not known"
        if isinstance(self.dataset, StreamBins) and number >= 0:
            row = f"document {number} of the stream"
        if record < 0:
            return row
        if 0 <= source < len(self.names):
            return f"{row} (record {record} of {self.names[source]})"
        return f"{row} (example {record})"

    def _excerpt(self, origin: Origin) -> str:
        """The beginning of what is learned of a row."""
        row = self._row(origin[0]) if self.tokenizer is not None and origin[0] >= 0 else None
        if row is None:
            return ""
        ids, labels = (list(map(int, row[name])) for name in ("input_ids", "labels"))
        start = next((place for place, label in enumerate(labels) if label != IGNORE), 0)
        text = " ".join(self.tokenizer.decode(ids[start : start + _EXCERPT]).split())
        return f": {text[:_EXCERPT]!r}"

    def _row(self, number: int) -> Any:
        data = self.dataset
        if isinstance(data, Bins):
            return data.documents([number])[0]
        if isinstance(data, LazyBins):
            return next(iter(data[0, number]), None)
        example = data.examples[number] if isinstance(data, Examples) else None
        return example if isinstance(example, dict) and {"input_ids", "labels"} <= set(example) else None
