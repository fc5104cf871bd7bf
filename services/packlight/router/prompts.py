"""Which texts are too long to be worth tokenising.

Knows the longest token of the vocabulary, hence how few tokens a text can possibly have. Tokenising costs over a second
per megabyte, so a text that cannot fit is refused before.
"""

from __future__ import annotations

from packlight.core.errors import ContextLengthExceeded
from packlight.router.service import ServedModel


class PromptLimits:
    def __init__(self, model: ServedModel) -> None:
        self._max_context = model.spec.max_context
        self._longest_token_bytes = max(
            len(model.tokenizer.token_bytes(token_id)) for token_id in range(model.spec.vocab_size)
        )

    def check(self, num_bytes: int, param: str) -> None:
        """Raises ContextLengthExceeded when `num_bytes` of text cannot fit, whatever it says."""
        num_tokens = num_bytes // max(self._longest_token_bytes, 1)
        if num_tokens > self._max_context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self._max_context} tokens. However, your messages resulted "
                f"in at least {num_tokens} tokens. Please reduce the length of the messages.",
                param=param,
            )
