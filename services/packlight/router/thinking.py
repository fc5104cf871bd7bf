"""Whether a model will think before it answers, as far as that can be told from a request and a chat template.

Knows the fields and template variables by which clients switch thinking on and off. Does not read templates: what a
template does by default is found out by asking it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packlight.core.errors import InvalidRequest
from packlight.router.schema import ChatBody
from packlight.router.service import Tokenizer

_NO_EFFORT = ("none", "minimal")
_QUESTION = [{"role": "user", "content": "Why?"}]
# (opened, closed): what reasoning models put around their thoughts.
THOUGHT_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
# A template opens thoughts with its last words.
_LAST_TOKENS = 32


def asks_to_think(body: ChatBody, *, by_default: bool) -> bool:
    """`enable_thinking` has the last word; without it any effort above minimal means thinking, or the template's habit.

    `by_default` is `thinks_by_default` of the model."""
    options = body.chat_template_kwargs
    if options.enable_thinking is not None:
        return options.enable_thinking
    efforts = [effort for effort in (body.reasoning_effort, options.reasoning_effort) if effort is not None]
    return by_default or any(effort not in _NO_EFFORT for effort in efforts)


def thinks_by_default(tokenizer: Tokenizer) -> bool:
    """Whether the chat template, left alone, lets the model think.

    Either it says the same as with thinking switched on, and not the same as with thinking switched off (Qwen3); or it
    has levels of effort, and what it says is not the same as with none (gpt-oss); or it opens the thoughts itself
    (DeepSeek-R1)."""
    usual = _asked(tokenizer)
    if usual is None:
        return False
    is_switched_on = usual == _asked(tokenizer, enable_thinking=True) != _asked(tokenizer, enable_thinking=False)
    none, low, high = (_asked(tokenizer, reasoning_effort=effort) for effort in ("none", "low", "high"))
    text = _text(usual, tokenizer)
    is_open = any(text.rfind(opened) > text.rfind(closed) for opened, closed in THOUGHT_TAGS)
    return is_switched_on or is_open or (low != high and usual != none)


def open_thought(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The tag that will end the thoughts that a prompt opens with its last words. Empty where it opens none, whatever
    the user wrote before."""
    text = _text(token_ids[-_LAST_TOKENS:], tokenizer).rstrip()
    return next((closed for opened, closed in THOUGHT_TAGS if text.endswith(opened)), "")


def _text(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode(errors="replace")


def _asked(tokenizer: Tokenizer, **options: Any) -> list[int] | None:
    """The tokens of a short question, or None where the model has no template for it."""
    try:
        return tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, **options)
    except InvalidRequest:
        return None
