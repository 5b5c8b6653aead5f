"""From conversations to token rows: what the model must produce at inference is supervised, nothing else.

A row is tokenised in pieces: each prompt apart from the answer that follows it, because at inference the prompt is
tokenised before the answer exists. A piece after an answer begins with the end-of-turn token, which is supervised too.

    text     <s>User: Hi\\nAssistant:| Hello!|</s>User: And?\\nAssistant:| Yes.|</s>
    labels   -100 ...               |  ids   |id  -100 ...             |  ids |id
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

from hf_sft.data.borders import find_openers
from hf_sft.data.generation_tags import with_marks
from hf_sft.data.messages import Conversation, check_messages, check_template_kwargs
from hf_sft.data.pieces import ALL, FIRST, NONE, REST, Key, Piece, PieceTokenizer, fast_backend
from hf_sft.data.skeletons import Messages, any_of, assistant_turns, refuse_marks
from hf_sft.data.spans import (
    EncodingError,
    Markers,
    Rendering,
    SpanFinder,
    TemplateRefusal,
    template_tags,
    without_sentinels,
)
from hf_sft.data.special import HiddenTokens, SpecialTokenError, SpecialTokensInText, check_choice, refuse_special
from hf_sft.data.templates import WANTED_TOKENS, forbidden_tokens, resolve_template, special_tokens

__all__ = [
    "IGNORE",
    "WANTED_TOKENS",
    "ChatEncoder",
    "EncodingError",
    "SpecialTokenError",
    "TokenRow",
    "TrainOn",
    "any_of",
    "encode_conversation",
    "encode_conversations",
    "end_of_turn_id",
    "fast_backend",
    "forbidden_tokens",
]

IGNORE = -100
TrainOn = Literal["assistant", "last", "all"]


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
    special_tokens_in_text: SpecialTokensInText = "refuse",
) -> TokenRow:
    """Render and tokenise one conversation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: ``[{"role": ..., "content": ...}, ...]``; an assistant's message with ``train: false`` is not learned.
        tools: function schemas for the template.
        train_on: supervise every assistant turn with its end-of-turn token, the last one only, or all tokens but those of
            turns with ``train: false``.
        chat_template_kwargs: variables for the template.
        special_tokens_in_text: what to do with texts that hold special tokens: ``refuse`` them, or keep them as ``text``,
            without the tokens' meaning.

    Returns:
        ``{"input_ids", "labels"}``; see :class:`TokenRow`.

    Raises:
        EncodingError: the supervised spans are not certain; or a text holds a special token (SpecialTokenError).
        ValueError: the messages are not well formed, the tokenizer is slow or has no template.
    """
    conversation = Conversation(check_messages(messages), tools, check_template_kwargs(chat_template_kwargs))
    encoder = ChatEncoder(tokenizer, special_tokens_in_text=special_tokens_in_text)
    (row,) = encoder.encode([conversation], train_on=train_on)
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


class ChatEncoder:
    """Encodes conversations with one tokenizer and template, batch by batch.

    The tokenizer must not change while it is in use.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text; the tokenizer's own by default.
        chat_template_kwargs: variables for the template; those of a conversation win.
        end_tail: end-of-turn tokens that are learned behind the one of a conversation's last turn, in place of what the
            template writes there. Nothing is added where everything is learned (``train_on`` all).
        special_tokens_in_text: ``refuse`` conversations whose texts hold special tokens, or keep these as ``text``: ordinary
            tokens in the text's letters, in any message and in the tools. Then ``special_tokens_met`` counts the
            conversations that hold each.

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
        special_tokens_in_text: SpecialTokensInText = "refuse",
    ) -> None:
        check_choice(special_tokens_in_text)
        self.tokenizer = tokenizer
        self.end_tail = end_tail
        self.special_tokens_in_text = special_tokens_in_text
        self.special_tokens_met: Counter[str] = Counter()
        self.pieces = PieceTokenizer(tokenizer)
        self.template = chat_template or resolve_template(tokenizer, None)
        self.template_kwargs = chat_template_kwargs or {}
        special = special_tokens(tokenizer)
        added = special | {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        forbidden = forbidden_tokens(tokenizer, self.template)
        self.hidden = HiddenTokens(forbidden)
        self.forbidden = self.hidden.pattern
        bos = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
        openers = find_openers(
            lambda turns, prompt: self._render(self.template, turns, None, self.template_kwargs, prompt),
            any_of(special),
            bos,
        )
        border = re.compile(any_of(added).pattern + r"|\s")
        markers = Markers(any_of(special), border, template_tags(self.template), openers)
        self.finder = SpanFinder(markers, volatile="strftime_now" in self.template)
        self.marked_template = with_marks(self.template)

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
                error.args = (without_sentinels(self.hidden.show(str(error))),)
                plans.append(error.with_traceback(None))
        ids = self.pieces.encode(piece for plan in plans if isinstance(plan, list) for piece in plan)
        return [plan if isinstance(plan, EncodingError) else self._assemble(plan, ids) for plan in plans]

    def _plan(self, conversation: Conversation, train_on: TrainOn) -> list[Piece]:
        """The rendered conversation cut into pieces."""
        messages: Messages = [{k: v for k, v in message.items() if k != "train"} for message in conversation.messages]
        tools = conversation.tools
        kwargs = {**self.template_kwargs, **(conversation.template_kwargs or {})}
        met = self._special_in(messages, tools)
        messages, shown = self._render_first(messages, tools, kwargs)
        if met:
            refuse_marks(shown)
            messages, tools = self.hidden.hide(messages), self.hidden.hide(tools)

        def render(turns: Messages, generation_prompt: bool) -> str:
            return self._render(self.template, turns, tools, kwargs, generation_prompt)

        text = render(messages, False) if met else shown
        if not met:
            refuse_marks(text)
        elif self.hidden.show(text) != shown:
            raise SpecialTokenError(
                f"a text holds {met[0]!r}, and the chat template does not write it as it is; remove it from the data",
                met[0],
            )
        self.special_tokens_met.update(met)
        turns = _turns_to_find(conversation.messages, train_on)
        # The turns of "all" are those that are left out of it, with the tokens that end them.
        around, inside, after = (ALL, NONE, REST) if train_on == "all" else (NONE, ALL, FIRST)
        marked = self.marked_template
        rendering = Rendering(
            render,
            None if marked is None else lambda turns: self._render(marked, turns, tools, kwargs, False),
            None if not tools else lambda turns: self._render(self.template, turns, None, kwargs, False),
        )
        context = f"{tools} {kwargs}" if tools or kwargs else ""
        if not turns:
            self.finder.check_written(rendering, text, messages, context)
            return self._cut([Piece(text, around)], met)
        spans, behind = self.finder.find(rendering, text, messages, turns, context)
        text += behind
        pieces: list[Piece] = []
        position, learned = 0, around
        for span in spans:
            pieces.append(Piece(text[position : span.start], learned, ends=bool(pieces)))
            pieces.append(Piece(text[span.start : span.end], inside, self.pieces.continues))
            position, learned = span.end, after
        if self.end_tail and train_on != "all" and turns[-1] == len(messages) - 1:
            pieces.append(Piece(spans[-1].end_token, ALL, ends=True, times=1 + self.end_tail))
        else:
            pieces.append(Piece(text[position:], learned, ends=True))
        return self._cut(pieces, met)

    def _render_first(
        self, messages: Messages, tools: list[Any] | None, kwargs: dict[str, Any]
    ) -> tuple[Messages, str]:
        """The messages as the template takes them, and their render: the arguments of tool calls are objects or, where the
        template fails to add these to a text, JSON text (with an empty content in place of none)."""
        try:
            return messages, self._render(self.template, messages, tools, kwargs, False)
        except TemplateRefusal as refusal:
            filled = [{**m, "content": m.get("content") or ""} if m.get("tool_calls") else m for m in messages]
            written = [_with_written_arguments(message) for message in filled]
            if written == filled:
                raise
            try:
                self._render(self.template, filled, tools, kwargs, False)
            except TemplateRefusal as error:
                if error.kind == "TypeError":
                    return written, self._render(self.template, written, tools, kwargs, False)
            raise refusal

    def _cut(self, pieces: list[Piece], met: list[str]) -> list[Piece]:
        return [part for piece in pieces for part in self.hidden.cut(piece, self.pieces.continues)] if met else pieces

    def _render(
        self, template: str, messages: Messages, tools: list[Any] | None, kwargs: dict[str, Any], prompt: bool
    ) -> str:
        turns: Any = messages if messages else [[]]  # transformers takes an empty conversation in a batch alone
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=template,
                add_generation_prompt=prompt,
                tokenize=False,
                **kwargs,
            )
            text = text if messages else text[0]
            text.encode("utf-8")
        except Exception as error:  # a template is code: it may raise whatever it likes
            raise TemplateRefusal(
                f"the chat template refuses the conversation: {type(error).__name__}: {error}", type(error).__name__
            ) from None
        return text

    def _special_in(self, messages: Messages, tools: list[Any] | None) -> list[str]:
        """The special tokens that texts hold, if they may be kept as text.

        Raises:
            SpecialTokenError: there are some, and they may not.
        """
        texts = [f"{text}" for message in messages for text in message.values()]
        if tools:
            texts.append(str(tools))
        if self.special_tokens_in_text == "text":
            return sorted({token for text in texts for token in self.forbidden.findall(text)})
        for text in texts:
            refuse_special(text, self.forbidden)
        return []

    def _assemble(self, plan: list[Piece], ids: dict[Key, list[int] | EncodingError]) -> TokenRow | EncodingError:
        row = TokenRow(input_ids=[], labels=[])
        for piece in plan:
            tokens = ids[piece.text, piece.place]
            if isinstance(tokens, EncodingError):
                return tokens
            if piece.ends and tokens[0] not in self.pieces.special_ids:
                return EncodingError(
                    "the tokenizer does not read the end-of-turn token as one token; do not split special tokens"
                )
            if piece.times > 1:
                tokens = tokens * piece.times
            labels = [IGNORE] * len(tokens)
            labels[piece.learned] = tokens[piece.learned]
            row["input_ids"] += tokens
            row["labels"] += labels
        return row


def _with_written_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            call = {
                **call,
                "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
            }
        calls.append(call)
    return {**message, "tool_calls": calls}


def _turns_to_find(messages: Sequence[dict[str, Any]], train_on: TrainOn) -> tuple[int, ...]:
    """The assistant's turns that are learned or, where everything else is, those that are not.

    Raises:
        EncodingError: everything is to be learned but a message of another role.
    """
    turns = assistant_turns(messages)
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
