"""A real byte-level BPE tokenizer with a small vocabulary and a chat template, trained in milliseconds.

Characters outside ASCII take several tokens, which is what incremental decoding has to get right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from packlight.core.errors import InvalidRequest
from packlight.core.types import ModelSpec
from packlight.router.service import ServedModel

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|bos|>")
EOS_ID = 1
CORPUS = (
    "The router counts the words of every answer and stops where it is told to stop.",
    "Pages of keys and values are shipped from one worker to another, layer by layer.",
    "Hello world, hello again: one, two, three, four, five.",
)


class TinyTokenizer:
    """Its template wants roles to alternate, as strict ones do, and knows `enable_thinking`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.eos_token_ids = (EOS_ID,)
        self._bytes = [self._spell(token_id) for token_id in range(self.vocab_size)]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        # `encode_batch`, because `encode` holds the interpreter lock for as long as it takes.
        ids = list(self._tokenizer.encode_batch([text])[0].ids)
        return [SPECIAL.index("<|bos|>"), *ids] if add_special_tokens else ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id < len(SPECIAL)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        if [message["role"] for message in messages[:2]] == ["assistant", "assistant"]:
            raise InvalidRequest("the chat template wants roles to alternate", param="messages")
        text = "".join(f"<|im_start|>{one['role']}\n{one.get('content', '')}<|im_end|>\n" for one in messages)
        if kwargs.get("enable_thinking"):
            text += "<think>"
        return self.encode(text + "<|im_start|>assistant\n" if kwargs["add_generation_prompt"] else text)

    def text(self, token_ids: Sequence[int]) -> str:
        """The whole text at once: what the incremental decoder must add up to."""
        shown = b"".join(self.token_bytes(token_id) for token_id in token_ids if not self.is_special(token_id))
        return shown.decode(errors="replace")

    def _spell(self, token_id: int) -> bytes:
        if self.is_special(token_id):
            return b""
        return bytes(_BYTE_OF[char] for char in self._tokenizer.id_to_token(token_id))


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others are U+0100 and up, in order."""
    plain = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(moved)}


_BYTE_OF = _byte_of_char()


@cache
def tiny_tokenizer() -> TinyTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return TinyTokenizer(tokenizer)


def tiny_model(max_context: int = 256) -> ServedModel:
    tokenizer = tiny_tokenizer()
    spec = ModelSpec(
        name="tiny/model",
        fingerprint="tiny-1",
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=tokenizer.vocab_size,
        max_context=max_context,
        eos_token_ids=(EOS_ID,),
        dtype="float32",
    )
    return ServedModel(spec, tokenizer)
