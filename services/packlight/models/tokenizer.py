"""Text to token ids and back, for routers and workers. Needs `tokenizers` and `jinja2`, never transformers or torch.

Knows `tokenizer.json` and the two ways in which vocabularies spell bytes. Does not know requests or streaming; the true
bytes of a token are what a stream of tokens is decoded from, because one character may span several tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from packlight.core.errors import InvalidRequest, ModelError
from packlight.models.folder import read_json_if_there
from packlight.models.template import ChatTemplate, Now, special_tokens

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ChatTokenizer:
    """A model's tokenizer and chat template.

    `vocab_size` counts the tokenizer's entries, which may be fewer or more than the model's logits.
    `eos_token_ids` unites what generation_config, config and tokenizer_config call the end."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, eos_token_ids: Sequence[int] = ()) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._template = tokenizer, template
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._literal = {index: token.content.encode() for index, token in added.items() if not token.special}
        self._spelled = _speller(json.loads(tokenizer.to_str()))
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], *, now: Now = datetime.now) -> ChatTokenizer:
        """Raises ModelError if `tokenizer.json` or the chat template cannot be used."""
        path = Path(folder) / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{path}: not a readable tokenizer ({error}). Download or save the model again") from None
        try:
            return cls(tokenizer, ChatTemplate.from_folder(folder, now=now), _eos_token_ids(Path(folder), tokenizer))
        except ModelError as error:
            raise ModelError(f"{path.parent}: {error.message}") from None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids. Special tokens spelled out in `text` are recognised; none is added unless asked for (a BOS, where
        the model has one). Raises InvalidRequest for text that is not Unicode (lone surrogates)."""
        try:
            # The batch call releases the GIL and skips offsets; a plain one stalls every other thread meanwhile.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError):
            raise InvalidRequest("the text is not valid Unicode: it has unpaired surrogates") from None
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for special tokens and for ids that only the logits have.

        Joined over an encoded text they are its UTF-8 (normalised, if the model normalises; SentencePiece models that
        put a blank before every text have it here too)."""
        if token_id in self._special:
            return b""
        if token_id in self._literal:
            return self._literal[token_id]
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._spelled(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a chat. Raises InvalidRequest(param="messages") if the template refuses it."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Render and encode. The template writes its own special tokens, so none is added to them."""
        return self.encode(self.render(messages, **kwargs))


def _eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json_if_there(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    text = special_tokens(read_json_if_there(folder / "tokenizer_config.json")).get("eos_token")
    named = tokenizer.token_to_id(text) if text is not None else None
    return tuple(dict.fromkeys(ids + ([named] if named is not None else [])))


def _speller(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How this vocabulary spells bytes. Raises ModelError if it is neither of the two ways that lose nothing."""
    kinds = {part["type"] for key in ("decoder", "pre_tokenizer") for part in _parts(description.get(key))}
    if "ByteLevel" in kinds:
        return partial(_byte_level_bytes, _byte_level_alphabet())
    if kinds & {"ByteFallback", "Metaspace"} or description["model"].get("byte_fallback"):
        return _sentencepiece_bytes
    raise ModelError("the tokenizer is neither byte-level nor SentencePiece-like, so its tokens have no exact bytes")


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """A decoder or pre-tokenizer, or the members of a sequence of them."""
    if component is None:
        return
    members = component.get("decoders") or component.get("pretokenizers")
    if members is None:
        yield component
    for member in members or ():
        yield from _parts(member)


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's spelling: printable Latin-1 bytes stand for themselves, the other 68 are moved to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


def _byte_level_bytes(alphabet: Mapping[str, bytes], token: str) -> bytes:
    try:
        return b"".join([alphabet[character] for character in token])
    except KeyError:  # an entry that was never spelled in bytes: padding of the vocabulary
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()
