"""The fake model's spec and tokenizer: a byte is a token, so a conversation can be counted by hand. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from packlight.core.types import ModelSpec

FAKE_VOCABULARY = 256
FAKE_EOS = 0


def fake_spec(*, dtype: str = "float32", max_context: int = 4096) -> ModelSpec:
    return ModelSpec(
        name="fake",
        fingerprint=f"fake-{dtype}",
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        vocab_size=FAKE_VOCABULARY,
        max_context=max_context,
        eos_token_ids=(FAKE_EOS,),
        dtype=dtype,
        sliding_windows=(None,),
    )


class FakeTokenizer:
    """UTF-8 bytes are token ids; 0 ends a text. A conversation is its contents, one after the other."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,)) if token_id != FAKE_EOS else b""

    def is_special(self, token_id: int) -> bool:
        return token_id == FAKE_EOS

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        return self.encode("".join(str(message.get("content") or "") for message in messages))
