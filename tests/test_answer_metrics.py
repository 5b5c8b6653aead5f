"""Metrics of answers: equal to their libraries' own values and to cases worked out by hand; final answers of maths."""

from __future__ import annotations

import json
import math
import random
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft import answer_metrics
from hf_sft.answer_metrics import available, bleu_tokenizer, score_answers, words
from hf_sft.evaluation_checks import ANSWER_METRICS
from hf_sft.final_answers import final_answer, has_final_answer

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")
pytest.importorskip("rapidfuzz")

OFFLINE = [name for name in ANSWER_METRICS if name != "meteor"]  # what needs no data

REFERENCES = [
    "The quick brown fox jumps over the lazy dog, and isn't tired.",
    "She sold 48/2 = 24 clips in May.\n#### 72",
    "A cat sat on the mat.",
]
ANSWERS = [
    "A quick brown fox jumped over a lazy dog and is not tired.",
    "She sold 24 clips in May.\nIn total 48+24=72.\n#### 72.00",
    "A cat.",
]
CHINESE = (["我爱北京天安门,ABC 公司", "今天天气很好"], ["我爱北京的天安门。", "今天的天气很好"])
JAPANESE = (["私は東京に住んでいます。", "猫が好きだ"], ["私は京都に住んでいる。", "犬が好きです。"])


# --- the libraries' own values ----------------------------------------------------------------------------------------


def test_bleu_and_chrf_are_those_of_sacrebleu():
    import sacrebleu

    corpus, rows = score_answers(ANSWERS, REFERENCES, ["bleu", "chrf"])
    assert corpus["bleu"] == sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score > 5
    assert corpus["chrf"] == sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score > 20
    for row, answer, reference in zip(rows, ANSWERS, REFERENCES, strict=True):
        assert row == {
            "bleu": sacrebleu.sentence_bleu(answer, [reference]).score,
            "chrf": sacrebleu.sentence_chrf(answer, [reference]).score,
        }


@pytest.mark.parametrize("texts, name", [(CHINESE, "zh"), (JAPANESE, "ja-mecab"), ((ANSWERS, REFERENCES), "13a")])
def test_bleu_takes_the_tokenizer_of_the_language(texts, name):
    import sacrebleu

    answers, references = texts
    assert bleu_tokenizer(references) == name
    value = score_answers(answers, references, ["bleu"])[0]["bleu"]
    others = {
        other: sacrebleu.corpus_bleu(answers, [references], tokenize=other).score for other in ("13a", "zh", "ja-mecab")
    }
    assert value == others.pop(name) > 0
    assert name == "13a" or value != others["13a"]


