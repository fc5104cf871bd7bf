"""Chat templates of the kinds that models with tools ship, cut down to what matters here, over the tiny vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from packlight.models.template import ChatTemplate
from tests.support.tiny_tokenizer import TinyTokenizer, tiny_tokenizer

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOLD = "{% if tools %}Tools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}"
BODY = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'


def turns(calls: str = "") -> str:
    """Every message in turn, with its `calls`, and then the model's."""
    each = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + calls + "<|im_end|>\n{% endfor %}"
    return each + GENERATION


PLAIN = turns()
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
# Calls that are no JSON.
FOREIGN = TOLD + turns(EACH + "<call>{{ c.function.name }}: {{ c.function.arguments | tojson }}</call>{% endfor %}")
# It explains the marks before it uses them, as those of Qwen do.
HERMES = (
    "{% if tools %}Write <tool_call>\n{...}\n</tool_call>.\n{% endif %}"
    + TOLD
    + turns(EACH + "\n<tool_call>\n" + BODY + "\n</tool_call>{% endfor %}")
)
MISTRAL = TOLD + turns(
    "{% if m.tool_calls %}[TOOL_CALLS] ["
    + EACH
    + "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{{ ", " if not loop.last }}{% endfor %}]{% endif %}'
)
NEMOTRON = TOLD + turns(
    "{% if m.tool_calls %}<TOOLCALL>[" + EACH + BODY + "{{ ', ' if not loop.last }}{% endfor %}]</TOOLCALL>{% endif %}"
)
# Its tools are told within the first question.
LLAMA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.first and tools %}Given these: {{ tools | tojson }}\n{% endif %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    + EACH
    + BODY.replace('"arguments"', '"parameters"')
    + "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + GENERATION
)


class Templated(TinyTokenizer):
    """`marks` are special tokens, as far as this template goes: ids that the vocabulary does not use otherwise."""

    def __init__(self, template: str, marks: Sequence[str] = ()) -> None:
        self.__dict__.update(tiny_tokenizer().__dict__)
        self._template = ChatTemplate({"default": template}, {})
        self.marks = {mark: self.vocab_size + at for at, mark in enumerate(marks)}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        for mark, token_id in self.marks.items():
            before, found, after = text.partition(mark)
            if found:
                return [*self.encode(before), token_id, *self.encode(after)]
        return super().encode(text) if text else []

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id >= self.vocab_size else super().token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id >= self.vocab_size or super().is_special(token_id)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        return self.encode(self._template.render(messages, **kwargs))
