"""From conversations to token rows: what the model must produce at inference is supervised, nothing else.

A row is tokenised in pieces: each prompt apart from the answer that follows it, because at inference the prompt is
tokenised before the answer exists. A piece after an answer begins with the end-of-turn token, which is supervised too.

    text     <s>User: Hi\\nAssistant:| Hello!|</s>User: And?\\nAssistant:| Yes.|</s>
    labels   -100 ...               |  ids   |id  -100 ...             |  ids |id
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from hf_sft.data.formats import Conversation, check_messages, check_template_kwargs
from hf_sft.data.spans import EncodingError, Markers, SpanFinder, TemplateRefusal, template_tags, without_sentinels
from hf_sft.data.templates import resolve_template, special_tokens

__all__ = [
    "IGNORE",
    "ChatEncoder",
    "EncodingError",
    "TokenRow",
    "TrainOn",
    "encode_conversation",
    "encode_conversations",
]

IGNORE = -100
TrainOn = Literal["assistant", "last", "all"]
# A piece that continues a text is tokenised behind one of these where the tokenizer would put a space before it.
_ANCHORS = ("\n", ":", ">", "x")

# Which tokens of a piece are learned.
_ALL, _NONE, _FIRST, _REST = slice(None), slice(0), slice(1), slice(1, None)


class Piece(NamedTuple):
    """A part of a rendered conversation that is tokenised by itself."""

    text: str
    learned: slice
    written: bool = False  # by the model: it continues a prompt
    ends: bool = False  # begins with the token that ends a turn
    closes: bool = False  # behind a learned turn that ends the conversation


class TokenRow(TypedDict):
    """``labels`` has the length of ``input_ids``: the token itself where it is learned, else -100. Not shifted."""

    input_ids: list[int]
    labels: list[int]


def encode_conversation(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    train_on: TrainOn = "assistant",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> TokenRow:
    """Render and tokenise one conversation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: ``[{"role": ..., "content": ...}, ...]``; an assistant's message with ``train: false`` is not learned.
        tools: function schemas for the template.
        train_on: supervise every assistant turn with its end-of-turn token, the last one only, or all tokens but those of
            turns with ``train: false``.
        chat_template_kwargs: variables for the template.

    Returns:
        ``{"input_ids", "labels"}``; see :class:`TokenRow`.

    Raises:
        EncodingError: the supervised spans are not certain; or a text holds a special token.
        ValueError: the messages are not well formed, the tokenizer is slow or has no template.
    """
    conversation = Conversation(check_messages(messages), tools, check_template_kwargs(chat_template_kwargs))
    (row,) = encode_conversations(tokenizer, [conversation], train_on=train_on)
    if isinstance(row, EncodingError):
        raise row
    return row


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], *, train_on: TrainOn = "assistant"
) -> list[TokenRow | EncodingError]:
    """The token row of each conversation, or the error that says why it has none; see :func:`encode_conversation`."""
    return ChatEncoder(tokenizer).encode(conversations, train_on=train_on)


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token with which the model ends its turn under the tokenizer's template; None where that is not certain."""
    probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        labels = encode_conversation(tokenizer, probe)["labels"]
    except ValueError:
        return None
    return next(label for label in reversed(labels) if label != IGNORE)


# Attribute of a tokenizer: special tokens that the user has added, and that texts may therefore hold.
WANTED_TOKENS = "_hf_sft_wanted_tokens"


