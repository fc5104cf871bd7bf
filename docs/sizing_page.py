"""The sizing table of `docs/operations.md`: KV of a few models at a few lengths, exact and packed.

Knows Markdown and the shapes of published models. How many pages a packed prompt takes is asked of
`compress/budget.py`, as admission does, so the table cannot promise more than a decode worker holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from packlight.compress.budget import max_pages
from packlight.core.types import ModelSpec, PackSpec

PAGE_SIZE, ITEM_BYTES = 16, 2  # bfloat16
LENGTHS = (8192, 32_768, 131_072)
ANSWER_TOKENS = 1024
POOL_BYTES = 32 << 30
EXACT, PACKED = PackSpec("none"), PackSpec("snapkv", ratio=1 / 8)


def _model(name: str, layers: int, kv_heads: int, head_dim: int, max_context: int) -> ModelSpec:
    return ModelSpec(name, "", layers, kv_heads, head_dim, 0, max_context, (), "bfloat16")


MODELS = (
    _model("SmolLM2-135M", 30, 3, 64, 8192),
    _model("Llama-3.1-8B", 32, 8, 128, 131_072),
    _model("Qwen3-8B", 36, 8, 128, 131_072),
    _model("Qwen3-30B-A3B", 48, 4, 128, 131_072),
)


def sizing_table() -> str:
    """Markdown: a row per model and prompt length."""
    header = (
        "| model | KV a token | prompt | exact | packed 8x | requests in 32 GiB, exact | packed 8x |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    return "\n".join([header, *(row(model, length) for model, length in _cases())]) + "\n"


def row(model: ModelSpec, num_tokens: int) -> str:
    """KV of the prompt alone, then how many requests with such a prompt and an answer fit."""
    sizes = [kv_bytes(model, spec, num_tokens) for spec in (EXACT, PACKED)]
    whole = [kv_bytes(model, spec, num_tokens, ANSWER_TOKENS) for spec in (EXACT, PACKED)]
    cells = [
        model.name,
        f"{model.kv_bytes_per_token(ITEM_BYTES) / 1024:g} KiB",
        f"{num_tokens // 1024}k",
        *(_shown(size) for size in sizes),
        *(str(POOL_BYTES // size) for size in whole),
    ]
    return f"| {' | '.join(cells)} |"


def kv_bytes(model: ModelSpec, spec: PackSpec, num_tokens: int, num_new_tokens: int = 0) -> int:
    """What admission reserves on decode: whole head pages."""
    pages = max_pages(spec, model, num_tokens, PAGE_SIZE, num_new_tokens=num_new_tokens)
    return pages * 2 * PAGE_SIZE * model.head_dim * ITEM_BYTES


def _cases() -> Iterator[tuple[ModelSpec, int]]:
    return ((model, length) for model in MODELS for length in LENGTHS if length <= model.max_context)


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
