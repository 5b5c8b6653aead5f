"""Scores of generated answers against references: BLEU, chrF, ROUGE, METEOR, edit distance, exact match, final answers."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import regex

from hf_sft.evaluation_checks import ANSWER_METRICS
from hf_sft.final_answers import final_answer, has_final_answer

Scores = tuple[dict[str, float], list[dict[str, float]]]  # of the corpus, and of each row

_PACKAGES = {  # name -> the modules it needs, and what installs them
    "bleu": (("sacrebleu",), '"sacrebleu[ja]"'),
    "chrf": (("sacrebleu",), '"sacrebleu[ja]"'),
    "rouge": (("rouge_score",), "rouge-score"),
    "meteor": (("nltk",), "nltk"),
    "edit_distance": (("rapidfuzz",), "rapidfuzz"),
}
_BY_WORDS = ("bleu", "rouge", "meteor", "edit_distance")  # words of Japanese are found by MeCab
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}\u30fc]")
_HAN, _LETTER = regex.compile(r"\p{Han}"), regex.compile(r"\p{L}")
# A token is a run of letters, marks and digits (with the invisible joiners of Persian and Indic scripts), or one character as it
# is seen (a grapheme cluster): all others, and those of scripts that put no spaces between words.
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_TOKEN = regex.compile(
    rf"(?!{_SPACELESS})[\p{{L}}\p{{N}}](?:(?!{_SPACELESS})[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d])*|(?!\s)\X"
)
_WORD = regex.compile(r"[\p{L}\p{N}]")


def available(names: Sequence[str], references: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    r"""Which metrics can be computed here.

    Args:
        names: of ``ANSWER_METRICS``; none: all of them.
        references: if given, what they need is looked at too: Japanese needs MeCab, ``final_answer`` a marked answer.

    Returns:
        The names that can be computed, and for the others a sentence that says what is missing and how it is installed.

    Raises:
        ValueError: unknown names.
    """
    _refuse_unknown(names)
    asked = [name for name in ANSWER_METRICS if not names or name in names]
    japanese = _language(references) == "ja" and not _has_mecab()
    missing = {}
    for name in asked:
        reason = _missing(name)
        if reason is None and japanese and name in _BY_WORDS:
            reason = _NO_MECAB
        if reason is None and name == "final_answer" and references and not any(map(has_final_answer, references)):
            reason = r"no reference has a final answer (#### 42 or \boxed{42})"
        if reason is not None:
            missing[name] = reason
    return [name for name in asked if name not in missing], missing


def score_answers(answers: Sequence[str], references: Sequence[str], names: Sequence[str]) -> Scores:
    r"""Score each answer against its reference.

    ============== ================================================================================================== ========
    name           value                                                                                              of equals
    ============== ================================================================================================== ========
    bleu           sacrebleu's corpus BLEU (arXiv 1804.08771), tokenizer by ``bleu_tokenizer``; a row: its sentence   100
                   BLEU with ``effective_order``
    chrf           sacrebleu's corpus chrF2: character 6-grams, no words; a row: its sentence chrF                    100
    rouge1/2/L     rouge-score's F measure without stemming, over ``words`` without punctuation; mean over rows       1
    meteor         nltk's METEOR with WordNet's synonyms, over ``words``; mean over rows                              below 1
    edit_chars     Levenshtein distance over code points / the longer length, by rapidfuzz; mean over rows            0
    edit_words     the same over ``words``                                                                            0
    exact_match    1 for equal texts, else 0; mean over rows                                                          1
    final_answer   1 for equal ``final_answer``, else 0; mean over the rows whose reference has a marked one          1
    ============== ================================================================================================== ========

    Edit distance and exact match compare texts in Unicode's form NFC and without space at both ends, so that an exact match is an
    edit distance of 0; case and punctuation count. ``words`` follows the language of all references.

    Args:
        answers: what was generated.
        references: as many texts.
        names: of ``ANSWER_METRICS``; each gives the values that are listed there.

    Returns:
        The values of the corpus, and those of each row, none of them NaN. ``final_answer`` is left out of a row whose reference
        has no marked final answer, and out of the corpus where no reference has one.

    Raises:
        ValueError: no rows, different lengths, unknown names, or names that cannot be computed here.
    """
    if len(answers) != len(references):
        raise ValueError(f"there are {len(answers)} answers and {len(references)} references: each answer needs one")
    if not answers:
        raise ValueError("there is no answer to score: give at least one")
    _refuse_unknown(names)
    language = _language(references)
    wanted = [name for name in ANSWER_METRICS if name in names]
    reasons = [reason for name in wanted if (reason := _missing(name)) is not None]
    if language == "ja" and not _has_mecab() and (by_words := [name for name in wanted if name in _BY_WORDS]):
        reasons.append(f"{', '.join(by_words)}: {_NO_MECAB}")
    if reasons:
        raise ValueError("; ".join(reasons))
    corpus: dict[str, float] = {}
    rows: list[dict[str, float]] = [{} for _ in answers]
    for name in wanted:
        values, of_rows = _SCORERS[name](answers, references, language)
        corpus |= values
        for row, scores in zip(rows, of_rows, strict=True):
            row |= scores
    return corpus, rows


def bleu_tokenizer(references: Sequence[str]) -> str:
    """The tokenizer of sacrebleu that suits the references: ``ja-mecab``, ``zh`` or ``13a``.

    A reference is Chinese or Japanese if a quarter of its letters are Han characters or kana. Where a tenth of the references
    are, the corpus is Japanese if a quarter of these hold kana (a tenth of such characters), else Chinese; any other corpus is
    cut by 13a. The tokenizer ``zh`` cuts what is not Chinese as 13a does, and MeCab splits other scripts at spaces and
    punctuation, so that mixed corpora are in good hands.
    """
    return {"ja": "ja-mecab", "zh": "zh"}.get(_language(references), "13a")


def words(text: str, japanese: bool = False) -> list[str]:
    """The tokens of METEOR and of the word edit distance, and without punctuation of ROUGE.

    Runs of letters and digits, and every other visible character by itself. In scripts without spaces (Chinese, kana, Thai, Lao,
    Khmer, Burmese) each character is a token, its marks included. The text is brought to Unicode's form NFC before.

    Args:
        japanese: cut by MeCab instead, with the IPA dictionary of sacrebleu's ``ja-mecab``.
    """
    text = unicodedata.normalize("NFC", text)
    if japanese:
        return _mecab()(" ".join(text.split())).split()
    return _TOKEN.findall(text)


# --- what is there ----------------------------------------------------------------------------------------------------

_NO_MECAB = (
    'the references are Japanese, whose words are found by MeCab, which is not installed: pip install "sacrebleu[ja]"'
)


def _refuse_unknown(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in ANSWER_METRICS]:
        raise ValueError(f"there is no metric {', '.join(unknown)}; choose from {', '.join(ANSWER_METRICS)}")


def _missing(name: str) -> str | None:
    """What a metric lacks here, and how it is installed."""
    modules, package = _PACKAGES.get(name, ((), ""))
    if absent := [module for module in modules if not _found(module)]:
        return f"{name} needs {', '.join(absent)}, which is not installed: pip install {package}"
    if name == "meteor" and not _has_wordnet():
        return (
            "meteor needs nltk's WordNet data, which is not installed (without synonyms it would be another metric): "
            "python -m nltk.downloader wordnet"
        )
    return None


def _found(module: str) -> bool:
    return module in sys.modules or find_spec(module) is not None


def _has_mecab() -> bool:
    return _found("MeCab") and _found("ipadic")


def _has_wordnet() -> bool:
    import nltk

    for path in ("corpora/wordnet.zip", "corpora/wordnet"):
        try:
            nltk.data.find(path)
            return True
        except LookupError:
            continue
    return False


# --- languages and tokens ---------------------------------------------------------------------------------------------


def _language(references: Sequence[str]) -> str:
    """``ja``, ``zh`` or nothing, by the rule of ``bleu_tokenizer``."""
    japanese = chinese = 0
    for text in references:
        kana, han = len(_KANA.findall(text)), len(_HAN.findall(text))
        if not kana + han or (kana + han) * 4 < len(_LETTER.findall(text)):
            continue
        if kana * 10 >= kana + han:
            japanese += 1
        else:
            chinese += 1
    if not japanese + chinese or (japanese + chinese) * 10 < len(references):
        return ""
    return "ja" if japanese * 4 >= japanese + chinese else "zh"


@cache
def _mecab() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_ja_mecab import TokenizerJaMecab

    return TokenizerJaMecab()


class _RougeTokens:
    """The tokenizer that rouge-score asks for: lower case, words alone. On ASCII it is rouge-score's own."""

    def __init__(self, japanese: bool) -> None:
        self.japanese = japanese

    def tokenize(self, text: str) -> list[str]:
        return [word for word in words(text.lower(), self.japanese) if _WORD.search(word)]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


