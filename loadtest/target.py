"""The server under test, before it is: its URL, the model it serves, and how much of a prompt that model reads.

Knows `/v1/models`, which every OpenAI-compatible server has, and `max_model_len` in it, which some have.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loadtest.verdict import ServerUnreachable
from packlight.bench.serve.stream import describe_refusal
from packlight.core.errors import ConfigError

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """`kind` says what it is to people. `max_context` None: the server does not say."""

    url: str
    kind: str
    model: str
    max_context: int | None


def check_url(url: str) -> str:
    """Without `/v1` and trailing slashes. Raises ConfigError for what is no HTTP URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: a URL such as http://127.0.0.1:8000 is expected")
    return url.rstrip("/").removesuffix("/v1")


def describe(url: str, kind: str, model: str | None, api_key: str | None) -> Target:
    """Asks the server. Raises ServerUnreachable when nobody answers, ConfigError when it does not name its models and
    `model` is None."""
    try:
        listed = _list_models(url, api_key)
    except ConfigError:
        if model is None:
            raise
        return Target(url, kind, model, None)
    chosen = next((each for each in listed if model in (None, each.get("id"))), {"id": model})
    length = chosen.get("max_model_len")
    return Target(url, kind, str(chosen["id"]), length if isinstance(length, int) else None)


def _list_models(url: str, api_key: str | None) -> list[dict[str, Any]]:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=_TIMEOUT_S) as reply:
            listed: list[dict[str, Any]] = json.load(reply)["data"]
            listed[0]["id"]  # an empty list names none
            return listed
    except urllib.error.HTTPError as error:
        said = describe_refusal(error.read())
        raise ConfigError(f"{url}/v1/models: HTTP {error.code}: {said}; name the model: --model MODEL") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ServerUnreachable(f"{url}: no server answers ({reason}); start one, or leave --url out") from None
    except (ValueError, LookupError, TypeError, http.client.HTTPException):
        raise ConfigError(f"{url}/v1/models: names no model; name it: --model MODEL") from None
