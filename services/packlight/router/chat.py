"""The chat dialect: messages to a prompt, a choice to `message` or `delta`.

Knows the chat template's input and OpenAI's `chat.completion` JSON. Every field that OpenAI's schema requires is there,
null where it has nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packlight.core.types import FinishReason, Token
from packlight.router.choice import Delta, ShownToken
from packlight.router.dialect import Json, clip
from packlight.router.instructions import Instructions
from packlight.router.prompts import PromptLimits
from packlight.router.schema import ChatBody, Message
from packlight.router.service import ServedModel
from packlight.router.thinking import asks_to_think, thinks_by_default


class ChatDialect:
    name = "chat"
    id_prefix = "chatcmpl-"
    prompt_param = "messages"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    body_type = ChatBody

    def __init__(self, model: ServedModel, limits: PromptLimits) -> None:
        self._tokenizer = model.tokenizer
        self._limits = limits
        self._instructions = Instructions()
        self._thinks_by_default = thinks_by_default(model.tokenizer)

    def prompts(self, body: ChatBody, max_prompts: int) -> list[list[int]]:
        num_bytes = sum(len((message.content or "").encode()) for message in body.messages)
        self._limits.check(num_bytes, self.prompt_param)
        return [self._tokens(body.messages, body)]

    def is_reasoning(self, body: ChatBody) -> bool:
        return asks_to_think(body, by_default=self._thinks_by_default)

    def num_instructing(self, body: ChatBody, token_ids: Sequence[int], limit: int) -> int:
        def tokenise(messages: Sequence[Message]) -> list[int]:
            return self._tokens(messages, body)

        options = body.chat_template_kwargs
        return self._instructions.num_tokens(body.messages, token_ids, limit, tokenise, options)

    def opening(self, index: int) -> Json:
        return _choice(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, delta: Delta, *, with_logprobs: bool) -> Json:
        logprobs = self._logprobs(delta.tokens) if with_logprobs else None
        return _choice(delta.index, {"content": delta.text}, logprobs)

    def closing(self, index: int, reason: FinishReason) -> Json:
        return _choice(index, {}, reason=reason)

    def whole(self, index: int, text: str, tokens: Sequence[ShownToken] | None, reason: FinishReason) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if tokens is None else self._logprobs(tokens),
            "finish_reason": reason.value,
        }

    def _tokens(self, messages: Sequence[Message], body: ChatBody) -> list[int]:
        options = body.chat_template_kwargs.model_dump(exclude_none=True)
        shown = [_for_template(message) for message in messages]
        return self._tokenizer.apply_chat_template(shown, add_generation_prompt=True, **options)

    def _logprobs(self, tokens: Sequence[ShownToken]) -> Json:
        return {"content": [self._entry(shown.token) for shown in tokens], "refusal": None}

    def _entry(self, token: Token) -> Json:
        top = [self._likelihood(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return {**self._likelihood(token.token_id, token.logprob), "top_logprobs": top}

    def _likelihood(self, token_id: int, logprob: float | None) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": clip(logprob), "bytes": list(raw)}


def _choice(index: int, delta: Json, logprobs: Json | None = None, reason: FinishReason | None = None) -> Json:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": None if reason is None else reason.value,
    }


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it. Templates of open models know the developer as `system`."""
    fields = message.model_dump(exclude_none=True)
    return fields | {"role": "system"} if message.role == "developer" else fields
