"""The inspection says what is in the rows, finds what usually goes wrong, and shows it without losing or obeying a character."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.table import InMemoryTable
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_tokenizer

from hf_sft.arguments import DataArguments
from hf_sft.data.chat import IGNORE, encode_conversation
from hf_sft.data.packing import pack_documents
from hf_sft.data.prepared import PreparedData
from hf_sft.data.texts import TextEncoder
from hf_sft.data.tokenize import supervised_tokens
from hf_sft.inspection import Finding, Inspection, Sample, inspect_data, scan
from hf_sft.inspection.report import histogram
from hf_sft.inspection.scan import Signs, scan_rows
from hf_sft.inspection.texts import TokenTexts, visible

Row = dict[str, Any]
TOKENIZER = tiny_tokenizer()
IM_END, END_OF_TEXT, IM_START = 256, 257, 258
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())),
        ("source", pa.int32()), ("record", pa.int64()), ("full_length", pa.int32()),
    ]
)  # fmt: skip


def prepared(rows: list[Row], **report: Any) -> PreparedData:
    """Rows as the pipeline hands them over; a row may say its own record and full_length."""
    whole = [{"source": 0, "record": n, "full_length": len(row["input_ids"]), **row} for n, row in enumerate(rows, 1)]
    table = pa.table({name: [row[name] for row in whole] for name in SCHEMA.names}, SCHEMA)
    counts = {"records": len(rows), "kept": len(rows), "sources": [{"source": "train.jsonl"}], **report}
    return PreparedData(Dataset(InMemoryTable(table)), counts)


def chat(*texts: str, tokenizer: Any = TOKENIZER, **options: Any) -> Row:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return dict(encode_conversation(tokenizer, turns, **options))


def sound(count: int = 40, seed: int = 0) -> list[Row]:
    """Conversations that nothing is wrong with."""
    rng = random.Random(seed)
    words = [["".join(rng.choice("abcdefgh") for _ in range(6)) for _ in range(6)] for _ in range(count)]
    return [chat(f"What is {' '.join(w[:3])}?", f"It is {' '.join(w[3:])}.") for w in words]


def look(
    train: list[Row], evaluation: list[Row] | None = None, tokenizer: Any = TOKENIZER, **options: Any
) -> Inspection:
    report = options.pop("report", {})
    splits = {"train": prepared(train, **report)}
    if evaluation is not None:
        splits["eval"] = prepared(evaluation)
    return inspect_data(splits, tokenizer, **{"capacity": 2048, **options})


def found(inspection: Inspection) -> dict[str, Finding]:
    codes = [finding.code for finding in inspection.findings]
    assert len(codes) == len(set(codes))
    return {finding.code: finding for finding in inspection.findings}


# Findings


def unlearn(row: Row, *places: int) -> Row:
    labels = list(row["labels"])
    for place in places:
        labels[place] = IGNORE
    return {**row, "labels": labels}


def cut(row: Row, length: int) -> Row:
    return {
        "input_ids": row["input_ids"][:length],
        "labels": row["labels"][:length],
        "full_length": len(row["input_ids"]),
    }


def all_learned(row: Row) -> Row:
    return {**row, "labels": list(row["input_ids"])}


def bad(count: int) -> dict[str, Any]:
    reasons = {"an object with no known keys": count}
    return {
        "records": 40 + count,
        "bad": {"count": count, "reasons": reasons, "examples": ["train.jsonl, line 3: broken"]},
    }


def args(**values: Any) -> DataArguments:
    return DataArguments(**values)


SOUND, OTHERS = sound(), sound(39, seed=1)
A = TOKENIZER.convert_tokens_to_ids("A")
END = -2  # the place of the end of turn: ChatML writes a line break behind it
LONG = [chat("?" * 900, f"{n} it is") for n in range(40)]
LONGEST = max(len(row["input_ids"]) for row in SOUND)
EVEN = [f"Is {n} even?" for n in range(40)]
SPELLED = {"special_tokens_in_text": {"<|im_end|>": 2}}
MIXED = {"sources": [{"source": "a", "formats": {"alpaca": 3, "sharegpt": 37}}]}
WHO = ("Who is that?", "Me."), ("Who is that?", "You.")
# What triggers a finding: its code, its severity, and the data.
FROM_ROWS: dict[str, tuple[str, str, Callable[[], Inspection]]] = {
    "no end of turn": ("end_not_learned", "error", lambda: look([unlearn(row, END) for row in SOUND])),
    "some without end": ("end_not_learned", "warning", lambda: look([unlearn(SOUND[0], END), *SOUND[1:]])),
    "several turns at once": (
        "beyond_end",
        "error",
        lambda: look([learn_between(chat("a", "b", q, "d")) for q in EVEN]),
    ),
    "all learned": ("all_supervised", "error", lambda: look([all_learned(row) for row in SOUND])),
    "train_on all": (
        "all_supervised",
        "note",
        lambda: look([all_learned(r) for r in SOUND], data=args(train_on="all")),
    ),
    "long prompts": ("low_supervised_share", "warning", lambda: look(LONG)),
    "an empty answer": ("empty_answers", "warning", lambda: look([chat("Why is that so?", ""), *SOUND])),
    "a blank answer": ("empty_answers", "warning", lambda: look([chat("Why is that so?", " \n"), *SOUND])),
    "short answers": ("short_answers", "note", lambda: look([chat(q, "no"[n % 2 :]) for n, q in enumerate(EVEN)])),
    "line breaks first": ("odd_beginnings", "warning", lambda: look([chat(q, "\nIt is so.") for q in EVEN])),
    "one space first": ("odd_beginnings", "note", lambda: look([chat("Well?", " It is so."), *SOUND])),
    "two BOS": ("two_bos", "error", lambda: look([begin(row, A, A) for row in SOUND], tokenizer=with_bos())),
    "unknown tokens": (
        "unknown_tokens",
        "warning",
        lambda: look([chat("Where?", "\u00fc"), *SOUND], tokenizer=with_unknown()),
    ),
    "no question": ("without_prompt", "warning", lambda: look([*SOUND, chat("", "It is so.")])),
    "no turn of a user": ("without_prompt", "warning", lambda: look([*SOUND, answer_alone("It is so.")])),
    "truncated": ("truncated", "error", lambda: look([cut(row, len(row["input_ids"]) - 9) for row in SOUND])),
    "one truncated": ("truncated", "warning", lambda: look([cut(SOUND[0], 50), *SOUND[1:]])),
    "duplicates": ("duplicates", "warning", lambda: look([*SOUND, *SOUND[:2]])),
    "half-empty bins": ("low_fill", "warning", lambda: look(SOUND, capacity=LONGEST + 40)),
    "a small evaluation set": ("small_evaluation", "note", lambda: look(SOUND, sound(9, seed=1))),
    "train in eval": ("train_rows_in_eval", "warning", lambda: look(SOUND, [*OTHERS, SOUND[3]])),
    "all of eval in train": ("train_rows_in_eval", "error", lambda: look(SOUND, SOUND)),
    "prompts": ("train_prompts_in_eval", "note", lambda: look([*SOUND, chat(*WHO[0])], [*OTHERS, chat(*WHO[1])])),
    "a default": ("system_prompt_of_template", "note", lambda: look(with_system(), tokenizer=DEFAULT_SYSTEM)),
}
# The same of what the pipeline reports, under the arguments behind it.
FROM_REPORT: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bad records": ("bad_records", "error", bad(3), {}),
    "bad records left out": ("bad_records", "warning", bad(3), {"bad_records": "skip"}),
    "many bad records": ("bad_records", "error", bad(30), {"bad_records": "skip"}),
    "too long": ("overlength", "warning", {"records": 50, "dropped": {"overlength": 10}}, {}),
    "most too long": ("overlength", "error", {"records": 90, "dropped": {"overlength": 50}}, {}),
    "too long for error": ("overlength", "error", {"dropped": {"overlength": 1}}, {"overlength": "error"}),
    "nothing to learn": ("nothing_to_learn", "warning", {"dropped": {"no_supervised_token": 9}}, {}),
    "special tokens": ("special_tokens_in_text", "warning", SPELLED, {}),
    "special tokens as text": ("special_tokens_in_text", "note", SPELLED, {"special_tokens_in_text": "text"}),
    "duplicates": ("duplicates", "warning", {"duplicates": 4}, {}),
    "mixed formats": ("mixed_formats", "note", MIXED, {}),
    "preference pairs": ("preference_pairs", "note", {"formats": {"preference": 40}}, {}),
}


def learn_between(row: Row) -> Row:
    """The tokens between the first and the last learned one are learned too."""
    learned = [place for place, label in enumerate(row["labels"]) if label != IGNORE]
    labels = [*row["labels"][: learned[0]], *row["input_ids"][learned[0] : learned[-1] + 1]]
    return {**row, "labels": labels + [IGNORE] * (len(row["labels"]) - len(labels))}


def begin(row: Row, *ids: int) -> Row:
    return {"input_ids": [*ids, *row["input_ids"]], "labels": [IGNORE] * len(ids) + row["labels"]}


def with_bos() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "A"
    return tokenizer


def with_unknown() -> Any:
    """The first byte of some umlauts stands in for the unknown token."""
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "\u00c3"
    return tokenizer


def answer_alone(text: str) -> Row:
    return dict(encode_conversation(TOKENIZER, [{"role": "assistant", "content": text}]))


DEFAULT_SYSTEM = tiny_tokenizer(
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful machine.<|im_end|>\n{% endif %}"
    + CHATML
)


def with_system() -> list[Row]:
    return [chat(f"Is {n} odd?", "I do not know.", tokenizer=DEFAULT_SYSTEM) for n in range(40)]


@pytest.mark.parametrize("name", FROM_ROWS)
def test_what_goes_wrong_in_rows_is_found_alone(name) -> None:
    code, severity, inspect = FROM_ROWS[name]
    check(found(inspect()), code, severity)


@pytest.mark.parametrize("name", FROM_REPORT)
def test_what_the_report_says_is_found_alone(name) -> None:
    code, severity, report, arguments = FROM_REPORT[name]
    check(found(look(SOUND, report=report, data=args(**arguments))), code, severity)


def check(findings: dict[str, Finding], code: str, severity: str) -> None:
    assert set(findings) == {code}
    finding = findings[code]
    assert finding.severity == severity
    assert finding.what.endswith((".", "?")) and finding.do.endswith(".")
    assert re.search(r"\d", finding.what) or code == "all_supervised"


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found(look(SOUND)) == {}
    assert found(look(SOUND, sound(40, seed=1))) == {}
    assert found(look([chat("Hi there", "yes", "Once more?", "no way")] + SOUND)) == {}
    assert found(look(SOUND, packing=False, capacity=70)) == {}
    assert found(look(with_system(), tokenizer=DEFAULT_SYSTEM, data=args(system_prompt="You are."))) == {}


def test_a_tail_of_ends_is_an_end() -> None:
    rows = [
        {"input_ids": [*r["input_ids"], *[IM_END] * 8], "labels": [*r["labels"][:-1], IM_END, *[IM_END] * 8]}
        for r in SOUND
    ]
    for row in rows:
        row["input_ids"][-9] = IM_END
    assert found(look(rows)) == {}


def test_everything_learned_but_some_turns() -> None:
    """Under train_on all, the tokens before an answer that is left out are no answer without an end."""
    rows = [
        dict(
            encode_conversation(
                TOKENIZER,
                [
                    {"role": "user", "content": f"How is {n}?"}, {"role": "assistant", "content": "Bad.", "train": False},
                    {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No.", "train": False},
                    {"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "It is."},
                ],
                train_on="all",
            )
        )
        for n in range(40)
    ]  # fmt: skip
    inspection = look(rows, data=args(train_on="all"))
    assert found(inspection) == {} and inspection.splits[0].counts["answers"] == 40


def test_texts_end_with_eos() -> None:
    data = args(task_type="pretrain")
    rows = [dict(row) for row in TextEncoder(TOKENIZER).encode([f"This is text {n}." for n in range(40)])]  # type: ignore[arg-type]
    assert found(look(rows, data=data)) == {}
    without = [{"input_ids": row["input_ids"][:-1], "labels": row["labels"][:-1]} for row in rows]
    assert found(look(without, data=data))["end_not_learned"].severity == "error"
    pieces = [
        {**r, "record": 7, "full_length": 35} for r in (cut(rows[0], 10), *(cut(rows[n], 11) for n in range(1, 3)))
    ]
    pieces[-1] = {**dict(TextEncoder(TOKENIZER).encode(["and more."])[0]), "record": 7, "full_length": 35}  # type: ignore[arg-type]
    inspection = look([*rows, *pieces], data=data)  # one text in several rows: the last has the end
    assert found(inspection) == {} and inspection.splits[0].counts["documents"] == 41


def test_the_length_that_keeps_nearly_all_is_named() -> None:
    report = {"records": 50, "dropped": {"overlength": 10}, "too_long_lengths": {"4096": 9, "8192": 1}}
    assert "max_seq_length 8,192 would keep 99 %" in found(look(SOUND, report=report))["overlength"].do
    rows = [cut(row, len(row["input_ids"]) - 9) for row in SOUND]
    longest = max(len(row["input_ids"]) for row in SOUND)
    assert f"max_seq_length {longest}" in found(look(rows))["truncated"].do


# Numbers


BREAK, SPACE = TOKENIZER.backend_tokenizer.encode("\n ").ids
TOKENS = st.sampled_from([*range(40, 60), BREAK, SPACE, IM_END, END_OF_TEXT, IM_START])
ROWS = st.lists(st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=30), min_size=1, max_size=12)


@functools.cache
def chat_signs() -> Signs:
    return Signs(TOKENIZER, TokenTexts(TOKENIZER), chat=True)


def plain_runs(row: Row) -> list[list[int]]:
    runs: list[list[int]] = []
    for place, label in enumerate(row["labels"]):
        if label != IGNORE and place:
            if runs and row["labels"][place - 1] != IGNORE and place > 1:
                runs[-1].append(label)
            else:
                runs.append([label])
    return runs


@given(ROWS, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_scan_counts_as_a_plain_loop_does(drawn, at_once) -> None:
    rows = [
        {"input_ids": [t for t, _ in row], "labels": [t if learned else IGNORE for t, learned in row]} for row in drawn
    ]
    signs = chat_signs()
    whole, kept = scan_rows(prepared(rows).rows, signs), scan._AT_ONCE
    scan._AT_ONCE = at_once
    try:
        parts = scan_rows(prepared(rows).rows, signs)
    finally:
        scan._AT_ONCE = kept
    for name in ("lengths", "learned", "answers", "hashes", "prompts", "oddness", "truncated"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.counts == parts.counts and whole.ends == parts.ends

    assert whole.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert whole.learned.tolist() == [supervised_tokens(row["labels"]) for row in rows]
    runs = [plain_runs(row) for row in rows]
    assert whole.ends == {t: n for t in range(259) if (n := sum(run[-1] == t for row in runs for run in row))}
    assert signs.ends.nonzero()[0].tolist() == [IM_END, END_OF_TEXT]
    white = {TOKENIZER.backend_tokenizer.encode(chr(code)).ids[0] for code in range(128) if chr(code).isspace()}
    assert set(signs.blank.nonzero()[0].tolist()) == white
    answers = []
    for row, found_runs in zip(rows, runs, strict=True):
        prompt = len(found_runs) > 1 and row["labels"][1] != IGNORE  # learned from the beginning: no answer
        answers += [run for run in found_runs[prompt:] if re.search("[ef]b*$|t", kinds(run))]
    assert whole.counts["answers"] == len(answers)
    assert whole.counts["empty_answers"] == sum(re.fullmatch("b*[ef]+b*", kinds(run)) is not None for run in answers)
    same = len({tuple(row["input_ids"]) for row in rows})
    assert len(np.unique(whole.hashes)) == same


def kinds(run: list[int]) -> str:
    return "".join({BREAK: "b", SPACE: "b", IM_END: "e", END_OF_TEXT: "f"}.get(token, "t") for token in run)


def test_figures_of_a_split() -> None:
    rows = [chat("a" * n, "b" * (2 * n)) for n in range(1, 101)]
    inspection = look(rows, report={"duplicates": 0})
    split = inspection.splits[0]
    lengths = [len(row["input_ids"]) for row in rows]
    assert split.rows == 100 and split.tokens == sum(lengths)
    assert (
        split.learned == sum(supervised_tokens(row["labels"]) for row in rows) == sum(2 * n + 1 for n in range(1, 101))
    )
    assert split.lengths["shortest"] == min(lengths) and split.lengths["longest"] == max(lengths)
    assert split.lengths["median"] == sorted(lengths)[49]
    assert split.answers["longest"] == 201 and split.ends == {"<|im_end|>": 100}
    assert sum(split.length_histogram.counts) == sum(split.share_histogram.counts) == 100
    packing = split.packing
    bins = pack_documents(lengths, 2048)
    assert packing is not None and packing.bins == len(bins) and packing.fill == sum(lengths) / (len(bins) * 2048)
    shown = [document.row for document in packing.documents]
    assert shown == bins[packing.number][: len(shown)] and packing.left_out == len(bins[packing.number]) - len(shown)
    assert json.loads(json.dumps(inspection.to_dict()))["splits"][0]["rows"] == 100


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_histograms_hold_every_value_and_have_round_borders(values) -> None:
    drawn = histogram(np.array(values))
    assert sum(drawn.counts) == len(values) and len(drawn.counts) == len(drawn.borders) - 1 <= 26
    assert list(drawn.borders) == sorted(set(drawn.borders)) and drawn.borders[0] == 0
    width = str(int(drawn.borders[1]))
    assert width.rstrip("0") in ("1", "2", "5")
    assert drawn.borders[-1] > max(values)


def test_far_outliers_share_the_last_bin() -> None:
    drawn = histogram(np.array([*range(100, 200)] * 10 + [30_000]))
    assert drawn.borders[-1] == 30_001 and drawn.borders[-2] <= 210 and drawn.counts[-1] == 1


def test_overlap() -> None:
    train = [*SOUND, chat("Who is that?", "Me."), chat("Who is that?", "Him.")]
    overlap = look(train, [SOUND[0], SOUND[0], chat("Who is that?", "You."), chat("Who was that?", "You.")]).overlap
    assert overlap is not None
    assert (overlap.rows, overlap.same, overlap.same_prompt) == (4, 2, 1)
    assert look(SOUND).overlap is None


def test_prompts_without_text_are_not_compared() -> None:
    texts = [dict(row) for row in TextEncoder(TOKENIZER).encode(["ab", "ac"])]  # type: ignore[arg-type]
    overlap = look(texts[:1], texts[1:], data=args(task_type="pretrain")).overlap
    assert overlap is not None and overlap.same == overlap.same_prompt == 0
    overlap = look([chat("", "a")], [chat("", "b")]).overlap
    assert overlap is not None and overlap.same_prompt == 0


def test_rows_of_another_tokenizer() -> None:
    with pytest.raises(ValueError, match="token id 259, and the tokenizer has 259 tokens"):
        look([{"input_ids": [1, 259], "labels": [1, 259]}])


# Samples


def test_samples_are_those_that_they_are_called() -> None:
    rows = [
        *SOUND,
        chat("x" * 300, "long"),
        chat("y", "z"),
        cut(SOUND[0], 45),
        cut(SOUND[1], 30),
        chat("Hm", "\U0001f642"),
    ]
    samples = {why: sample for sample in look(rows, samples=3).splits[0].samples for why in sample.why}
    lengths = [len(row["input_ids"]) for row in rows]
    shares = [supervised_tokens(row["labels"]) / len(row["labels"]) for row in rows]
    assert samples["longest"].row == np.argmax(lengths) and samples["shortest"].row == np.argmin(lengths)
    assert samples["most truncated"].row == 43 and samples["most truncated"].full_length == len(SOUND[1]["input_ids"])
    assert samples["unusual characters"].row == 44 and samples["lowest supervised share"].row == np.argmin(shares)
    assert samples["longest"].source == "train.jsonl" and samples["longest"].record == 41
    again = look(rows, samples=3).splits[0].samples
    assert again == look(rows, samples=3).splits[0].samples
    assert [s.row for s in again] != [s.row for s in look(rows, samples=3, seed=1).splits[0].samples]
    assert {"most truncated", "unusual characters"} & {
        why for s in look(SOUND).splits[0].samples for why in s.why
    } == set()


def test_rows_that_are_asked_for() -> None:
    samples = look(SOUND, rows={"train": [3, 0]}).splits[0].samples
    assert [(sample.row, sample.record) for sample in samples] == [(3, 4), (0, 1)]
    for row in (-1, 40):
        with pytest.raises(ValueError, match=f"there is no row {row} in train: its rows are 0 to 39"):
            look(SOUND, rows={"train": [row]})


def text_of(sample: Sample) -> str:
    return "".join(token.text for token in sample.tokens)


def test_long_rows_are_cut_in_the_middle() -> None:
    rows = [chat("a" * 500, "b" * 700)]
    whole = look(rows, most_tokens=None).splits[0].samples[0]
    assert whole.left_out == 0 and text_of(whole) == TOKENIZER.decode(rows[0]["input_ids"])
    short = look(rows, most_tokens=100).splits[0].samples[0]
    assert (
        len(short.tokens) == 100 and short.cut_at == 50 and short.left_out == short.length - 100 == whole.length - 100
    )
    assert [*short.tokens] == [*whole.tokens[:50], *whole.tokens[-50:]]
    assert look([chat("a" * 50, "b" * 30)], most_tokens=100).splits[0].samples[0].left_out == 0


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_token_texts_join_to_the_text(text) -> None:
    ids = TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokens = list(TokenTexts(TOKENIZER).tokens(ids, [True] * len(ids)))
    assert [token for each in tokens for token in each.ids] == ids
    if "\ufffd" not in text:
        assert "".join(each.text for each in tokens) == text
        assert [each.text for each in tokens] == list(text)  # one byte per token: characters are whole


def test_broken_characters_do_not_swallow_their_neighbours() -> None:
    ids = [0xF0 - 0xA1 + 0x5E, 65]  # any single token that is no character, before one that is
    broken = TOKENIZER.backend_tokenizer.encode("\U0001f642", add_special_tokens=False).ids
    texts = TokenTexts(TOKENIZER)
    assert [t.text for t in texts.tokens([*broken[:2], ids[1]], [True] * 3)][-1] == texts.decode([65])
    assert (
        len(list(texts.tokens(broken, [False, False, True, True]))) == 4
    )  # what is learned is never joined with what is not
    special = list(texts.tokens([*broken[:1], IM_END], [True, True]))
    assert special[-1].special and special[-1].text == "<|im_end|>"


@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "tokenizers/minimind", "models/stories260k"])
def test_token_texts_of_real_tokenizers(shared_data, name) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / name)
    texts = TokenTexts(tokenizer)
    for text in (
        "Hello  there,\n\tyou ",
        "\u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f680 \u65e5\u672c\u8a9e",
        "x = 3.5e-7;",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = list(texts.tokens(ids, [False] * len(ids)))
        assert "".join(token.text for token in tokens) == texts.decode(ids)
        assert not any("\ufffd" in token.text for token in tokens)
        start = len(ids) // 2
        late = list(texts.tokens(ids[start:], [False] * len(ids[start:]), before=ids[:start]))
        assert [token.ids for token in late][-1] == tokens[-1].ids
    vocabulary = texts.vocabulary()
    assert len(vocabulary) == len(tokenizer)
    assert all(vocabulary[token] == texts.alone(token) for token in range(0, len(tokenizer), 997))


@given(st.text(st.characters(), max_size=50))
@settings(max_examples=200, deadline=None)
def test_visible_texts_hold_nothing_that_acts(text) -> None:
    import unicodedata

    shown = visible(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or c in "\n\t\u200c\u200d" for c in shown)
    if all(c == "\n" or c.isprintable() for c in text):
        assert shown == text
