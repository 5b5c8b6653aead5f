"""Chat templates in the styles of model families, in words of our own: what matters is how each puts a conversation together.

A style names its special tokens and what is learned of three conversations, or why they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]

HI, AGAIN = {"role": "user", "content": "Hi there"}, {"role": "user", "content": "And then?"}
HELLO, BYE = {"role": "assistant", "content": "Hello you"}, {"role": "assistant", "content": "Bye now"}
SYSTEM = {"role": "system", "content": "Be kind"}
CONVERSATIONS: dict[str, Messages] = {
    "one": [HI, HELLO],
    "two": [HI, HELLO, AGAIN, BYE],
    "system": [SYSTEM, HI, HELLO, AGAIN, BYE],
}


@dataclass(frozen=True)
class Style:
    """A template and what comes of it.

    Args:
        template: Jinja.
        tokens: special tokens beside bos and eos.
        learned: how a supervised span writes an answer, end of turn included; None if all is refused.
        refusal: pattern of the reason, for what is refused.
        refused: the conversations that are; all if ``learned`` is None.
        last: how the last answer is learned if not like the others.
        kwargs: variables for the template.
    """

    template: str
    tokens: str = ""
    learned: str | None = None
    refusal: str = "never"
    refused: tuple[str, ...] = ()
    last: str | None = None
    eos: str = "</s>"
    bos: str = "<s>"
    kwargs: dict[str, Any] = field(default_factory=dict)

    def expected(self, name: str) -> list[str] | None:
        """The supervised texts of a conversation; None if it must be refused."""
        if self.learned is None or name in self.refused:
            return None
        answers = [m["content"] for m in CONVERSATIONS[name] if m["role"] == "assistant"]
        spans = [self.learned.format(answer) for answer in answers]
        return [*spans[:-1], (self.last or self.learned).format(answers[-1])]


def loop(body: str, prompt: str, before: str = "") -> str:
    """A template that writes ``before``, then ``body`` for each message ``m``, then perhaps the prompt."""
    return f"{before}{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


def by_role(user: str, assistant: str, system: str = "{{ m.content }}\n\n") -> str:
    return f"{{% if m.role == 'user' %}}{user}{{% elif m.role == 'assistant' %}}{assistant}{{% else %}}{system}{{% endif %}}"


CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_TOKENS = "<|im_start|> <|im_end|>"
CHATML_PROMPT = "<|im_start|>assistant\n"
ALTERNATES = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in turns %}{%- if m.role == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST]' + SP + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST]' + SP + m.content + '[/INST]' }}{%- endif %}"
    "{%- elif m.role == 'assistant' %}{{- SP + m.content|trim + eos_token }}{%- endif %}{%- endfor %}"
)
_UNWRITTEN = r"does not write message 0 \(system\)"  # it stands in the last message, if that is the user's
_DROPS_THOUGHT = "{% set text = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
_QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- set text = m.content %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
_HARMONY = (
    "{%- set ns = namespace(dev='') %}{{- '<|start|>system<|message|>Knowledge cutoff: 2024-06\nValid channels: final.<|end|>' }}"
    "{%- for m in messages %}{%- if m.role == 'system' %}{{- '<|start|>developer<|message|># Instructions\n\n' + m.content }}"
    "{{- '<|end|>' }}{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{%- elif loop.last and not add_generation_prompt %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
_LLAMA31 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- else %}{%- set today = '26 Jul 2024' %}"
    "{%- endif %}{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + today + '\n\n' + system + '<|eot_id|>' }}"
    "{%- if tools %}{%- set first = messages[0].content | trim %}{%- set messages = messages[1:] %}"
    "{{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions:\n\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}{{- first + '<|eot_id|>' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{%- elif m.tool_calls %}{%- set call = m.tool_calls[0].function %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson + '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>{{{{ m.content | trim }}}}<|END_OF_TURN_TOKEN|>"

STYLES: dict[str, Style] = {
    "llama-2": Style(
        "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
        "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for m in turns %}"
        "{% if loop.index0 == 0 and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
        "{% else %}{% set text = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        learned=" {} </s>",
    ),
    "llama-3.1": Style(
        _LLAMA31, "<|start_header_id|> <|end_header_id|> <|eot_id|>", "{}<|eot_id|>", eos="<|end_of_text|>"
    ),
    "mistral-v0.3": Style(ALTERNATES + _MISTRAL.replace("SP", "' '"), "[INST] [/INST]", " {}</s>", _UNWRITTEN, ("system",)),
    "mistral-tekken": Style(_MISTRAL.replace("SP", "''"), "[INST] [/INST]", "{}</s>", _UNWRITTEN, ("system",)),
    "gemma": Style(
        "{{ bos_token }}" + NO_SYSTEM + ALTERNATES + "{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<start_of_turn> <end_of_turn>", "{}<end_of_turn>", "System role not supported", ("system",), eos="<eos>", bos="<bos>",
    ),
    "qwen3": Style(
        _QWEN3, CHATML_TOKENS, "{}<|im_end|>", last="<think>\n\n</think>\n\n{}<|im_end|>", eos="<|im_end|>",
    ),
    "qwen3, not thinking": Style(
        _QWEN3, CHATML_TOKENS, "{}<|im_end|>", eos="<|im_end|>", kwargs={"enable_thinking": False},
    ),
    "qwq": Style(
        loop(_DROPS_THOUGHT + "<|im_start|>{{ m.role }}\n{{ text.lstrip('\n') }}<|im_end|>\n", CHATML_PROMPT + "<think>\n"),
        CHATML_TOKENS, "{}<|im_end|>",
    ),
    "deepseek-r1": Style(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}{{ bos_token }}{{ system }}"
        + loop(
            by_role(
                "<｜User｜>{{ m.content }}", "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>", ""
            ),
            "<｜Assistant｜><think>\n",
        ),
        "<｜User｜> <｜Assistant｜>", "{}<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek-v3": Style(
        loop(
            by_role("<｜User｜>{{ m.content }}", "<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>", "{{ m.content }}"),
            "<｜Assistant｜>", "{{ bos_token }}",
        ),
        "", "{}<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
    ),
    "phi-3": Style(
        loop(
            "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"
        ).replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
        "<|system|> <|user|> <|assistant|> <|end|>", "{}<|end|>", eos="<|endoftext|>",
    ),
    "phi-4": Style(
        loop("<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        "<|im_start|> <|im_sep|> <|im_end|>", "{}<|im_end|>", eos="<|endoftext|>",
    ),
    "command-r": Style(
        loop(
            by_role(_COHERE.format("USER"), _COHERE.format("CHATBOT"), _COHERE.format("SYSTEM")),
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "{{ bos_token }}",
        ),
        "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "{}<|END_OF_TURN_TOKEN|>",
    ),
    # No token ends a turn: the next speaker's does, and the last answer gets the one that the template would write there.
    "glm-4": Style(
        loop("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n", "[gMASK]<sop>"),
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", "{}<|user|>", eos="<|endoftext|>",
    ),
    "glm-4-0414": Style(
        loop("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>", "[gMASK]<sop>"),
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", "\n{}<|user|>", eos="<|endoftext|>",
    ),
    "chatglm3": Style(
        loop("<|{{ m.role }}|>\n {{ m.content }}", "<|assistant|>", "{{ '[gMASK]sop' }}"),
        "[gMASK] sop <|system|> <|user|> <|assistant|> <|observation|>", "\n {}<|user|>",
    ),
    "minicpm": Style(
        loop("{% if m.role == 'user' %}<用户>{{ m.content.strip() }}<AI>{% else %}{{ m.content.strip() }}{% endif %}", ""),
        "<用户> <AI>", "{}<用户>",
    ),
    "internlm2": Style(loop(CHATML_TURN, CHATML_PROMPT, "{{ bos_token }}"), CHATML_TOKENS, "{}<|im_end|>"),
    "yi": Style(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        + loop("{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}", CHATML_PROMPT),
        CHATML_TOKENS, "{}<|im_end|>", eos="<|endoftext|>",
    ),
    "chatml, default system": Style(
        loop(
            "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML_TURN,
            CHATML_PROMPT,
        ),
        CHATML_TOKENS, "{}<|im_end|>", eos="<|endoftext|>",
    ),
    "baichuan2": Style(
        loop(by_role("<reserved_106>{{ m.content }}", "<reserved_107>{{ m.content }}", "{{ m.content }}"), "<reserved_107>"),
        "<reserved_106> <reserved_107>", "{}<reserved_106>",
    ),
    "baichuan2, eos": Style(
        loop(
            by_role("<reserved_106>{{ m.content }}", "<reserved_107>{{ m.content + eos_token }}", "{{ m.content }}"),
            "<reserved_107>",
        ),
        "<reserved_106> <reserved_107>", "{}</s>",
    ),
    "vicuna": Style(
        loop(
            by_role("USER: {{ m.content.strip() }}", " ASSISTANT: {{ m.content.strip() }}</s>", "{{ m.content }} "),
            " ASSISTANT:", "{{ bos_token }}",
        ),
        "", " {}</s>",
    ),
    "falcon": Style(
        loop("{{ '\n\n' if not loop.first }}{{ 'Falcon' if m.role == 'assistant' else m.role | title }}: {{ m.content }}",
             "{{ '\n\nFalcon:' }}"),
        "", None, r"does not end the assistant's message \d with a special token .*end-of-turn token", eos="<|endoftext|>",
    ),
    "falcon-3": Style(
        loop(
            "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token if m.role == 'assistant' and not loop.last else '' }}\n",
            "<|assistant|>\n",
        ).replace("{% endfor %}", "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"),
        "", "{}<|endoftext|>", last="{}\n<|endoftext|>", eos="<|endoftext|>",
    ),
    "olmo-2": Style(
        loop(
            by_role(
                "<|user|>\n{{ m.content }}\n",
                "<|assistant|>\n{{ m.content }}{{ eos_token if loop.last else eos_token + '\n' }}",
                "<|system|>\n{{ m.content }}\n",
            ),
            "<|assistant|>\n", "{{ bos_token }}",
        ),
        "", "{}<|endoftext|>", eos="<|endoftext|>", bos="<|endoftext|>",
    ),
    "granite-3": Style(
        loop(
            "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|start_of_role|> <|end_of_role|>", "{}<|end_of_text|>", eos="<|end_of_text|>", bos="<|end_of_text|>",
    ),
    "smollm-3": Style(
        loop(
            by_role(
                "<|im_start|>user\n{{ m.content }}<|im_end|>\n",
                "<|im_start|>assistant\n{{ '<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}", "",
            ),
            CHATML_PROMPT + "{{ '<think>\n\n</think>\n' }}",
            "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: /no_think\n\n"
            "## Custom Instructions\n\n{{ messages[0].content if messages[0].role == 'system' else 'Be of help.' }}<|im_end|>\n",
        ),
        CHATML_TOKENS, "{}<|im_end|>", eos="<|im_end|>",
    ),
    "gpt-oss": Style(
        _HARMONY, "<|start|> <|message|> <|channel|> <|end|>", "<|channel|>final<|message|>{}<|end|>",
        last="<|channel|>final<|message|>{}<|return|>", eos="<|return|>",
    ),
    # One token begins all turns, the assistant's too, and none ends them.
    "nemotron-mini": Style(
        loop(
            by_role(
                "<extra_id_1>User\n{{ m.content.strip() }}\n", "<extra_id_1>Assistant\n{{ m.content.strip() }}\n",
                "<extra_id_0>System\n{{ m.content.strip() }}\n\n",
            ),
            "<extra_id_1>Assistant\n",
        ),
        "<extra_id_0> <extra_id_1>", None, "next special token is '<extra_id_1>', which begins every turn|with a special token",
    ),
    "nemotron-nano": Style(
        loop("{{ '<SPECIAL_10>' if loop.first and m.role == 'system' else '<SPECIAL_11>' }}{{ m.role | capitalize }}\n"
             "{{ m.content.strip() }}\n{{ '<SPECIAL_12>\n' if m.role == 'assistant' }}", "<SPECIAL_11>Assistant\n"),
        "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12>", "{}\n<SPECIAL_12>",
    ),
    "starchat": Style(
        loop("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"),
        "<|system|> <|user|> <|assistant|> <|end|>", "{}<|end|>", eos="<|endoftext|>",
    ),
    "zephyr": Style(
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
        "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n"
        "{% elif m.role == 'assistant' %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "", "{}</s>",
    ),
    "openchat": Style(
        loop(
            "GPT4 Correct {{ m.role.title() }}: {{ m.content }}<|end_of_turn|>", "GPT4 Correct Assistant:", "{{ bos_token }}"
        ),
        "<|end_of_turn|>", " {}<|end_of_turn|>",
    ),
    "alpaca": Style(
        loop(
            by_role(
                "### Instruction:\n{{ m.content.strip() }}\n\n", "### Response:\n{{ m.content.strip() }}{{ eos_token }}\n\n"
            ),
            "### Response:\n",
        ),
        "", "{}</s>",
    ),
    "solar": Style(
        loop("### {{ m.role | title }}:\n{{ m.content }}{{ '' if loop.last else '\n\n' }}", "### Assistant:\n"),
        "", None, "does not fit the conversation's render",  # the prompt is not what stands between two messages
    ),
    "deepseek-coder": Style(
        loop(
            by_role("### Instruction:\n{{ m.content }}\n", "### Response:\n{{ m.content }}\n<|EOT|>\n", "{{ m.content }}"),
            "### Response:", "{{ bos_token }}",
        ),
        "", "\n{}\n<|EOT|>", eos="<|EOT|>",
    ),
    "kimi-k2": Style(
        loop(
            "{% set kind = 'assistant' if m.role == 'assistant' else 'user' if m.role == 'user' else 'system' %}"
            "{% if loop.first and m.role != 'system' %}<|im_system|>system<|im_middle|>You are of help<|im_end|>{% endif %}"
            "<|im_{{ kind }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_end|>", "{}<|im_end|>", eos="[EOS]", bos="[BOS]",
    ),
    "seed-oss": Style(
        loop(
            "{{ bos }}{{ m.role }}{% if m.content | trim | length > 0 or m.role != 'assistant' %}\n"
            "{{ m.content | trim if m.role == 'assistant' else m.content }}{{ eos }}{% endif %}",
            "{{ bos }}assistant\n", "{% set bos = '<seed:bos>' %}{% set eos = '<seed:eos>' %}",
        ),
        "", "{}<seed:eos>", eos="<seed:eos>", bos="<seed:bos>",
    ),
    # The prompt opens the reasoning; the last answer has no end unless the conversation goes on.
    "apriel": Style(
        loop(
            by_role(
                "<|begin_user|>\n{{ m.content }}", "\n<|begin_assistant|>\n{{ m.content }}{{ '\n<|end|>\n' if not loop.last }}",
                "{{ bos_token }}<|begin_system|>\n{{ m.content }}\n",
            )
            + "{% if loop.last and m.role != 'assistant' %}\n<|begin_assistant|>\nHere are my reasoning steps:\n{% endif %}", "",
        ),
        "<|begin_system|> <|begin_user|> <|begin_assistant|> <|end|>", "{}\n<|end|>",
    ),
    # The last answer is taken out of the loop and written behind the prompt.
    "nemotron-nano-v2": Style(
        "{% set ns = namespace(last='') %}<SPECIAL_10>System\n{{ messages[0].content if messages[0].role == 'system' }}\n\n"
        "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% if turns[-1].role == 'assistant' %}{% set ns.last = turns[-1].content.strip() %}"
        "{% set turns = turns[:-1] %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}<SPECIAL_11>User\n{{ m.content.replace('/think', '').strip() }}\n"
        "{% else %}<SPECIAL_11>Assistant\n{{ m.content.strip() }}\n<SPECIAL_12>\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt or ns.last %}{{ '<SPECIAL_11>Assistant\n<think>\n\n' + ns.last }}{% endif %}"
        "{% if ns.last and not add_generation_prompt %}{{ '\n<SPECIAL_12>\n\n' }}{% endif %}",
        "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12>", "{}\n<SPECIAL_12>",
    ),
    "deepseek-v3.1": Style(
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
        + loop(
            by_role(
                "<｜User｜>{{ m.content }}",
                "<｜Assistant｜></think>{{ m.content.split('</think>', 1)[-1] }}<｜end▁of▁sentence｜>", "",
            ),
            "<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}",
        ),
        "", "{}<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
    ),
    "gigachat-3": Style(
        "{% macro turn(role, text) %}{{ role + '<|role_sep|>\n' + text + '<|message_sep|>\n\n' }}{% endmacro %}{{ bos_token }}"
        "{{ turn('developer system', 'A dialog follows.') }}" + loop("{{ turn(m.role, m.content) }}", "assistant<|role_sep|>\n"),
        "<|role_sep|> <|message_sep|>", "{}<|message_sep|>",
    ),
    "minimax-m2": Style(
        "{% macro text(content) %}{%- if content is string -%}{{ content }}{%- endif -%}{% endmacro %}"
        "{{ ']~!b[' ~ ']~b]system' ~ '\n' }}"
        "{{ messages[0].content if messages[0].role == 'system' else 'You are of help.' }}[e~[\n"
        "{% for m in messages if m.role != 'system' %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n"
        "{{ text(m.content) }}[e~[\n{% endfor %}{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}",
        "]~!b[ ]~b] [e~[", "{}[e~[", eos="[e~[",
    ),
    "llama-4": Style(
        loop(
            "<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n", "{{ bos_token }}",
        ),
        "<|header_start|> <|header_end|> <|eot|>", "{}<|eot|>", eos="<|end_of_text|>",
    ),
    "exaone": Style(
        loop(
            "{% if loop.first and m.role != 'system' %}[|system|][|endofturn|]\n{% endif %}[|{{ m.role }}|]{{ m.content }}"
            "{% if m.role != 'user' %}[|endofturn|]{% endif %}{{ '\n' if not loop.last or add_generation_prompt }}",
            "[|assistant|]",
        ),
        "[|system|] [|user|] [|assistant|] [|endofturn|]", "{}[|endofturn|]", eos="[|endofturn|]",
    ),
    "ernie": Style(
        loop(
            by_role("User: {{ m.content }}\n", "Assistant: {{ m.content }}<|end_of_sentence|>", "{{ m.content }}\n"),
            "Assistant: ", "<|begin_of_sentence|>",
        ),
        "<|begin_of_sentence|> <|end_of_sentence|>", "{}<|end_of_sentence|>",
    ),
    "hunyuan": Style(
        loop(
            by_role(
                "<|hy_User|>{{ m.content }}", "<|hy_Assistant|>{{ m.content }}<|hy_no_2|>", "{{ m.content }}<|hy_no_3|>"
            ),
            "<|hy_Assistant|>", "<|hy_begin|>",
        ),
        "<|hy_begin|> <|hy_User|> <|hy_Assistant|> <|hy_no_2|> <|hy_no_3|>", "{}<|hy_no_2|>",
    ),
    "jamba": Style(
        loop("<|bom|><|{{ m.role }}|> {{ m.content }}<|eom|>", "<|bom|><|assistant|>", "{{ bos_token }}"),
        "<|bom|> <|eom|> <|system|> <|user|> <|assistant|>", " {}<|eom|>", bos="<|startoftext|>", eos="<|endoftext|>",
    ),
    "tulu": Style(
        loop(
            by_role(
                "<|user|>\n{{ m.content }}\n", "<|assistant|>\n{{ m.content + eos_token }}{{ '\n' if not loop.last }}",
                "<|system|>\n{{ m.content }}\n",
            ),
            "<|assistant|>\n",
        ),
        "", "{}</s>",
    ),
    "stablelm": Style(
        loop("<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n", "<|assistant|>\n"),
        "", "{}<|endoftext|>", eos="<|endoftext|>", bos="<|endoftext|>",
    ),
    "open-assistant": Style(
        loop("{{ '<|prompter|>' if m.role == 'user' else '<|' + m.role + '|>' }}{{ m.content + eos_token }}", "<|assistant|>"),
        "<|system|> <|prompter|> <|assistant|>", "{}<|endoftext|>", eos="<|endoftext|>",
    ),
    # Texts alone, each closed by the eos: nothing says who speaks.
    "dialogpt": Style(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "", "{}<|endoftext|>", eos="<|endoftext|>",
        bos="<|endoftext|>",
    ),
    # The BOS separates the turns.
    "gpt-sw3": Style(
        "{{ eos_token }}{{ bos_token }}{% for m in messages %}{{ 'Bot: ' if m.role == 'assistant' else 'User: ' }}{{ m.content }}"
        "{{ bos_token }}{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}",
        "", None, "next special token is '<s>', which begins every turn", eos="<|endoftext|>",
    ),
    "telechat": Style(
        loop(by_role("<_user>{{ m.content }}", "<_bot>{{ m.content }}<_end>\n", "<_system>{{ m.content }}"), "<_bot>"),
        "<_system> <_user> <_bot> <_end>", "{}<_end>", eos="<_end>", bos="<_start>",
    ),
    "xverse": Style(
        loop(by_role("Human: {{ m.content }}\n\n", "Assistant: {{ m.content }}<|endoftext|>"), "Assistant: "),
        "", "{}<|endoftext|>", eos="<|endoftext|>",
    ),
    "command-r7b": Style(
        loop(
            by_role(
                _COHERE.format("USER"),
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                _COHERE.format("SYSTEM"),
            ),
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "{{ bos_token }}",
        ),
        "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|> "
        "<|END_RESPONSE|>",
        "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    # ---- how templates go about it, whoever made them ----
    "end of turn between turns only": Style(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_TOKENS, "{}<|im_end|>",
    ),
    "eos behind the last turn only": Style(
        loop("<|{{ m.role }}|>{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' }}", "<|assistant|>"),
        "", "{}</s>", "does not end the assistant's message [12] with a special token", ("two", "system"),
    ),
    "eos behind the conversation": Style(
        loop(CHATML_TURN, CHATML_PROMPT).replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
        CHATML_TOKENS, "{}<|im_end|>",
    ),
    "a prompt that is not asked for": Style(
        loop(CHATML_TURN, "") + "{{ '<|im_start|>assistant\n' }}", CHATML_TOKENS, "{}<|im_end|>",
    ),
    "no generation prompt": Style(
        loop(CHATML_TURN, ""), CHATML_TOKENS, "<|im_start|>assistant\n{}<|im_end|>",
    ),
    "text in HTML": Style(loop(CHATML_TURN.replace("content", "content | e"), CHATML_PROMPT), CHATML_TOKENS, "{}<|im_end|>"),
    "text as JSON": Style(
        loop(CHATML_TURN.replace("content", "content | tojson"), CHATML_PROMPT), CHATML_TOKENS, '"{}"<|im_end|>'
    ),
    "reversed": Style(
        loop(CHATML_TURN, CHATML_PROMPT).replace("in messages", "in messages | reverse"), CHATML_TOKENS, None,
        "before the messages that precede it",
    ),
    "upper case": Style(
        loop(CHATML_TURN.replace("content", "content | upper"), CHATML_PROMPT), CHATML_TOKENS, None,
        "changes the text of an assistant turn",
    ),
    "shortened": Style(
        loop(CHATML_TURN.replace("content", "content | truncate(3, true, '', 0)"), CHATML_PROMPT), CHATML_TOKENS, None,
        "changes the text|leaves out the content",
    ),
    "only the last three messages": Style(
        loop(CHATML_TURN, CHATML_PROMPT).replace("in messages", "in messages[-3:]"), CHATML_TOKENS, "{}<|im_end|>",
        "does not fit the conversation|leaves out the content", ("two", "system"),
    ),
    "alternating or nothing": Style(
        ALTERNATES + loop(CHATML_TURN, CHATML_PROMPT), CHATML_TOKENS, "{}<|im_end|>",
    ),
    "a turn's start twice": Style(
        loop(by_role("<s>[INST] {{ m.content }} [/INST]", "{{ m.content }} "), ""),
        "[INST] [/INST]", None, "with a special token|next special token is '<s>', which begins every turn",
    ),
    "chatml without its end": Style(
        loop(CHATML_TURN.replace("<|im_end|>", ""), CHATML_PROMPT), CHATML_TOKENS, None,
        r"next special token is '<\|im_start\|>', which begins every turn",
    ),
    "llama-3 without its end": Style(
        loop("<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}",
             "<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ bos_token }}"),
        "<|start_header_id|> <|end_header_id|>", None, r"next special token is '<\|start_header_id\|>', which begins every turn",
    ),
}  # fmt: skip
