"""Pictures of WeDLM: who sees whom in a batch, and in which order an answer was filled in.

matplotlib is imported when something is drawn. Colours are told apart by colour-blind readers (Okabe and Ito's palette, viridis).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hf_sft.attention.layout import Layout

# Classes of a pair (query, key), and the colour of each.
HIDDEN, CLEAN_TO_CLEAN, NOISY_TO_CLEAN, IN_BLOCK = range(4)
_COLOURS = ("#FFFFFF", "#0072B2", "#56B4E9", "#E69F00")
_MEANINGS = {
    CLEAN_TO_CLEAN: "clean token sees clean token",
    NOISY_TO_CLEAN: "noisy token sees clean token before its block's anchor",
    IN_BLOCK: "noisy token sees noisy token of its block",
}
_OBSERVED_COLOUR, _SLOT_COLOUR, _BLOCK_COLOUR = "#666666", "#B03A00", "#8A5A00"
_SLOT_MARK = "[M] "
_DPI, _WIDTH = 150, 13.4  # dots per inch, inches: 2,010 pixels, to be read at 1,000 too
_MOST_LABELS = 48
_ORDER_ROW = 40  # tokens in one row of the decoding order
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class MaskPanel:
    """The mask of one packed row, ready to be drawn; spans are (first row, row behind the last).

    Attributes:
        title: stands above it.
        classes: [T, T] int, the class of each pair (query, key).
        labels: T texts, one per token.
        noisy: [T] bool, tokens of noisy streams.
        slot: [T] bool, mask slots.
        documents: spans of the documents, both streams.
        blocks: spans of the blocks of noisy streams.
    """

    title: str
    classes: np.ndarray
    labels: list[str]
    noisy: np.ndarray
    slot: np.ndarray
    documents: list[tuple[int, int]]
    blocks: list[tuple[int, int]]


def classify(layout: Layout) -> np.ndarray:
    """[T, T] int: what query q sees of key k, a class of ``HIDDEN`` (0) to ``IN_BLOCK`` (3); not 0 where the rule allows it."""
    allowed = layout.allowed().numpy()
    noisy = np.zeros(len(allowed), dtype=bool) if layout.block is None else (layout.block >= 0).numpy()
    kinds = np.where(noisy[None, :], IN_BLOCK, np.where(noisy[:, None], NOISY_TO_CLEAN, CLEAN_TO_CLEAN))
    return np.where(allowed, kinds, HIDDEN)


def mask_panel(batch: Mapping[str, Any], name: Callable[[int], str], title: str) -> MaskPanel:
    """The picture of a batch of ``WeDLMCollator``.

    Args:
        name: the text of a token id. A label is the position and that text; of a mask slot, what it must predict.
        title: what the batch is; its tokens and pairs are counted behind it.
    """
    from hf_sft.attention.layout import Layout

    layout = Layout.from_batch(batch)
    ids, rows = batch["input_ids"][0].numpy().copy(), batch["logits_to_keep"].numpy()
    slots = rows[batch["target_kind"].numpy() == 1]
    slot = np.zeros(len(ids), dtype=bool)
    slot[slots] = True
    ids[slots] = batch["target_ids"].numpy()[batch["target_kind"].numpy() == 1]
    doc, block = layout.doc.numpy(), np.asarray(layout.block)
    labels = [
        f"{position}:{_SLOT_MARK if masked else ''}{name(int(token))}"
        for token, position, masked in zip(ids, layout.pos.tolist(), slot, strict=True)
    ]
    classes = classify(layout)
    seen, cells = int((classes != HIDDEN).sum()), classes.size
    return MaskPanel(
        f"{title}: {len(ids)} tokens, {seen:,} of {cells:,} pairs are seen",
        classes,
        labels,
        block >= 0,
        slot,
        _spans(doc),
        [(start, end) for start, end in _spans(doc * (block.max() + 2) + block + 1) if block[start] >= 0],
    )


def _spans(values: np.ndarray) -> list[tuple[int, int]]:
    """Runs of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(pairwise(borders))


# ---- the mask ----


