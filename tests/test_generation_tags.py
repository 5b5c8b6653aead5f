"""Spans from {% generation %} tags: what the author says is learned, from the prompt's end to the end of turn."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from hf_sft.data.chat import IGNORE, EncodingError, encode_conversation
from hf_sft.data.generation_tags import split_marks, with_marks
from hf_sft.data.skeletons import MARKS

HI, HELLO = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello you"}
AGAIN, BYE = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Bye now"}
TWO = [HI, HELLO, AGAIN, BYE]
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(answer: str, before: str = "", prompt: str = PROMPT) -> str:
    """ChatML with an assistant's turn of its own."""
    user = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    body = f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}{user}{{% endif %}}"
    return f"{before}{{% for m in messages %}}{body}{{% endfor %}}{prompt}"


def spans(text: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    tokenizer = tiny.tiny_tokenizer(text)
    row = encode_conversation(tokenizer, messages, **options)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    found: list[list[int]] = [[]]
    for label in row["labels"]:
        if label != IGNORE:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run) for run in found if run]


START = "<|im_start|>assistant\n"
PLAIN = ["Hello you<|im_end|>", "Bye now<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (START + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", PLAIN),
        (START + "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", PLAIN),
        # The end of turn left out, by the whitespace too.
        (START + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", PLAIN),
        (START + "{%- generation -%}  {{ m.content }}\n{%- endgeneration -%}  <|im_end|>\n", PLAIN),
        (START + "{% generation %}{{ m.content }}{% endgeneration %}\n\n<|im_end|>", [f"{x[:-10]}\n<|im_end|>" for x in PLAIN]),
        # The tag begins before the prompt ends, or after it.
        ("{% generation %}" + START + "{{ m.content }}<|im_end|>{% endgeneration %}\n", PLAIN),
        (START + "<think>\n\n</think>\n\n{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", PLAIN),
        (START + "{% generation %}\n{{ m.content + '<|im_end|>\n' }}\n{%+ endgeneration +%}", PLAIN),
        # Two regions that touch are one; of two that do not touch, neither is believed, nor a tag around something else.
        (START + "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}\n", PLAIN),
        (
            START + "{% generation %}So. {% endgeneration %}Now: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n",
            [f"So. Now: {x}" for x in PLAIN],
        ),
        (START + "{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}\n", PLAIN),
        (
            START + "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
            "{% else %}{{ m.content }}<|im_end|>{% endif %}\n", PLAIN,
        ),
        # What the finder cannot know without tags: the text is not as it was given.
        (
            START + "{% generation %}{{ m.content | upper }}<|im_end|>{% endgeneration %}\n",
            ["HELLO YOU<|im_end|>", "BYE NOW<|im_end|>"],
        ),
        (
            "{% generation %}" + START + "{{ m.content | upper }}{% endgeneration %}<|im_end|>\n",
            ["HELLO YOU<|im_end|>", "BYE NOW<|im_end|>"],
        ),
        (
            START + "{% generation %}{{ m.content | replace('e', 'e<|im_start|>') }}\n{% endgeneration %}<|im_end|>",
            ["He<|im_start|>llo you\n<|im_end|>", "Bye<|im_start|> now\n<|im_end|>"],
        ),
    ],
)  # fmt: skip
def test_tags(answer: str, expected: list[str]) -> None:
    text = template(answer)
    assert spans(text, TWO) == expected
    assert spans(text, TWO, train_on="last") == expected[1:]
    assert spans(text, [HI, {**HELLO, "train": False}, AGAIN, BYE]) == expected[1:]
    assert spans(text, [HI, HELLO, AGAIN, {**BYE, "train": False}]) == expected[:1]
    (all_but,) = spans(text, [HI, HELLO, AGAIN, {**BYE, "train": False}], train_on="all")[:1]
    assert expected[0] in all_but
    assert expected[1].removesuffix("<|im_end|>") not in all_but


def test_tags_in_macros_and_blocks() -> None:
    """The tracker of transformers counts from the macro's beginning there; marks in the text do not."""
    turn = START + "{% generation %}{{ text }}<|im_end|>\n{% endgeneration %}"
    macro = template("{{ turn(m.content) }}", f"{{% macro turn(text) %}}{turn}{{% endmacro %}}")
    block = template(f"{{% set text = m.content %}}{{% set turn %}}{turn}{{% endset %}}{{{{ turn }}}}")
    for text in (macro, block):
        assert spans(text, TWO) == PLAIN
        shouted = text.replace("{{ text }}", "{{ text | upper }}")
        assert spans(shouted, TWO) == ["HELLO YOU<|im_end|>", "BYE NOW<|im_end|>"]


