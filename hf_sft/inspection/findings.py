"""What usually goes wrong with training data: found by counting, told with its number and with what to do.

A check is sure of what it says, or says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sft.arguments import DataArguments
from hf_sft.sources import read_sources

if TYPE_CHECKING:
    from hf_sft.inspection.report import Inspection, SplitInspection

SEVERITIES = ("error", "warning", "note")  # the worst first
_SOME, _MANY = 0.01, 0.2  # shares from which something counts, and counts as an error
_LOW_SHARE, _LOW_FILL, _FEW_BINS, _FEW_EVAL_ROWS = 0.05, 0.8, 10, 30
_WHOLE = 0.999


@dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
        code: its name in programs.
        severity: one of ``SEVERITIES``: error (training on this is hardly meant), warning, note.
        split: ``train`` or ``eval``; None: both together.
        what: what was found, with its number.
        do: what to do.
    """

    code: str
    severity: str
    split: str | None
    what: str
    do: str


def of(count: int, total: int, unit: str) -> str:
    """ "34 of 1,000 rows (3.4 %)"."""
    share = 100 * count / total if total else 0.0
    shown = "< 0.1" if 0 < share < 0.05 else f"{share:.0f}" if share in (0, 100) else f"{share:.1f}"
    return f"{count:,} of {total:,} {unit} ({shown} %)"


def find_problems(inspection: Inspection, data: DataArguments, system_prompt: str | None = None) -> tuple[Finding, ...]:
    """Everything that was found, the worst first.

    Args:
        data: how the data were prepared.
        system_prompt: the one that the template writes where a conversation has none.
    """
    found = [finding for split in inspection.splits for check in _CHECKS for finding in check(split, data)]
    for split in inspection.splits[:1]:  # of the others there is nothing new to say
        found += _system_prompt(split, data, system_prompt)
    found += _overlap(inspection)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


Found = Iterable[Finding]


# ---- what is learned ----


def _end_of_turn(split: SplitInspection, data: DataArguments) -> Found:
    count, total = split.counts["open"], split.counts["documents"] - split.counts["truncated"]
    if not count:
        return
    severity = "error" if count > total / 2 else "warning"
    if data.task_type == "pretrain":
        do = "Texts end with the tokenizer's eos_token; in rows that came tokenised, add it."
    else:
        do = (
            "Choose a chat_template that ends turns with a special token; in rows that came tokenised, mend the labels."
        )
    what = f"{of(count, total, 'documents')} are learned without their end: a model trained on them does not learn to stop."
    yield Finding("end_not_learned", severity, split.name, what, do)


def _beyond_end(split: SplitInspection, data: DataArguments) -> Found:
    count = split.counts.get("beyond_end", 0)
    if not count or data.train_on == "all" or data.task_type == "pretrain" or _is_all_learned(split):
        return
    what = f"{of(count, split.rows, 'rows')} are learned beyond the end of a turn: users' turns too, or the template's text."
    yield Finding(
        "beyond_end", _severity(count, split.rows), split.name, what,
        "Mend the labels of rows that came tokenised; a {% generation %} block of the template must end with the turn.",
    )  # fmt: skip


def _supervised_share(split: SplitInspection, data: DataArguments) -> Found:
    if data.task_type == "pretrain":
        return
    if _is_all_learned(split):
        asked = data.train_on == "all"
        why = "train_on is all: questions are learned as well as answers" if asked else "the questions are learned too"
        do = "Set train_on to assistant to learn the answers alone."
        do = do if asked else "Rows that came tokenised need labels of -100 where nothing is learned."
        yield Finding("all_supervised", "note" if asked else "error", split.name, f"Every token is learned: {why}.", do)
    elif split.share < _LOW_SHARE:
        what = (
            f"{of(split.learned, split.tokens, 'tokens')} are learned: nearly all the work goes into reading prompts."
        )
        do = "Shorten the prompts (system prompt, tools, documents), or train on more turns (train_on)."
        yield Finding("low_supervised_share", "warning", split.name, what, do)


def _is_all_learned(split: SplitInspection) -> bool:
    unlearned = split.tokens - split.learned - split.rows  # a row's first token cannot be learned
    return unlearned <= (1 - _WHOLE) * split.tokens


def _answers(split: SplitInspection, data: DataArguments) -> Found:
    if data.task_type == "pretrain":
        return
    count, total = split.counts.get("empty_answers", 0), split.counts.get("answers", 0)
    if count:
        severity = "warning" if count >= _SOME * total else "note"
        what = f"{of(count, total, 'answers')} are empty: the model learns to end its turn at once."
        yield Finding("empty_answers", severity, split.name, what, "Take these turns out, or mark them train: false.")
    median = split.answers.get("median", 0)
    if 0 < median <= 3 and count < total / 2:
        what = f"Answers are short: half of them have at most {median} tokens, their end included."
        yield Finding("short_answers", "note", split.name, what, "Right for classification; else look at the samples.")


