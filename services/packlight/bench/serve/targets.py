"""Which servers take part, as the command line names them.

    --server packed=http://127.0.0.1:8000 --server full=http://127.0.0.1:8000
    --kv     'packed:{"recipe": "snapkv", "ratio": 0.125}'      the request's `kv` object
    --body   'peer:{"ignore_eos": null, "top_k": 1}'            any other fields; null leaves one out

Knows flags. Rows may share a URL and differ in what they ask for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from packlight.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the comparison. `url` ends before `/v1`. `model` None: the first that the server lists."""

    name: str
    url: str
    model: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    metrics_url: str | None = None
    pid: int | None = None


def parse_targets(
    servers: Sequence[str],
    *,
    models: Sequence[str] = (),
    kvs: Sequence[str] = (),
    bodies: Sequence[str] = (),
    metrics: Sequence[str] = (),
    pids: Sequence[str] = (),
) -> tuple[Target, ...]:
    """Raises ConfigError naming the flag at fault, or a server that no `--server` names."""
    urls = _by_name("server", servers, "=")
    if not urls:
        raise ConfigError("--server is missing: give at least one, such as --server packlight=http://127.0.0.1:8000")
    given = {
        "model": _by_name("model", models, "="),
        "kv": _by_name("kv", kvs, ":"),
        "body": _by_name("body", bodies, ":"),
        "metrics": _by_name("metrics", metrics, "="),
        "pid": _by_name("pid", pids, "="),
    }
    for flag, values in given.items():
        for name in values.keys() - urls.keys():
            raise ConfigError(f"--{flag} {name}: no --server has this name; there are {', '.join(urls)}")
    return tuple(
        Target(
            name=name,
            url=_base_url(name, url),
            model=given["model"].get(name),
            body=_body(name, given["kv"].get(name), given["body"].get(name)),
            metrics_url=given["metrics"].get(name),
            pid=_pid(name, given["pid"].get(name)),
        )
        for name, url in urls.items()
    )


def _by_name(flag: str, values: Sequence[str], separator: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, separated, rest = value.partition(separator)
        if not separated or not name or not rest:
            raise ConfigError(f"--{flag} {value}: NAME{separator}VALUE is expected")
        if name in found:
            raise ConfigError(f"--{flag} {name}: given twice; names are the rows of the report and must differ")
        found[name] = rest
    return found


def _base_url(name: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--server {name}={url}: a URL such as http://127.0.0.1:8000 is expected")
    return url.rstrip("/").removesuffix("/v1")


def _body(name: str, kv: str | None, body: str | None) -> dict[str, Any]:
    fields = _object(f"--body {name}", body)
    return fields if kv is None else fields | {"kv": _object(f"--kv {name}", kv)}


def _object(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: a JSON object is expected, got {text}")
    return value


def _pid(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"--pid {name}={text}: the number of a process is expected")
    return int(text)