def draw_masks(panels: Sequence[MaskPanel], path: str | Path, title: str) -> Path:
    """Draw masks side by side, their cells of about one size, and return the file; one that stands there is replaced."""
    sizes = [len(panel.labels) for panel in panels]
    labelled = sum(sizes) <= _MOST_LABELS * len(sizes)
    margin = 7 if labelled else 3  # cells' worth of room for labels
    height = _WIDTH / sum(size + margin for size in sizes) * (max(sizes) + margin) + 1.2
    figure = _figure(_WIDTH, height, title)
    axes = figure.subplots(1, len(panels), width_ratios=[size + margin for size in sizes], squeeze=False)[0]
    cell = _WIDTH * 72 / sum(size + margin for size in sizes)  # points
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, min(10.0, 0.72 * cell) if labelled else None)
    _draw_legend(figure, any(len(panel.documents) > 1 for panel in panels), labelled)
    return _save(figure, path)


def _draw_panel(axis: Any, panel: MaskPanel, font: float | None) -> None:
    from matplotlib.colors import ListedColormap

    size = len(panel.labels)
    axis.set_title(panel.title, fontsize=11)
    axis.imshow(panel.classes, cmap=ListedColormap(_COLOURS), vmin=0, vmax=3, interpolation="nearest")
    axis.set_anchor("N")
    if font is not None:
        labels = _drawable(panel.labels)
        axis.set_xticks(range(size), labels, rotation=90, fontsize=font)
        axis.set_yticks(range(size), labels, fontsize=font)
        axis.set_xticks(np.arange(-0.5, size), minor=True)
        axis.set_yticks(np.arange(-0.5, size), minor=True)
        axis.grid(which="minor", color="#D8D8D8", linewidth=0.5)
        for texts in (axis.get_xticklabels(), axis.get_yticklabels()):
            for text, noisy, slot in zip(texts, panel.noisy, panel.slot, strict=True):
                text.set_parse_math(False)
                text.set_color(_SLOT_COLOUR if slot else _OBSERVED_COLOUR if noisy else "black")
                text.set_fontweight("bold" if slot else "normal")
                text.set_fontstyle("italic" if noisy and not slot else "normal")
    axis.tick_params(which="both", length=0)
    axis.set_xlabel("key", fontsize=11)
    axis.set_ylabel("query", fontsize=11)
    for start, end in panel.blocks:
        _outline(axis, start, end, color=_BLOCK_COLOUR, linewidth=1.2)
    for start, end in panel.documents:
        _outline(axis, start, end, color="black", linewidth=1.8)
        border = start + int((~panel.noisy[start:end]).sum())
        for line in (axis.hlines, axis.vlines):
            line(border - 0.5, start - 0.5, end - 0.5, color="black", linewidth=1.0, linestyles=(0, (4, 3)))


def _outline(axis: Any, start: int, end: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((start - 0.5, start - 0.5), end - start, end - start, fill=False, zorder=3, **style))


def _draw_legend(figure: Any, several: bool, labelled: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=_COLOURS[kind], edgecolor="#666666", label=text) for kind, text in _MEANINGS.items()
    ]
    handles += [
        Patch(fill=False, edgecolor="black", linewidth=1.8, label="documents" if several else "document"),
        Line2D([], [], color="black", linestyle=(0, (4, 3)), label="clean stream | noisy stream"),
        Patch(fill=False, edgecolor=_BLOCK_COLOUR, linewidth=1.2, label="block of the noisy stream"),
    ]
    notes = {
        f"6:{_SLOT_MARK}word   mask slot at position 6, must predict word": (_SLOT_COLOUR, "bold", "normal"),
        "5:word   observed token of the noisy stream": (_OBSERVED_COLOUR, "normal", "italic"),
    }
    handles += [Patch(alpha=0, label=note) for note in notes if labelled]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    for text in legend.get_texts():
        if text.get_text() in notes:
            colour, weight, style = notes[text.get_text()]
            text.set(color=colour, fontweight=weight, fontstyle=style)


# ---- the decoding order ----


