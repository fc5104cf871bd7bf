"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

Knows GGUF's tokenizer metadata. GGUF names a pre-tokenizer instead of describing it, so the descriptions are here, and
an unknown name is refused: a wrong split changes the ids of ordinary text and the model silently answers worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from packlight.core.errors import ModelError
from packlight.models.gguf.reader import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`ignore_merges`: a piece that is a whole vocabulary entry is taken as it is, merges or not."""

    split: Callable[[bool], Any]
    ignore_merges: bool = False
    adds_bos: bool = False
    normalizes_nfc: bool = False


def _gpt2(prefix_space: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)


def _smollm(prefix_space: bool) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)]
    )


def _cl100k(digits: str) -> Callable[[bool], Any]:
    """The split of Llama 3 and Qwen 2: as OpenAI's cl100k, with runs of at most `digits` digits."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = f"{words}|{digits}|{rest}"

    def build(prefix_space: bool) -> Any:
        pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
        return pre_tokenizers.Sequence([pieces, to_bytes])

    return build


PRE_TOKENIZERS = {
    "default": PreTokenizer(_gpt2),
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": PreTokenizer(_smollm),
    "llama-bpe": PreTokenizer(_cl100k(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(_cl100k(r"\p{N}"), normalizes_nfc=True),
}


def build_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """Raises ModelError for a vocabulary that is not byte-level BPE, is inconsistent, or is split in an unknown way."""
    pre = _pre_tokenizer(gguf)
    tokens: list[str] = gguf.require("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{gguf.path}: the vocabulary names {len(tokens) - len(vocab)} tokens twice. Convert it again")
    try:
        model = models.BPE(vocab=vocab, merges=_merges(gguf), ignore_merges=pre.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{gguf.path}: unusable merges in the vocabulary ({error}). Convert it again") from None
    tokenizer = Tokenizer(model)
    if pre.normalizes_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.split(bool(gguf.metadata.get("tokenizer.ggml.add_space_prefix", False)))
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, tokens, gguf.metadata.get("tokenizer.ggml.token_type", []))
    if gguf.metadata.get("tokenizer.ggml.add_bos_token", pre.adds_bos):
        _prepend_bos(tokenizer, tokens, gguf.require("tokenizer.ggml.bos_token_id"))
    return tokenizer


def tokenizer_config(gguf: GGUFFile) -> dict[str, Any]:
    """`tokenizer_config.json`: the special tokens by role, as text."""
    tokens: list[str] = gguf.require("tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    named = {role: tokens[index] for role, index in ids.items() if index is not None and index < len(tokens)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.metadata.get(f"{gguf.metadata['general.architecture']}.context_length"),
        **named,
    }


def generation_config(gguf: GGUFFile) -> dict[str, Any]:
    """`generation_config.json`: every token that ends an answer (end of text, of turn, of message)."""
    ends = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(index for index in ends if index is not None)),
        "pad_token_id": gguf.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def chat_template(gguf: GGUFFile) -> str | None:
    template = gguf.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    kind = gguf.require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(
            f"{gguf.path}: the vocabulary is of kind {kind!r}, and only byte-level BPE ('gpt2') can be rebuilt. "
            "Use the model's safetensors folder instead, which has a tokenizer.json"
        )
    name = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{gguf.path}: pre-tokenizer {name!r} is not known (known: {', '.join(PRE_TOKENIZERS)}). "
            "Use the model's safetensors folder instead, which has a tokenizer.json"
        )
    return PRE_TOKENIZERS[name]


def _merges(gguf: GGUFFile) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in gguf.require("tokenizer.ggml.merges")]
    return [(left, right) for left, _, right in pairs]


def _add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens are special; user-defined ones are ordinary text that is never split. Both keep their ids."""
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _prepend_bos(tokenizer: Tokenizer, tokens: Sequence[str], bos: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
    )