class ChatEncoder:
    """Encodes conversations with one tokenizer and template, batch by batch.

    The tokenizer must not change while it is in use.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text; the tokenizer's own by default.
        chat_template_kwargs: variables for the template; those of a conversation win.
        end_tail: end-of-turn tokens that are learned behind the one of a conversation's last turn, in place of what the
            template writes there. Nothing is added where everything is learned (``train_on`` all).

    Raises:
        ValueError: a slow tokenizer, or no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        *,
        end_tail: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_tail = end_tail
        self.backend = fast_backend(tokenizer)
        self.template = chat_template or resolve_template(tokenizer, None)
        self.template_kwargs = chat_template_kwargs or {}
        special = special_tokens(tokenizer)
        added = special | {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self.special = any_of(special)
        forbidden = forbidden_tokens(tokenizer, self.template)
        self.wanted = sorted(special - forbidden)
        self.forbidden = any_of(forbidden)
        border = re.compile(any_of(added).pattern + r"|\s")
        self.finder = SpanFinder(Markers(self.special, border, template_tags(self.template)))
        self.special_ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        self._adds_prefix = any(self._begins_otherwise(probe) for probe in ("a", " a", "1"))

    def _begins_otherwise(self, text: str) -> bool:
        """Whether the text has other tokens alone than behind a line break: a space is put before it, or removed."""
        alone, behind = self._tokenise([text, "\n" + text])
        return behind[-len(alone) :] != alone

    def encode(
        self, conversations: Iterable[Conversation], *, train_on: TrainOn = "assistant"
    ) -> list[TokenRow | EncodingError]:
        """The token row of each conversation, or the error that says why it has none."""
        if train_on not in ("assistant", "last", "all"):
            raise ValueError(f"train_on is {train_on!r}; it must be assistant, last or all")
        plans: list[list[Piece] | EncodingError] = []
        for conversation in conversations:
            try:
                plans.append(self._plan(conversation, train_on))
            except EncodingError as error:
                plans.append(EncodingError(without_sentinels(str(error))))
        ids = self._encode_pieces(piece for plan in plans if isinstance(plan, list) for piece in plan)
        return [plan if isinstance(plan, EncodingError) else self._assemble(plan, ids) for plan in plans]

    def _plan(self, conversation: Conversation, train_on: TrainOn) -> list[Piece]:
        """The rendered conversation cut into pieces."""
        messages = [{k: v for k, v in message.items() if k != "train"} for message in conversation.messages]
        self._refuse_special(conversation, messages)
        kwargs = {**self.template_kwargs, **(conversation.template_kwargs or {})}

        def render(turns: list[dict[str, Any]], generation_prompt: bool) -> str:
            return self._render(turns, conversation.tools, kwargs, generation_prompt)

        text = render(messages, False)
        turns = _turns_to_find(conversation.messages, train_on)
        # The turns of "all" are those that are left out of it, with the tokens that end them.
        around, inside, after = (_ALL, _NONE, _REST) if train_on == "all" else (_NONE, _ALL, _FIRST)
        if not turns:
            return [Piece(text, around)]
        context = f"{conversation.tools} {kwargs}" if conversation.tools or kwargs else ""
        pieces: list[Piece] = []
        position, learned = 0, around
        for span in self.finder.find(render, text, messages, turns, context):
            pieces.append(Piece(text[position : span.start], learned, ends=bool(pieces)))
            pieces.append(Piece(text[span.start : span.end], inside, written=True))
            position, learned = span.end, after
        closes = train_on != "all" and turns[-1] == len(messages) - 1
        return [*pieces, Piece(text[position:], learned, ends=True, closes=closes)]

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, kwargs: dict[str, Any], prompt: bool
    ) -> str:
        turns: Any = messages if messages else [[]]  # transformers takes an empty conversation in a batch alone
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
                **kwargs,
            )
            text = text if messages else text[0]
            text.encode("utf-8")
        except Exception as error:  # a template is code: it may raise whatever it likes
            raise TemplateRefusal(
                f"the chat template refuses the conversation: {type(error).__name__}: {error}"
            ) from None
        return text

    def _refuse_special(self, conversation: Conversation, messages: list[dict[str, Any]]) -> None:
        """A special token written as text would be read as that token: a turn could end inside a message."""
        texts = [f"{text}" for message in messages for text in message.values()]
        if conversation.tools:
            texts.append(str(conversation.tools))
        for text in texts:
            refuse_special(text, self.forbidden)

    def _encode_pieces(self, pieces: Iterable[Piece]) -> dict[tuple[str, bool], list[int] | EncodingError]:
        """Token ids of each distinct text, by (text, whether it continues a text)."""
        keys = list(dict.fromkeys((piece.text, piece.written and self._adds_prefix) for piece in pieces))
        anchor = _ANCHORS[0]
        ids: list[Any] = self._tokenise([anchor + text if continues else text for text, continues in keys])
        if self._adds_prefix:
            lead = self._tokenise([anchor])[0]
            for n, (text, continues) in enumerate(keys):
                if continues:
                    ids[n] = ids[n][len(lead) :] if ids[n][: len(lead)] == lead else self._continue(text)
        return dict(zip(keys, ids, strict=True))

    def _continue(self, text: str) -> list[int] | EncodingError:
        """Tokens of a text that continues another, for a tokenizer that begins each text with a space."""
        for anchor in _ANCHORS[1:]:
            lead, ids = self._tokenise([anchor, anchor + text])
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return EncodingError(
            f"the tokenizer cannot continue a text with {text[:20]!r}: it has no token border before it"
        )

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _assemble(
        self, plan: list[Piece], ids: dict[tuple[str, bool], list[int] | EncodingError]
    ) -> TokenRow | EncodingError:
        row = TokenRow(input_ids=[], labels=[])
        for piece in plan:
            tokens = ids[piece.text, piece.written and self._adds_prefix]
            if isinstance(tokens, EncodingError):
                return tokens
            if piece.ends and tokens[0] not in self.special_ids:
                return EncodingError(
                    "the tokenizer does not read the end-of-turn token as one token; do not split special tokens"
                )
            labels = [IGNORE] * len(tokens)
            labels[piece.learned] = tokens[piece.learned]
            if piece.closes and self.end_tail:
                tokens = labels = tokens[:1] * (1 + self.end_tail)
            row["input_ids"] += tokens
            row["labels"] += labels
        return row


def _turns_to_find(messages: Sequence[dict[str, Any]], train_on: TrainOn) -> tuple[int, ...]:
    """The assistant's turns that are learned or, where everything else is, those that are not.

    Raises:
        EncodingError: everything is to be learned but a message of another role.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on != "all":
        return tuple(i for i in (turns if train_on == "assistant" else turns[-1:]) if messages[i].get("train", True))
    left_out = tuple(i for i, message in enumerate(messages) if not message.get("train", True))
    others = [i for i in left_out if i not in turns]
    if others:
        raise EncodingError(
            f"message {others[0]} ({messages[others[0]]['role']}) has train: false, and train_on is all, which can leave "
            "out assistant turns alone; remove the mark, or set train_on to assistant"
        )
    return left_out


def fast_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, with truncation and padding off.

    Raises:
        ValueError: a slow tokenizer, which has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, and hf_sft needs a fast one. Load it with AutoTokenizer, "
            "or convert it so that its folder has a tokenizer.json."
        )
    # State that calls of the tokenizer leave behind; it sets what it needs at each call.
    backend.no_truncation()
    backend.no_padding()
    return backend


def forbidden_tokens(tokenizer: Any, template: str = "") -> set[str]:
    """Special tokens that texts must not hold: all but those that the user has added and the template does not write."""
    # bos, eos and their like stay forbidden as well: a turn could end inside a text.
    structure = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    wanted = set(getattr(tokenizer, WANTED_TOKENS, ())) - structure
    return special_tokens(tokenizer) - {token for token in wanted if token not in template}


def refuse_special(text: str, forbidden: re.Pattern[str]) -> None:
    """A special token written as text would be read as that token; raise EncodingError with its place."""
    found = forbidden.search(text)
    if found:
        around = text[max(0, found.start() - 20) : found.end() + 20]
        raise EncodingError(
            f"a text holds {found[0]!r} (...{around!r}...), which the tokenizer reads as a special token; "
            "remove it from the data, or name it in new_special_tokens if the template does not use it"
        )


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing at all if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")