def draw_order(tokens: Sequence[str], order: Sequence[int], path: str | Path, title: str) -> Path:
    """Draw after which forward pass each token was filled in: tokens along the answer, passes downwards. Returns the file.

    Args:
        tokens: texts of the new tokens.
        order: the number (from 1) of the pass that filled each of them.

    Raises:
        ValueError: lists of two lengths, or without anything.
    """
    if len(tokens) != len(order) or not tokens:
        raise ValueError(
            f"there are {len(tokens)} tokens and {len(order)} numbers of passes: give one for each, and at least one"
        )
    parts = [slice(start, start + _ORDER_ROW) for start in range(0, len(tokens), _ORDER_ROW)]
    heights = [max(order[part]) - min(order[part]) + 1 for part in parts]  # passes
    width = min(_ORDER_ROW, len(tokens))
    cell = (_WIDTH - 0.9) / _ORDER_ROW
    height = 1.0 + sum(max(1.2, cell * count) + 1.0 for count in heights)
    figure = _figure(max(6.0, 0.9 + cell * width), height, title)
    axes = figure.subplots(len(parts), 1, height_ratios=[max(4, height) for height in heights], squeeze=False)[:, 0]
    for axis, part in zip(axes, parts, strict=True):
        _draw_order_part(axis, list(tokens[part]), list(order[part]), width, max(order))
    return _save(figure, path)


def _draw_order_part(axis: Any, tokens: list[str], order: list[int], width: int, passes: int) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    colours, first, last = matplotlib.colormaps["viridis"], min(order), max(order)
    for place, number in enumerate(order):
        share = (number - 1) / max(1, passes - 1)
        axis.add_patch(
            Rectangle((place - 0.5, number - 0.5), 1, 1, facecolor=colours(0.08 + 0.84 * share), edgecolor="white")
        )
        dark = share < 0.55
        axis.text(place, number, str(number), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for number in range(first, last + 2):
        axis.axhline(number - 0.5, color="#E4E4E4", linewidth=0.6, zorder=0)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(last + 0.5, first - 0.5))
    axis.set_xticks(range(len(tokens)), _drawable(tokens), rotation=90, fontsize=9)
    for text in axis.get_xticklabels():
        text.set_parse_math(False)
    step = max(1, -(-(last - first + 1) // 12))
    axis.set_yticks(range(first, last + 1, step))
    axis.tick_params(length=0, labelsize=9)
    axis.set_ylabel("forward pass", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


# ---- texts and files ----


def token_text(text: str, most: int = 14) -> str:
    """A token as a label: spaces and line breaks visible, cut to ``most`` characters."""
    shown = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t").replace(" ", "\u2423")
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"


def text_picture(panel: MaskPanel) -> str:
    """The o/x picture of a mask with its labels: one line per query."""
    import torch

    from hf_sft.attention.layout import draw

    width = max(map(len, panel.labels))
    lines = draw(torch.from_numpy(panel.classes != HIDDEN)).splitlines()
    return "\n".join(
        [panel.title, *(f"{label:>{width}}  {line}" for label, line in zip(panel.labels, lines, strict=True))]
    )


def check_new_file(name: str, path: str | Path, suffixes: Sequence[str], *, overwrite: bool = False) -> None:
    """Raise ValueError if the file of argument ``name`` is not to be written: its ending, or one that stands there."""
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{name} is {str(path)!r}: the name of this file ends with {', '.join(suffixes)}")
    if Path(path).is_dir():
        raise ValueError(f"{name} {str(path)!r} is a folder: name a file")
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{name} {str(path)!r} exists: name another file, or add --overwrite")


def check_picture(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise ValueError if nothing can be drawn to ``path``: its ending, a file that stands there, no matplotlib."""
    check_new_file("output", path, SUFFIXES, overwrite=overwrite)
    if find_spec("matplotlib") is None:
        raise ValueError("pictures are drawn by matplotlib, which is not installed: pip install matplotlib")


def _drawable(labels: Sequence[str]) -> list[str]:
    """Labels in letters that the font has; a box stands for any other."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    known = FT2Font(findfont("DejaVu Sans")).get_charmap()
    return ["".join(letter if ord(letter) in known else "\u25a1" for letter in label) for label in labels]


def _figure(width: float, height: float, title: str) -> Any:
    """A figure of so many inches, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=14)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix.lower() != ".png":
        figure.savefig(target)
        return target
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)  # a third of the size, looks the same
    return target
