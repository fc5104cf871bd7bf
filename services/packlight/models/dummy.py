"""Models without weights: the shape of a real one, random numbers in place of what it learned.

For measuring where the weights cannot be had: time and memory depend on shapes, not on values. A dummy model is a
folder like any other, made in the cache, with a `config.json` and no weight file; the loaders draw its weights
(`dummy_tensors.py`). Its tokenizer reads a byte as a token, and spells every token it may answer with. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from packlight.core.errors import ModelError
from packlight.models.folder import ModelFolder, read_json

SHAPES = Path(__file__).parent / "shapes"
_END = "<|end|>"
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def shape_names() -> tuple[str, ...]:
    """The shapes that come with the package."""
    return tuple(sorted(path.stem for path in SHAPES.glob("*.json")))


def dummy_folder(path: str, name: str | None, cache_dir: Path) -> ModelFolder:
    """The dummy of `path`: a shape by name, or a folder whose `config.json` is one, and whose tokenizer is taken if it
    has one. Raises ModelError."""
    source = _config_file(path)
    text = source.read_text(encoding="utf-8")
    config = read_json(source)
    tokenizer = source.parent / "tokenizer.json"
    made_from = text.encode() + (tokenizer.read_bytes() if tokenizer.is_file() else b"")
    folder = cache_dir / f"dummy-{source.stem}-{hashlib.blake2b(made_from, digest_size=6).hexdigest()}"
    if not (folder / "tokenizer.json").is_file():
        _make(folder, source, config)
    return ModelFolder(folder, name or (source.stem if source.parent == SHAPES else source.parent.name), is_dummy=True)


def _config_file(path: str) -> Path:
    for file in (SHAPES / f"{path}.json", Path(path).expanduser() / "config.json"):
        if file.is_file():
            return file
    raise ModelError(
        f"model.path {path!r} with model.weights=dummy: neither a shape that comes with Packlight "
        f"({', '.join(shape_names())}) nor a folder with a config.json"
    )


def _make(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """The tokenizer comes last: where it is, everything is."""
    folder.mkdir(parents=True, exist_ok=True)
    own = source.parent / "tokenizer.json"
    if own.is_file():
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", own.name):
            if (source.parent / name).is_file():
                shutil.copy(source.parent / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return
    end = int(config["vocab_size"]) - 1
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end}, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": _END, "chat_template": _TEMPLATE}))
    _tokenizer(end).save(str(folder / "tokenizer.json"))


def _tokenizer(end: int) -> Tokenizer:
    """256 bytes, then words that text is never read as, but that answers are written in; `end` is the last id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_word(number)}" for number in range(end - len(alphabet)))
    vocabulary = {token: index for index, token in enumerate((*alphabet, *words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    return tokenizer


def _word(number: int) -> str:
    """The number in syllables: every word is another one."""
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    word = ""
    while number or not word:
        number, at = divmod(number, len(syllables))
        word += syllables[at]
    return word