def _beginnings(split: SplitInspection, data: DataArguments) -> Found:
    count = split.counts.get("odd_beginnings", 0)
    if data.train_on != "all" and count >= max(1, _SOME * split.rows) and _one_template(data):
        severity = "warning" if count >= 0.1 * split.rows else "note"
        what = f"In {of(count, split.rows, 'rows')} an answer begins with a blank that the template does not write, or lacks one."
        yield Finding("odd_beginnings", severity, split.name, what, "Strip spaces and line breaks from the answers.")


def _one_template(data: DataArguments) -> bool:
    """Whether all answers begin as one template says."""
    sources = [] if data.train_file is None else read_sources(data.train_file)
    several = isinstance(data.chat_template, list) and len(data.chat_template) > 1
    return not several and not any(source.chat_template for source in sources)


def _unknown(split: SplitInspection, data: DataArguments) -> Found:
    if count := split.counts.get("unknown", 0):
        what = f"{of(count, split.rows, 'rows')} learn the unknown token: the tokenizer lacks some of their characters."
        do = "Use a tokenizer with byte fallback, or clean the text."
        yield Finding("unknown_tokens", _severity(count, split.rows), split.name, what, do)


# ---- how rows begin ----


def _two_bos(split: SplitInspection, data: DataArguments) -> Found:
    if count := split.counts.get("two_bos", 0):
        what = f"{of(count, split.rows, 'rows')} begin with two BOS tokens, which the model has never seen."
        do = "Take bos_token out of the template, or tokenise with add_special_tokens=False."
        yield Finding("two_bos", _severity(count, split.rows), split.name, what, do)


def _prompts(split: SplitInspection, data: DataArguments) -> Found:
    count = split.counts.get("without_prompt", 0)
    if count >= max(1, _SOME * split.rows):
        what = f"{of(count, split.rows, 'rows')} have an answer and no question."
        do = "Look whether the question's field has the name that its format asks for; for texts alone, task_type: pretrain."
        yield Finding("without_prompt", "warning", split.name, what, do)


def _system_prompt(split: SplitInspection, data: DataArguments, prompt: str | None) -> Found:
    count = split.counts.get("own_system_prompt", 0)
    if count and prompt and data.system_prompt is None:
        what = f"{of(count, split.rows, 'rows')} begin with the template's own system prompt: {_short(prompt)}"
        do = "Right if the model will be asked through this template without a system message; else set system_prompt."
        yield Finding("system_prompt_of_template", "note", split.name, what, do)


# ---- what became of the records ----


def _truncated(split: SplitInspection, data: DataArguments) -> Found:
    count, answers = split.counts["truncated"], split.counts["truncated_answers"]
    if not count:
        return
    share = count / split.rows
    severity = "error" if share > _MANY else "warning" if share >= _SOME else "note"
    lost = f"; {answers:,} of them in the middle of an answer, which does not learn to stop" if answers else ""
    what = f"{of(count, split.rows, 'rows')} are cut at max_seq_length {data.max_seq_length:,}{lost}."
    do = f"max_seq_length {split.full_99:,} would keep 99 % of them whole; overlength: drop leaves the others out."
    yield Finding("truncated", severity, split.name, what, do)


def _dropped(split: SplitInspection, data: DataArguments) -> Found:
    dropped, records = split.report.get("dropped") or {}, split.report.get("records", 0)
    count = dropped.get("overlength", 0)
    stops = data.overlength_rule == "error"
    if count and (stops or count >= _SOME * records):
        enough = _length_that_keeps(split, count)
        do = f"max_seq_length {enough:,} would keep 99 %" if enough else "Raise max_seq_length"
        after = "training stops at the first of them" if stops else "they are left out"
        what = f"{of(count, records, 'records')} are longer than max_seq_length {data.max_seq_length:,}, and {after}."
        severity = "error" if stops or count > records / 2 else "warning"
        yield Finding("overlength", severity, split.name, what, f"{do}, or set overlength to truncate.")
    count = dropped.get("no_supervised_token", 0)
    if count and count >= _SOME * records:
        what = f"{of(count, records, 'records')} have nothing to learn and are left out: no answer, or one that is cut off."
        yield Finding(
            "nothing_to_learn", "warning", split.name, what, "Look at them; raise max_seq_length if they were cut."
        )


def _length_that_keeps(split: SplitInspection, dropped: int, share: float = 0.99) -> int | None:
    """The smallest known max_seq_length that keeps so many; ``too_long_lengths``: bound -> documents left out."""
    kept, wanted = split.counts["documents"], share * (split.counts["documents"] + dropped)
    for bound, count in sorted(
        (int(bound), count) for bound, count in split.report.get("too_long_lengths", {}).items()
    ):
        kept += count
        if kept >= wanted:
            return bound
    return None


