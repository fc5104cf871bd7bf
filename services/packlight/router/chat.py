"""The chat dialect: messages to a prompt, a choice to `message` or `delta`.

Knows the chat template's input and OpenAI's `chat.completion` JSON. Every field that OpenAI's schema requires is there,
null where it has nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from packlight.core.types import Token
from packlight.router.choice import Delta, ShownToken
from packlight.router.dialect import Answered, Json, clip
from packlight.router.instructions import Instructions
from packlight.router.prompts import PromptLimits
from packlight.router.schema import ChatBody, Message
from packlight.router.service import ServedModel
from packlight.router.thinking import asks_to_think, thinks_by_default
from packlight.router.tools.calls import CallDelta
from packlight.router.tools.model import CallRules, ModelTools, told_of


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
        self._tools = ModelTools(model.tokenizer, model.spec)
        self._thinks_by_default = thinks_by_default(model.tokenizer)

    def prompts(self, body: ChatBody, max_prompts: int) -> list[list[int]]:
        self._limits.check(sum(map(_num_bytes, body.messages)), self.prompt_param)
        self._limits.check(len(told_of(body.usable_tools).encode()), "tools")
        return [self._tokens(body.messages, body)]

    def is_reasoning(self, body: ChatBody) -> bool:
        return asks_to_think(body, by_default=self._thinks_by_default)

    def num_instructing(self, body: ChatBody, token_ids: Sequence[int], limit: int) -> int:
        def tokenise(messages: Sequence[Message]) -> list[int]:
            return self._tokens(messages, body)

        options, tools = tuple(body.template_options.items()), told_of(body.usable_tools)
        return self._instructions.num_tokens(body.messages, token_ids, limit, tokenise, options, preface=tools)

    def call_rules(self, body: ChatBody, token_ids: Sequence[int]) -> CallRules | None:
        return self._tools.rules(body, token_ids, is_reasoning=self.is_reasoning(body))

    def opening(self, index: int) -> Json:
        return _choice(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, delta: Delta, *, with_logprobs: bool) -> Json:
        logprobs = self._logprobs(delta.tokens) if with_logprobs else None
        content = {"content": delta.text} if delta.text or not delta.calls else {}
        calls = {"tool_calls": [_call_piece(call) for call in delta.calls]} if delta.calls else {}
        return _choice(delta.index, content | calls, logprobs)

    def closing(self, index: int, reason: str) -> Json:
        return _choice(index, {}, reason=reason)

    def whole(self, answered: Answered) -> Json:
        content = answered.text if answered.text or not answered.calls else None
        calls = {"tool_calls": [_whole_call(call) for call in answered.calls]} if answered.calls else {}
        return {
            "index": answered.index,
            "message": {"role": "assistant", "content": content, "refusal": None, **calls},
            "logprobs": None if answered.tokens is None else self._logprobs(answered.tokens),
            "finish_reason": answered.reason,
        }

    def _tokens(self, messages: Sequence[Message], body: ChatBody) -> list[int]:
        shown, tools = self._tools.shown(messages, body.usable_tools)
        options = body.template_options | tools
        return self._tokenizer.apply_chat_template(shown, add_generation_prompt=True, **options)

    def _logprobs(self, tokens: Sequence[ShownToken]) -> Json:
        return {"content": [self._entry(shown.token) for shown in tokens], "refusal": None}

    def _entry(self, token: Token) -> Json:
        top = [self._likelihood(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return {**self._likelihood(token.token_id, token.logprob), "top_logprobs": top}

    def _likelihood(self, token_id: int, logprob: float | None) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": clip(logprob), "bytes": list(raw)}


def _choice(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _call_piece(call: CallDelta) -> Json:
    """The first piece of a call names it, later ones only continue its arguments."""
    if call.name:
        return {"index": call.index, **_whole_call(call)}
    return {"index": call.index, "function": {"arguments": call.arguments}}


def _whole_call(call: CallDelta) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _num_bytes(message: Message) -> int:
    texts = [message.content or "", *(call.function.arguments for call in message.tool_calls or ())]
    return sum(len(text.encode()) for text in texts)
