"""Telling a client which parts of its own prompt were kept: `usage.kv.explain`.

Knows a kept map and the prompt it is about. It repeats the prompt, so it goes into the answer to that very request and
nowhere else. Slow for long prompts, so the endpoint runs it on a thread. Pure.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

from packlight.core.kept_map import ALL, KeptMap
from packlight.router.choice import Choice
from packlight.router.service import Tokenizer


def explanation(choice: Choice, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """None where the workers did not say, or said it of another prompt: they may be of another release."""
    request, usage = choice.request, choice.usage
    kept = usage.kv.kept_map if usage is not None else None
    if kept is None or kept.num_tokens != request.num_prompt_tokens:
        return None
    return {
        "bin_tokens": kept.bin_tokens,
        "texts": list(texts(request.token_ids[: kept.num_tokens], kept.bin_tokens, tokenizer)),
        "groups": [_group(kept, group) for group in range(kept.num_groups)],
    }


def texts(token_ids: Sequence[int], bin_tokens: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each bin: joined they are the prompt's, without special tokens. A character that spans two bins is
    in the later one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for start in range(0, len(token_ids), bin_tokens):
        end = start + bin_tokens
        data = b"".join(map(tokenizer.token_bytes, token_ids[start:end]))
        yield decoder.decode(data, final=end >= len(token_ids))


def _group(kept: KeptMap, group: int) -> dict[str, Any]:
    layers = kept.layers(group)
    return {
        "first_layer": layers.start,
        "last_layer": layers.stop - 1,
        "kept_tokens": round(kept.num_kept_tokens[group], 2),
        "shares": [round(share / ALL, 3) for share in kept.row(group)],
    }