def test_rouge_is_that_of_rouge_score_with_its_own_tokenizer_on_ascii():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    corpus, rows = score_answers(ANSWERS, REFERENCES, ["rouge"])
    expected = [
        {name: score.fmeasure for name, score in scorer.score(reference, answer).items()}
        for answer, reference in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert rows == expected
    for name in ("rouge1", "rouge2", "rougeL"):
        assert corpus[name] == pytest.approx(sum(row[name] for row in expected) / 3, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_words_of_rouge_are_those_of_rouge_score_on_any_ascii(text):
    from rouge_score.tokenizers import DefaultTokenizer

    assert answer_metrics._RougeTokens(False).tokenize(text) == DefaultTokenizer().tokenize(text)


def test_edit_distance_is_that_of_rapidfuzz():
    from rapidfuzz.distance import Levenshtein

    corpus, rows = score_answers(ANSWERS, REFERENCES, ["edit_distance"])
    for row, answer, reference in zip(rows, ANSWERS, REFERENCES, strict=True):
        assert row["edit_chars"] == Levenshtein.distance(answer, reference) / max(len(answer), len(reference))
    assert corpus["edit_chars"] == pytest.approx(sum(row["edit_chars"] for row in rows) / 3, abs=1e-15)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    """Precisions of 1- to 4-grams 5/6, 4/5, 3/4, 2/3, no brevity penalty: the fourth root of 1/3."""
    corpus, _ = score_answers(["a b c d e x"], ["a b c d e f"], ["bleu"])
    assert corpus["bleu"] == pytest.approx(100 * (1 / 3) ** 0.25, rel=1e-12)
    shorter, _ = score_answers(["a b c d e"], ["a b c d e f"], ["bleu"])
    assert shorter["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5), rel=1e-12)


def test_rouge_by_hand():
    """4 of 5 words in common, 2 of 4 pairs of words, longest common subsequence 3."""
    _, [row] = score_answers(["B a c d x"], ["a b c d, e!"], ["rouge"])
    assert row == pytest.approx({"rouge1": 4 / 5, "rouge2": 1 / 4, "rougeL": 3 / 5}, rel=1e-12)


def test_edit_distance_by_hand():
    corpus, rows = score_answers(["kitten", "a b c d"], ["sitting", "a x c"], ["edit_distance"])
    assert rows == [{"edit_chars": 3 / 7, "edit_words": 1.0}, {"edit_chars": 3 / 7, "edit_words": 2 / 4}]
    assert corpus == {"edit_chars": 3 / 7, "edit_words": 3 / 4}


def test_exact_match_ignores_outer_space_and_the_form_of_characters_alone():
    answers, references = [" caf\u00e9\n", "Yes", "a  b", "same"], ["cafe\u0301", "yes", "a b", "same"]
    corpus, rows = score_answers(answers, references, ["exact_match", "edit_distance"])
    assert [row["exact_match"] for row in rows] == [1, 0, 0, 1]
    assert [row["edit_chars"] == 0 for row in rows] == [True, False, False, True]
    assert corpus["exact_match"] == 0.5


# --- METEOR -----------------------------------------------------------------------------------------------------------


class WordNetStandIn:
    """Knows that dog and hound are one."""

    def synsets(self, word):
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in ("dog", "hound")]
        return [SimpleNamespace(lemmas=lambda: lemmas)] if word in ("dog", "hound") else []


def test_meteor_is_that_of_nltk(monkeypatch):
    score = pytest.importorskip("nltk.translate.meteor_score")
    stand_in = WordNetStandIn()
    monkeypatch.setattr(answer_metrics, "_has_wordnet", lambda: True)
    defaults = score.single_meteor_score.__defaults__
    place = next(
        n for n, value in enumerate(defaults) if type(value).__name__ in ("LazyCorpusLoader", "WordNetCorpusReader")
    )
    monkeypatch.setattr(
        score.single_meteor_score, "__defaults__", (*defaults[:place], stand_in, *defaults[place + 1 :])
    )
    assert "meteor" in available([])[0]
    corpus, rows = score_answers(["The hound sat.", "no"], ["the dog sat", "yes"], ["meteor"])
    expected = score.single_meteor_score(["the", "dog", "sat"], ["The", "hound", "sat", "."], wordnet=stand_in)
    assert rows == [{"meteor": expected}, {"meteor": 0.0}]
    assert corpus["meteor"] == expected / 2
    # precision 3/4, recall 1, mean P R / (0.9 P + 0.1 R), one chunk of three matches: penalty 0.5 / 27
    assert expected == pytest.approx(0.75 / (0.9 * 0.75 + 0.1) * (1 - 0.5 / 27), rel=1e-12)


def test_meteor_without_wordnet_says_how_to_get_it(monkeypatch):
    pytest.importorskip("nltk")
    monkeypatch.setattr(answer_metrics, "_has_wordnet", lambda: False)
    names, missing = available([])
    assert names == OFFLINE and list(missing) == ["meteor"] and "python -m nltk.downloader wordnet" in missing["meteor"]
    with pytest.raises(ValueError, match=r"WordNet data, .* python -m nltk\.downloader wordnet"):
        score_answers(["a"], ["a"], ["bleu", "meteor"])


# --- languages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "references, name",
    [
        ([""], "13a"),
        (["한국어 문장입니다"], "13a"),
        (["東京都", "はい、そうです", "京都", "大阪"], "ja-mecab"),  # short Japanese answers are often Han alone
        (["我们"] * 9 + ["はい"], "zh"),
        (["English text"] * 9 + ["中文的回答"], "zh"),
        (["English text"] * 10 + ["中文的回答"], "13a"),
        (["The characters 中国 mean China, and that is a long sentence."] * 3, "13a"),
        (["使用 PyTorch 训练 Transformer 模型"], "zh"),
    ],
)
def test_language_of_mixed_references(references, name):
    assert bleu_tokenizer(references) == name


def test_words():
    assert words("Don't pay $3.50!") == ["Don", "'", "t", "pay", "$", "3", ".", "50", "!"]
    assert words("我爱 PyTorch。") == ["我", "爱", "PyTorch", "。"]
    assert words("カタカナとー", japanese=False) == list("カタカナとー")
    assert words("猫が好きです。", japanese=True) == ["猫", "が", "好き", "です", "。"]
    assert words("नमस्ते दुनिया, ن\u200cك") == ["नमस्ते", "दुनिया", ",", "ن\u200cك"]
    assert words("👩\u200d👧 สวัสดี \r\n\u3000") == ["👩\u200d👧", "ส", "วั", "ส", "ดี"]
    assert words("cafe\u0301") == words("caf\u00e9") == ["caf\u00e9"]


def test_chinese_and_japanese_are_compared_by_their_tokens():
    _, rows = score_answers(*CHINESE, ["rouge", "edit_distance"])
    assert rows[1]["rouge1"] == pytest.approx(2 * 1 * (6 / 7) / (1 + 6 / 7), rel=1e-12)
    assert rows[1]["edit_words"] == 1 / 7
    _, rows = score_answers(*JAPANESE, ["rouge", "edit_distance"])  # 猫 が 好き だ, 犬 が 好き です 。
    assert rows[1]["rouge1"] == pytest.approx(2 / 4, rel=1e-12)
    assert rows[1]["edit_words"] == 3 / 5


def test_japanese_without_mecab_is_refused(monkeypatch):
    monkeypatch.setattr(answer_metrics, "_has_mecab", lambda: False)
    names, missing = available(OFFLINE, JAPANESE[1])
    assert names == ["chrf", "exact_match"]
    assert 'pip install "sacrebleu[ja]"' in missing["bleu"] == missing["rouge"] == missing["edit_distance"]
    with pytest.raises(ValueError, match=r'bleu, rouge: the references are Japanese.*pip install "sacrebleu\[ja\]"'):
        score_answers(*JAPANESE, ["rouge", "bleu", "chrf"])
    assert score_answers(*JAPANESE, ["chrf"])[0]["chrf"] > 0
    assert available([], CHINESE[1])[0][:3] == ["bleu", "chrf", "rouge"]


# --- final answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("#### 42", 42),
        ("x\n#### $1,000.00 per day.\nmore 7", 1000),
        ("first #### 1 and \n#### 2", 2),
        ("#### 5\n#### ", 5),
        (r"\boxed{1} or #### 3", 3),
        (r"#### 3 or \boxed{1}", 1),
        (r"so \(\boxed{\frac{1}{2}}\).", Fraction(1, 2)),
        (r"\boxed{\dfrac{-3}{4}}", Fraction(-3, 4)),
        (r"\boxed{-\frac34}", Fraction(-3, 4)),
        (r"\boxed{3\frac{1}{2}}", Fraction(7, 2)),
        (r"\boxed{0.50\%}", Fraction(1, 2)),
        (r"\boxed{\$18}", 18),
        (r"\boxed{12\text{ cm}^2}", 12),
        (r"\boxed{90^\circ}", 90),
        (r"\boxed{1{,}234{,}567}", 1234567),
        (r"\boxed{y = -3}", -3),
        (r"\boxed{x^{2}+{\sqrt{2}}}", r"x^{2}+{\sqrt{2}}"),
        (r"\boxed{5x}", "5x"),
        (r"\boxed{2\pi}", r"2\pi"),
        (r"\boxed{\left( 1,\,2 \right)}", "(1,2)"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{4", 4),
        ("#### **18 apples**", 18),
        ("#### 1/0", "1/0"),
        ("It is 3 and then 1,234.5.", Fraction("1234.5")),
        ("10-3", 3),
        ("it is -7 degrees", -7),
        ("that leaves 3/4", Fraction(3, 4)),
        ("a half is .5", Fraction(1, 2)),
        ("it costs -$5", -5),
        ("the sum \N{MINUS SIGN}2", -2),
        ("#### 3 million", 3_000_000),
        ("#### 3 dozen", 36),
        ("#### $1.5 million", 1_500_000),
        ("#### 1.5 million dollars", 1_500_000),
        ("#### 2 Hundred Thousand people", 200_000),
        (r"\boxed{3\text{ billion}}", 3 * 10**9),
        ("#### 3/4 trillion", 75 * 10**10),
        ("they need 2 dozens of eggs", 24),
        ("it is -5 thousand.", -5000),
        ("#### 3 hundredths", 3),
        ("#### 3 millionaires", 3),
        ("#### $5k", 5000),
        ("#### $1.5M per year", 1_500_000),
        ("it costs €2bn.", 2 * 10**9),
        ("#### 5k", "5k"),
        ("a line $x$ 5 m", 5),
        (r"\boxed{$5k$}", "5k"),
        ("#### 5 m", 5),
        ("$5 meters", 5),
        ("#### 5 1/2", Fraction(11, 2)),
        ("#### -5 1/2 cups", Fraction(-11, 2)),
        ("she walks 1,005 3/4 miles", Fraction(4023, 4)),
        ("#### 2 1/2 dozen", 30),
        ("there are 3 4/2", 2),
        ("#### 3 4/2", "34/2"),
        ("it was 7 0/5", 7),
        ("rows 4 5", 5),
        ("only 0", 0),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_final_answers(text, value):
    assert final_answer(text) == value


def test_final_answers_count_where_the_reference_has_one():
    answers = ["It is 1000.0", "1001", "whatever 3", r"\boxed{\tfrac{2}{4}}", "", "a #### 5"]
    references = ["#### 1,000", "#### 1,000", "the answer is 3", r"thus \boxed{0.5}", "#### 0", "#### 5%"]
    corpus, rows = score_answers(answers, references, ["final_answer"])
    assert rows == [{"final_answer": value} for value in (1, 0)] + [{}] + [
        {"final_answer": value} for value in (1, 0, 1)
    ]
    assert corpus == {"final_answer": 3 / 5}
    assert [has_final_answer(reference) for reference in references] == [True, True, False, True, True, True]


def test_without_any_final_answer_the_value_is_left_out():
    corpus, rows = score_answers(["3"], ["3"], ["final_answer", "exact_match"])
    assert corpus == {"exact_match": 1.0} and rows == [{"exact_match": 1.0}]
    assert "no reference has a final answer" in available(["final_answer"], ["3"])[1]["final_answer"]


def test_gsm8k_references_answer_themselves(shared_data):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    numbers = [solution.rsplit("#### ", 1)[1].replace(",", "") for solution in solutions]
    assert [final_answer(solution) for solution in solutions] == [Fraction(number) for number in numbers]
    spoken = [f"Well, 12 times 3: it is ${number}.00." if "." not in number else number for number in numbers]
    assert score_answers(spoken, solutions, ["final_answer"])[0] == {"final_answer": 1.0}


# --- anything goes in -------------------------------------------------------------------------------------------------

ODD = [
    "",
    " \n\t",
    "👩\u200d👩\u200d👧",
    "مرحبا بالعالم",
    "\u202e\u200f",
    "a\x00b",
    "日本語のテキスト",
    "中文",
    "\u0301",
    "\\boxed{",
    "{" * 99,
]


def test_odd_texts_give_finite_values_and_equal_texts_the_best():
    rng = random.Random(0)
    answers, references = rng.choices(ODD, k=60), rng.choices(ODD, k=60)
    for corpus, rows in (score_answers(answers, references, OFFLINE), score_answers([""], [""], OFFLINE)):
        values = [*corpus.values(), *(value for row in rows for value in row.values())]
        assert all(type(value) is float and math.isfinite(value) for value in values)
    corpus, rows = score_answers(ODD, ODD, OFFLINE)
    assert corpus["exact_match"] == 1 and corpus["edit_chars"] == corpus["edit_words"] == 0
    assert [row["rouge1"] for row in rows[3:4]] == [1.0]


def test_degenerate_answers_take_no_time():
    long = [
        r"\boxed{" * 5000,
        "1," * 9000,
        " " * 30000 + "1",
        r"\frac" * 5000,
        "{" * 20000,
        "#### 1" + " " * 20000 + "!",
    ]
    assert [final_answer(text) for text in long] == [None, 1, 1, None, None, "1!"]


@pytest.mark.parametrize(
    "answers, references, names, message",
    [
        ([], [], ["bleu"], "no answer"),
        (["a"], [], ["bleu"], "1 answers and 0 references"),
        (["a"], ["a"], ["blue", "bleu"], "no metric blue; choose from bleu, chrf"),
    ],
)
def test_bad_input(answers, references, names, message):
    with pytest.raises(ValueError, match=message):
        score_answers(answers, references, names)


def test_absent_packages_are_named_with_their_installation(monkeypatch):
    absent = ("sacrebleu", "rouge_score", "nltk", "rapidfuzz")
    monkeypatch.setattr(answer_metrics, "_found", lambda module: module not in absent)
    names, missing = available([])
    assert names == ["exact_match", "final_answer"]
    assert missing["rouge"] == "rouge needs rouge_score, which is not installed: pip install rouge-score"
    assert 'pip install "sacrebleu[ja]"' in missing["bleu"] and "pip install nltk" in missing["meteor"]
    with pytest.raises(ValueError, match="pip install rapidfuzz"):
        score_answers(["a"], ["a"], ["edit_distance"])
    assert available(["exact_match"]) == (["exact_match"], {})
    with pytest.raises(ValueError, match="no metric f1"):
        available(["f1"])


def test_the_module_itself_needs_no_optional_package():
    import subprocess

    code = "import sys, hf_sft.answer_metrics; print({'sacrebleu', 'nltk', 'rapidfuzz', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
