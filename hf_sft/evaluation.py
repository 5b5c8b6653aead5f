"""Answers to the prompts of evaluation data, beside their references, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from hf_sft.answer_metrics import score_answers
from hf_sft.answering import Answerer
from hf_sft.data.chat import IGNORE


@dataclass(frozen=True)
class Prompt:
    """A row of token data as a question.

    Attributes:
        row: its number in the data set.
        ids: everything up to the last learned run, which for a conversation ends with the generation prompt.
        reference: the text of that run.
    """

    row: int
    ids: list[int]
    reference: str


@dataclass(frozen=True)
class Prediction:
    """An answered prompt; texts, not tokens, but for the counts.

    Attributes:
        tokens: of the answer, its end of turn included.
        forwards: passes through the model.
        stopped: whether the answer ended by itself.
        scores: what the answer is worth; see ``answer_metrics``.
    """

    row: int
    prompt: str
    reference: str
    answer: str
    tokens: int
    forwards: int
    stopped: bool
    scores: dict[str, float] = field(default_factory=dict)

    def record(self, **more: Any) -> dict[str, Any]:
        """One flat object, as it stands in files."""
        values = asdict(self)
        return {**more, **{key: value for key, value in values.items() if key != "scores"}, **values["scores"]}


def prompts_of(rows: Iterable[Mapping[str, Any]], tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` rows that have a prompt and an answer, as questions.

    Args:
        rows: token rows ``{"input_ids", "labels"}``; of preference pairs (with ``rejected_start``) the chosen side counts.
        limit: None: all of them.
    """
    numbered = enumerate(rows)
    found = (prompt for number, row in numbered if (prompt := prompt_of(number, row, tokenizer)) is not None)
    return list(islice(found, limit))


def prompt_of(number: int, row: Mapping[str, Any], tokenizer: Any) -> Prompt | None:
    """A row as a question; None if nothing is learned of it, or nothing stands before what is."""
    end = row.get("rejected_start")
    ids, labels = list(row["input_ids"][:end]), list(row["labels"][:end])
    learned = [place for place, label in enumerate(labels) if label != IGNORE]
    if not learned:
        return None
    last = first = learned[-1]
    while first and labels[first - 1] != IGNORE:
        first -= 1
    if not first:
        return None
    return Prompt(number, ids[:first], tokenizer.decode(ids[first : last + 1], skip_special_tokens=True))


def answer_prompts(
    prompts: Sequence[Prompt],
    answerer: Answerer,
    *,
    batch_size: int,
    batches: int | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    answered: Callable[[], object] = lambda: None,
) -> list[Prediction]:
    """Answer the longest prompts first, so that prompts of a batch are about as long as each other.

    Args:
        batches: how many are made; those beyond the prompts are empty. For processes that must make forwards together.
        out_of_time: asked before each batch; if it says so, what is left is not answered.
        answered: called after each batch.

    Returns:
        the answered ones, in the order of their rows.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.row))
    count = -(-len(ordered) // batch_size) if batches is None else batches
    found = []
    for number in range(count):
        if out_of_time():
            break
        batch = ordered[number * batch_size : (number + 1) * batch_size]
        for prompt, answer in zip(batch, answerer([prompt.ids for prompt in batch]), strict=True):
            text = answerer.tokenizer.decode(prompt.ids, skip_special_tokens=True)
            counts = len(answer.tokens), answer.forwards, answer.stopped
            found.append(Prediction(prompt.row, text, prompt.reference, answerer.text(answer), *counts))
        answered()
    return sorted(found, key=lambda prediction: prediction.row)


def score_predictions(
    predictions: Sequence[Prediction], names: Sequence[str]
) -> tuple[list[Prediction], dict[str, float]]:
    """The predictions with the scores of each, and their summary: the metrics of all answers, the share that stopped by
    themselves (``stopped``), their mean length (``answer_tokens``) and ``tokens_per_forward``."""
    if not predictions:
        return [], {}
    texts = [prediction.answer for prediction in predictions], [prediction.reference for prediction in predictions]
    values, rows = score_answers(*texts, names) if names else ({}, [{} for _ in predictions])
    count, tokens = len(predictions), sum(prediction.tokens for prediction in predictions)
    values |= {
        "stopped": sum(prediction.stopped for prediction in predictions) / count,
        "answer_tokens": tokens / count,
        "tokens_per_forward": tokens / max(1, sum(prediction.forwards for prediction in predictions)),
    }
    return [replace(each, scores=scores) for each, scores in zip(predictions, rows, strict=True)], values
