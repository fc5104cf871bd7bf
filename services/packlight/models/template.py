"""Chat templates: Jinja programs that ship with a model and turn messages into a prompt.

Knows the environment that Hugging Face templates are written for (documented under "chat templates" in transformers).
Does not know tokens. A template is somebody else's program, so it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from packlight.core.errors import InvalidRequest, ModelError
from packlight.models.folder import read_json_if_there

Now = Callable[[], datetime]


class ChatTemplate:
    """The templates of one model, compiled: the default one, and others by name (`tool_use`).

    `variables` are what every rendering sees besides its messages: the special tokens, as `bos_token` and so on.
    Raises ModelError for a template that does not parse."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str], *, now: Now = datetime.now) -> None:
        environment = _environment(now)
        self._variables = dict(variables)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template does not parse (line {error.lineno}: {error.message})") from None

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], *, now: Now = datetime.now) -> ChatTemplate:
        config = read_json_if_there(Path(folder) / "tokenizer_config.json")
        return cls(_sources(Path(folder), config), special_tokens(config), now=now)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text. Raises InvalidRequest for messages that the template refuses or cannot digest."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        values = {**self._variables, "documents": None, **kwargs}
        values |= {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(values)
        # A template is a program written for well-formed chats: whatever it raises is about these messages.
        except Exception as error:
            reason = getattr(error, "message", None) or str(error) or type(error).__name__
            raise InvalidRequest(f"the model's chat template refuses this: {reason}", param="messages") from None


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role (`bos_token`, ...). A token is written as text, or as an object with `content`."""
    tokens: dict[str, str] = {}
    for role, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(text, str):
            tokens[role] = text
    return tokens


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A `chat_template.jinja` file wins over the older places."""
    file = folder / "chat_template.jinja"
    found = config.get("chat_template") or read_json_if_there(folder / "chat_template.json").get("chat_template")
    named = {"default": found} if isinstance(found, str) else {one["name"]: one["template"] for one in found or []}
    for other in sorted(folder.glob("additional_chat_templates/*.jinja")):
        named[other.stem] = _text(other)
    return named | {"default": _text(file)} if file.is_file() else named


def _text(path: Path) -> str:
    return path.read_bytes().decode()


def _environment(now: Now) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training. For serving it is its contents."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