def _bad(split: SplitInspection, data: DataArguments) -> Found:
    bad, records = split.report.get("bad") or {}, split.report.get("records", 0)
    count = bad.get("count", 0)
    if not count:
        return
    stops = data.bad_records == "error"
    reasons = "; ".join(f"{_short(reason)} ({number:,})" for reason, number in list(bad.get("reasons", {}).items())[:3])
    after = "training stops at the first of them" if stops else "they are left out"
    severity = "error" if stops or count > _MANY * records else "warning"
    do = "Mend them" + (", or set bad_records to skip, which leaves them out and counts them." if stops else ".")
    what = f"{of(count, records, 'records')} cannot be used, and {after}: {reasons}."
    yield Finding("bad_records", severity, split.name, what, do)


def _special_tokens(split: SplitInspection, data: DataArguments) -> Found:
    found = split.report.get("special_tokens_in_text") or {}
    if not found:
        return
    tokens = ", ".join(f"{token} ({count:,})" for token, count in sorted(found.items(), key=lambda item: -item[1])[:5])
    count = sum(found.values())
    if data.special_tokens_in_text == "text":
        what = f"Texts spell special tokens, which are encoded as plain letters: {tokens} (records)."
        yield Finding("special_tokens_in_text", "note", split.name, what, "Look whether they are meant as text.")
        return
    what = f"{count:,} record{'s' * (count > 1)} left out for texts that spell a special token: {tokens}."
    do = "Take them out of the texts, or set special_tokens_in_text to text, which keeps their letters."
    yield Finding("special_tokens_in_text", "warning", split.name, what, do)


def _duplicates(split: SplitInspection, data: DataArguments) -> Found:
    count = split.counts["duplicates"]
    if count > _SOME * split.rows:
        what = f"{of(count, split.rows, 'rows')} repeat an earlier one, token by token."
        yield Finding(
            "duplicates", "warning", split.name, what, "Take the repetitions out, or weigh the file on purpose."
        )


def _formats(split: SplitInspection, data: DataArguments) -> Found:
    for source in split.report.get("sources") or [split.report]:
        formats = source.get("formats") or {}
        if len(formats) > 1:
            found = ", ".join(f"{name} ({count:,})" for name, count in formats.items())
            what = f"{source.get('source', 'The file')} mixes records of several formats: {found}."
            yield Finding(
                "mixed_formats",
                "note",
                split.name,
                what,
                "If that is not meant, set data_format, which refuses others.",
            )
    pairs = (split.report.get("formats") or {}).get("preference", 0)
    if pairs and data.task_type == "sft":
        what = (
            f"{pairs:,} records are preference pairs: the chosen answers are learned, the rejected ones are not seen."
        )
        yield Finding(
            "preference_pairs", "note", split.name, what, "Right for a first stage before preference training."
        )


# ---- sizes ----


def _fill(split: SplitInspection, data: DataArguments) -> Found:
    packing = split.packing
    if packing is not None and packing.bins >= _FEW_BINS and packing.fill < _LOW_FILL:
        what = (
            f"Bins are {100 * packing.fill:.0f} % full: documents of {split.lengths['median']:,} tokens (median) fit badly "
            f"into {packing.capacity:,}."
        )
        do = f"Raise max_seq_length, to {2 * split.lengths['95 %']:,} for instance, so that several documents share a bin."
        yield Finding("low_fill", "warning", split.name, what, do)


def _small_evaluation(split: SplitInspection, data: DataArguments) -> Found:
    if split.name == "eval" and split.rows < _FEW_EVAL_ROWS:
        what = f"The evaluation set has {split.rows:,} rows: its loss is a matter of chance."
        yield Finding("small_evaluation", "note", split.name, what, "Keep more records for it (eval_split, eval_file).")


def _overlap(inspection: Inspection) -> Found:
    overlap = inspection.overlap
    if overlap is None:
        return
    if overlap.same:
        severity = "error" if overlap.same > _MANY * overlap.rows else "warning"
        what = f"{of(overlap.same, overlap.rows, 'evaluation rows')} are in the training data, token by token."
        do = "Take them out of one of the two: evaluation measures what was learned by heart."
        yield Finding("train_rows_in_eval", severity, None, what, do)
    if overlap.same_prompt > _SOME * overlap.rows:
        what = f"{of(overlap.same_prompt, overlap.rows, 'evaluation rows')} answer a prompt of the training data in another way."
        yield Finding(
            "train_prompts_in_eval", "note", None, what, "Split by prompt if evaluation is to ask something new."
        )


def _severity(count: int, total: int) -> str:
    return "error" if count > total / 2 else "warning"


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


_CHECKS: tuple[Callable[[SplitInspection, DataArguments], Found], ...] = (
    _end_of_turn, _beyond_end, _supervised_share, _answers, _beginnings, _unknown, _two_bos, _prompts,
    _bad, _truncated, _dropped, _special_tokens, _duplicates, _formats, _fill, _small_evaluation,
)  # fmt: skip
