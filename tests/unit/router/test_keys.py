"""API keys: who gets in, what stays open, and what becomes of a file that changes or is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from packlight.core.errors import ConfigError, Unauthorized
from packlight.router.keys import RECHECK_S, ApiKeys
from tests.support.clock import FakeClock
from tests.support.router_harness import CHAT, Harness, chat_body
from tests.support.scripted_backend import End, Say

FIRST, SECOND = "pl-0123456789abcdef", "pl-fedcba9876543210"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# the team\n{FIRST}\n\n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def rewrite(path: Path, text: str) -> None:
    before = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(before + 1, before + 1))  # however coarse the file system's clock is


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {FIRST}", FIRST, f"Bearer {SECOND}"])
async def test_without_a_key_of_the_file_nothing_is_asked_of_a_worker(file: Path, header: str | None) -> None:
    harness = Harness([Say([5]), End()], api_keys_file=str(file))
    answer = await harness.post(CHAT, chat_body(), {} if header is None else {"authorization": header})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]
    assert SECOND not in answer.text
    assert harness.backend.requests == []
    assert harness.metric("errors_total", type="Unauthorized") == 1


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_a_key_of_the_file_is_served(file: Path, scheme: str) -> None:
    harness = Harness([Say([5]), End()], api_keys_file=str(file))
    answer = await harness.post(CHAT, chat_body(), {"authorization": f"{scheme} {FIRST}"})
    assert answer.status_code == 200


async def test_models_need_a_key_and_probes_do_not(file: Path) -> None:
    harness = Harness(api_keys_file=str(file))
    async with harness.client() as client:
        statuses = {
            path: (await client.get(path)).status_code
            for path in ("/health/live", "/health/ready", "/health", "/metrics", "/v1/models", "/nowhere")
        }
        assert (await client.get("/v1/models", headers=bearer(FIRST))).status_code == 200
    assert statuses == {
        "/health/live": 200, "/health/ready": 200, "/health": 200, "/metrics": 200, "/v1/models": 401, "/nowhere": 401,
    }  # fmt: skip


async def test_without_a_file_everybody_may_ask() -> None:
    assert (await Harness([Say([5]), End()]).chat()).status_code == 200


def test_a_changed_file_is_followed(file: Path) -> None:
    clock = FakeClock()
    keys = ApiKeys(file, clock=clock)
    rewrite(file, f"{SECOND}\n")
    keys.check(f"Bearer {FIRST}")  # not looked at again yet
    clock.advance(RECHECK_S)
    keys.check(f"Bearer {SECOND}")
    with pytest.raises(Unauthorized):
        keys.check(f"Bearer {FIRST}")


@pytest.mark.parametrize("text", ["", "short\n", None], ids=["empty", "wrong", "gone"])
def test_a_file_that_went_wrong_leaves_the_keys_and_is_said(
    file: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    keys = ApiKeys(file, clock=clock)
    if text is None:
        file.unlink()
    else:
        rewrite(file, text)
    for _ in range(3):
        clock.advance(RECHECK_S)
        keys.check(f"Bearer {FIRST}")
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# none\n", "has no key"),
        (f"{FIRST}\nshort\n", r"line 2: .*16 characters at least.*has 5"),
        ("two words of a sentence\n", "no space"),
        ("schlüssel-für-alle-türen\n", "line 1: .*ASCII"),
    ],
)
def test_a_wrong_file_ends_the_start(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        Harness(api_keys_file=str(file))


def test_a_file_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router.api_keys_file .*/keys': cannot be read"):
        Harness(api_keys_file=str(tmp_path / "keys"))