# --- the metrics ------------------------------------------------------------------------------------------------------


def _bleu(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    from sacrebleu.metrics import BLEU

    tokenizer = bleu_tokenizer(references)
    corpus = BLEU(tokenize=tokenizer, force=True)  # force: no advice about texts that look tokenised
    sentence = BLEU(tokenize=tokenizer, force=True, effective_order=True)
    rows = [{"bleu": sentence.sentence_score(*pair).score} for pair in _pairs(answers, references)]
    return {"bleu": corpus.corpus_score(list(answers), [list(references)]).score}, rows


def _chrf(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    rows = [{"chrf": chrf.sentence_score(*pair).score} for pair in _pairs(answers, references)]
    return {"chrf": chrf.corpus_score(list(answers), [list(references)]).score}, rows


def _pairs(answers: Sequence[str], references: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [(answer, [reference]) for answer, reference in zip(answers, references, strict=True)]


def _rouge(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    from rouge_score.rouge_scorer import RougeScorer

    names = list(ANSWER_METRICS["rouge"])
    scorer = RougeScorer(names, tokenizer=_RougeTokens(language == "ja"))
    scored = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return _with_means([{name: float(score[name].fmeasure) for name in names} for score in scored])


def _meteor(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    from nltk.translate.meteor_score import single_meteor_score

    def score(answer: str, reference: str) -> float:
        return float(single_meteor_score(words(reference, language == "ja"), words(answer, language == "ja")))

    return _with_means([{"meteor": score(*pair)} for pair in zip(answers, references, strict=True)])


def _edit_distance(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    from rapidfuzz.distance import Levenshtein

    rows = []
    for answer, reference in zip(map(_normal, answers), map(_normal, references), strict=True):
        by_words = Levenshtein.normalized_distance(words(answer, language == "ja"), words(reference, language == "ja"))
        rows.append({"edit_chars": Levenshtein.normalized_distance(answer, reference), "edit_words": by_words})
    return _with_means(rows)


def _exact_match(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    pairs = zip(answers, references, strict=True)
    return _with_means([{"exact_match": float(_normal(answer) == _normal(reference))} for answer, reference in pairs])


def _final_answer(answers: Sequence[str], references: Sequence[str], language: str) -> Scores:
    rows = [
        {"final_answer": float(final_answer(answer) == final_answer(reference))} if has_final_answer(reference) else {}
        for answer, reference in zip(answers, references, strict=True)
    ]
    means, _ = _with_means([row for row in rows if row])
    return means, rows


def _with_means(rows: list[dict[str, float]]) -> Scores:
    """The mean of each name over the rows, and the rows."""
    return {name: fmean(row[name] for row in rows) for name in (rows[0] if rows else ())}, rows


_SCORERS: dict[str, Callable[[Sequence[str], Sequence[str], str], Any]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "meteor": _meteor,
    "edit_distance": _edit_distance,
    "exact_match": _exact_match,
    "final_answer": _final_answer,
}