def test_a_prompt_that_the_template_refuses() -> None:
    """Where tags say what is learned, a template that writes no generation prompt will do."""
    strict = "{% if add_generation_prompt %}{{ raise_exception('for training only') }}{% endif %}"
    answer = START + "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    assert spans(template(answer, strict, ""), TWO) == PLAIN
    with pytest.raises(EncodingError, match="for training only"):
        spans(
            template(answer.replace("generation %}", "if true %}", 1).replace("endgeneration", "endif"), strict, ""),
            TWO,
        )


def test_user_texts_that_the_template_changes() -> None:
    answer = START + "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    text = template(answer).replace(
        "{{ m.content }}<|im_end|>\n{% endif", "{{ m.content | tojson }}<|im_end|>\n{% endif"
    )
    assert spans(text, [{"role": "user", "content": 'say "x"'}, {"role": "assistant", "content": 'x"y"'}]) == [
        'x"y"<|im_end|>'
    ]


def test_no_end_of_turn() -> None:
    bare = template(START + "{% generation %}{{ m.content }}{% endgeneration %}\n")
    for messages in (TWO, TWO[:2]):
        with pytest.raises(EncodingError, match="begins every turn, so the model would not learn to stop"):
            spans(bare, messages)


def test_thinking_that_the_prompt_opens() -> None:
    """The tag holds <think>, and so does the prompt: it is not learned."""
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    answer = (
        START
        + "{% generation %}<think>\n{{ m.reasoning_content }}\n</think>\n{{ m.content }}<|im_end|>{% endgeneration %}\n"
    )
    messages = [HI, {**HELLO, "reasoning_content": "so"}]
    assert spans(template(answer, prompt=prompt), messages) == ["so\n</think>\nHello you<|im_end|>"]
    assert spans(template(answer), messages) == ["<think>\nso\n</think>\nHello you<|im_end|>"]


def test_a_tag_that_reaches_over_the_next_header_is_not_believed() -> None:
    over = (
        START
        + "{% generation %}{{ m.content }}<|im_end|>\n{% if not loop.last %}<|im_start|>user\n{% endif %}{% endgeneration %}"
    )
    text = template(over).replace("<|im_start|>{{ m.role }}\n", "{% if loop.first %}<|im_start|>user\n{% endif %}")
    assert spans(text, TWO) == PLAIN
    always = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n<|im_start|>user\n"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n<|im_start|>assistant\n{% endif %}{% endfor %}"
    )
    for messages in (TWO, TWO[:2]):
        with pytest.raises(
            EncodingError, match="writes 'user' behind the last special token of the assistant's message 1"
        ):
            spans(always, messages)


def test_a_tagged_first_turn_whose_prompt_cannot_be_rendered() -> None:
    """The tag may hold what the prompt would: a line break, or the whole header."""
    first = "{% if messages[0]['role'] == 'system' %}{% endif %}"
    for answer in (
        "<|im_start|>assistant{% generation %}\n{{ m.content }}<|im_end|>{% endgeneration %}\n",
        "{% generation %}" + START + "{{ m.content }}<|im_end|>{% endgeneration %}\n",
        START + "{% generation %}<think>\n\n</think>\n\n{{ m.content }}<|im_end|>{% endgeneration %}\n",
    ):
        with pytest.raises(EncodingError, match=r"begins with the assistant, .* train: false"):
            spans(template(answer, first), [HELLO, HI, BYE])
    assert spans(template(answer, first), [{**HELLO, "train": False}, HI, BYE])[0].endswith("Bye now<|im_end|>")


def test_a_tagged_header_without_a_prompt() -> None:
    """Tags are believed where the template writes no prompt, but not if they hold the header."""
    strict = "{% if add_generation_prompt %}{{ raise_exception('for training only') }}{% endif %}"
    answer = "{% generation %}" + START + "{{ m.content }}<|im_end|>\n{% endgeneration %}"
    with pytest.raises(EncodingError, match="for training only"):
        spans(template(answer, strict, ""), TWO)


def test_marks_stand_where_the_tags_do() -> None:
    opened, closed = MARKS[4:]
    assert with_marks("{{ messages }}") is None
    marked = with_marks("a {%- generation -%} b {%- endgeneration +%} c")
    assert marked is not None
    rendered = tiny.tiny_tokenizer().apply_chat_template([HI], chat_template=marked, tokenize=False)
    assert rendered == f"a{opened}b{closed} c"
    assert split_marks(rendered) == ("ab c", [(1, 2)])
    for broken in (f"a{opened}b", f"a{closed}b", f"{opened}{opened}a{closed}{closed}", f"{closed}a{opened}"):
        assert split_marks(broken) is None
    assert split_marks(f"{opened}{closed}a{opened}b{closed}{opened}c{closed}") == ("abc", [(1, 3)])
