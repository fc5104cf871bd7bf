"""The dialect of plain completions: text or tokens in, text out.

Knows OpenAI's older `text_completion` JSON. No `echo`, no `suffix`, no `best_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from packlight.core.errors import InvalidRequest
from packlight.router.choice import Delta, ShownToken
from packlight.router.dialect import Answered, Json, clip
from packlight.router.params import check_token_id
from packlight.router.prompts import PromptLimits
from packlight.router.schema import CompletionBody
from packlight.router.service import ServedModel


class CompletionDialect:
    name = "completions"
    id_prefix = "cmpl-"
    prompt_param = "prompt"
    chunk_object = "text_completion"
    whole_object = "text_completion"
    body_type = CompletionBody

    def __init__(self, model: ServedModel, limits: PromptLimits) -> None:
        self._tokenizer = model.tokenizer
        self._vocab_size = model.spec.vocab_size
        self._limits = limits

    def prompts(self, body: CompletionBody, max_prompts: int) -> list[list[int]]:
        """One prompt per string or per list of tokens. Choice `prompt * n + sample` answers prompt `prompt`."""
        prompts = body.prompt if _is_many(body.prompt) else [body.prompt]
        if len(prompts) > max_prompts:
            raise _invalid(
                "prompt", f"expected at most {max_prompts} prompts, but got {len(prompts)}.", "array_above_max_length"
            )
        paths = [f"prompt[{index}]" for index in range(len(prompts))] if _is_many(body.prompt) else ["prompt"]
        return [self._tokens(prompt, path) for prompt, path in zip(prompts, paths, strict=True)]

    def is_reasoning(self, body: CompletionBody) -> bool:
        return False

    def num_instructing(self, body: CompletionBody, token_ids: Sequence[int], limit: int) -> int:
        """A text has no parts."""
        return 0

    def call_rules(self, body: CompletionBody, token_ids: Sequence[int]) -> None:
        """A text calls nobody."""
        return None

    def opening(self, index: int) -> None:
        return None

    def piece(self, delta: Delta, *, with_logprobs: bool) -> Json:
        return _choice(delta.index, delta.text, self._logprobs(delta.tokens) if with_logprobs else None)

    def closing(self, index: int, reason: str) -> Json:
        return _choice(index, "", None, reason)

    def whole(self, answered: Answered) -> Json:
        logprobs = None if answered.tokens is None else self._logprobs(answered.tokens)
        return _choice(answered.index, answered.text, logprobs, answered.reason)

    def _tokens(self, prompt: Any, path: str) -> list[int]:
        if isinstance(prompt, str):
            self._limits.check(len(prompt.encode()), path)
            tokens = self._tokenizer.encode(prompt, add_special_tokens=True)
        elif isinstance(prompt, list) and all(_is_token(item) for item in prompt):
            tokens = prompt
            check_token_id(max(tokens, default=0), path, self._vocab_size)
        else:
            raise _invalid(path, "expected a string or an array of token ids.", "invalid_type")
        if not tokens:
            raise _invalid(path, "it has no tokens. Expected at least one.", "empty_array")
        return tokens

    def _logprobs(self, tokens: Sequence[ShownToken]) -> Json:
        return {
            "tokens": [self._text(shown.token.token_id) for shown in tokens],
            "token_logprobs": [clip(shown.token.logprob) for shown in tokens],
            "top_logprobs": [self._alternatives(shown) for shown in tokens],
            "text_offset": [shown.offset for shown in tokens],
        }

    def _alternatives(self, shown: ShownToken) -> Json:
        chosen = (shown.token.token_id, shown.token.logprob)
        return {self._text(token_id): clip(logprob) for token_id, logprob in (*shown.token.top_logprobs, chosen)}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def _is_many(prompt: str | list[Any]) -> TypeGuard[list[Any]]:
    return isinstance(prompt, list) and not all(_is_token(item) for item in prompt)


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item >= 0


def _choice(index: int, text: str, logprobs: Json | None, reason: str | None = None) -> Json:
    return {
        "text": text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": reason,
    }


def _invalid(param: str, problem: str, code: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {problem}", param=param, code=code)
