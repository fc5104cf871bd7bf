"""The console's page and data over HTTP: what is served, what is told, and what is not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from packlight.compress.recipes import RECIPES
from packlight.core.workers import LocalPrefill, Role, WorkerInfo, WorkerLoad
from packlight.router.console.page import STATIC
from packlight.router.console.state import TOTALS, totals
from packlight.telemetry.catalogue import CATALOGUE
from packlight.telemetry.metrics import RouterMetrics
from tests.support.router_harness import COMPLETIONS, MODEL, Harness
from tests.support.scripted_backend import one_by_one

KEY = "a-key-that-is-long-enough"
DATA = ("/console/state", "/console/fleet")
FILES = sorted(path.name for path in STATIC.iterdir())
LOAD = WorkerLoad(2, 1, 300, 40, 100, tokens_per_s=1500.0, ship_bytes_per_s=2e6)


def worker(worker_id: str, role: Role, **fields: Any) -> WorkerInfo:
    return WorkerInfo(worker_id, 1, role, f"{worker_id}.internal:9000", MODEL, "f", "c", load=LOAD, **fields)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_page_and_all_it_names() -> None:
    async with Harness().client() as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
        assert {"console/static/main.js", "console/static/console.css"} <= set(named)
        for name in named:
            assert (await client.get(f"/{name}")).status_code == 200, name


@pytest.mark.parametrize("path", ["/", *(f"/console/static/{name}" for name in FILES)])
async def test_every_file_comes_with_the_policy_and_is_not_sent_twice(path: str) -> None:
    async with Harness().client() as client:
        answer = await client.get(path)
        again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (again.status_code, again.content) == (304, b"")


async def test_other_names_are_unknown() -> None:
    async with Harness().client() as client:
        for name in ("nothing.js", "..%2Fpage.py", "../page.py", "index.html/x"):
            assert (await client.get(f"/console/static/{name}")).status_code == 404, name


def test_the_files_are_small_and_lead_nowhere_else() -> None:
    files = {name: (STATIC / name).read_text() for name in FILES}
    assert sum(len(text.encode()) for text in files.values()) < 100_000
    for name, text in files.items():
        outside = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, f"{name} names another origin"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
        imported = re.findall(r'from "\./([^"]+)"', text)
        assert set(imported) <= set(FILES), f"{name} imports what is not there"
    assert not re.search(r"<style|\son\w+=|style=|<script(?![^>]*\bsrc=)", files["index.html"]), "inline code or style"


async def test_it_can_be_switched_off() -> None:
    async with Harness(console=False).client() as client:
        for path in ("/", "/console/static/main.js", *DATA):
            assert (await client.get(path)).status_code == 404, path
        assert (await client.get("/v1/models")).status_code == 200


async def test_an_api_key_guards_the_data_and_not_the_page(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    async with Harness(api_keys_file=str(keys)).client() as client:
        for path in ("/", "/console/static/main.js"):
            assert (await client.get(path)).status_code == 200, path
        for path in DATA:
            assert (await client.get(path)).status_code == 401, path
            assert (await client.get(path, headers={"authorization": f"Bearer {KEY}"})).status_code == 200, path


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_state_offers_what_a_request_may_ask() -> None:
    harness = Harness(one_by_one([80]), 4096, kv={"recipe": "snapkv"}, model={"num_kv_heads": 2})
    async with harness.client() as client:
        state = (await client.get("/console/state")).json()
    assert state["model"]["name"] == MODEL
    assert state["default_recipe"] == "snapkv"
    assert [recipe["name"] for recipe in state["recipes"]] == list(RECIPES)
    assert state["policy"]["rows"][:2] == [
        {"min_tokens": 0, "recipe": "none", "ratio": None},
        {"min_tokens": 256, "recipe": "snapkv", "ratio": 0.5},
    ]
    for name in (recipe["name"] for recipe in state["recipes"]):
        for codec in state["codecs"]:
            body = {"model": MODEL, "prompt": "Hello", "kv": {"recipe": name, "codec": codec, "explain": True}}
            assert (await harness.post(COMPLETIONS, body)).status_code == 200, (name, codec)


async def test_what_the_model_cannot_have_is_not_offered() -> None:
    async with Harness(model={"num_kv_heads": 1}).client() as client:
        state = (await client.get("/console/state")).json()
    assert "adakv" not in [recipe["name"] for recipe in state["recipes"]]


async def test_the_fleet_in_figures() -> None:
    harness = Harness(one_by_one([80, 81, 82]))
    local = LocalPrefill("decode-0+", 512, 0.2, LOAD)
    harness.backend.workers_now = (
        worker("decode-0", Role.DECODE, local_prefill=local),
        worker("prefill-1", Role.PREFILL, draining=True),
        worker("prefill-0", Role.PREFILL),
    )
    await harness.chat("What nobody else may read")
    async with harness.client() as client:
        answer = await client.get("/console/fleet")
    fleet = answer.json()
    assert [one["id"] for one in fleet["workers"]] == ["prefill-0", "prefill-1", "decode-0"]
    first, second, third = fleet["workers"]
    assert (first["draining"], second["draining"]) == (False, True)
    assert (first["running"], first["queued"], first["free_pages"], first["total_pages"]) == (2, 1, 40, 100)
    assert first["tokens_per_s"] == 1500
    assert third["local_prefill"]["max_tokens"] == 512
    assert (fleet["ready"], fleet["draining"], fleet["inflight"]) == (True, False, 0)
    assert fleet["totals"]["requests"] == 1
    assert fleet["totals"]["generated_tokens"] == 3
    assert (fleet["totals"]["shipped_bytes"], fleet["totals"]["exact_bytes"]) == (1000, 8000)
    assert 0 < fleet["totals"]["cached_prompt_tokens"] < fleet["totals"]["prompt_tokens"]
    assert answer.headers["cache-control"] == "no-store"


async def test_neither_prompts_nor_addresses_are_told() -> None:
    harness = Harness(one_by_one(Harness().ids("An answer for one reader")))
    harness.backend.workers_now = (worker("prefill-0", Role.PREFILL),)
    reply = await harness.chat("A secret question", user="somebody", kv={"explain": True})
    async with harness.client() as client:
        told = "".join([(await client.get(path)).text for path in DATA])
    assert reply.status_code == 200
    for hidden in ("secret", "answer for", "somebody", reply.json()["id"], "internal", "9000"):
        assert hidden not in told, hidden


def test_totals_are_counters_of_the_catalogue() -> None:
    counters = {metric.name for metric in CATALOGUE["router"] if metric.kind == "counter"}
    assert set(TOTALS) <= counters


def test_totals_are_sums_over_labels() -> None:
    metrics = RouterMetrics(CollectorRegistry())
    for endpoint, outcome in (("chat", "completed"), ("completions", "completed"), ("chat", "failed")):
        metrics.request_started(endpoint)
        metrics.request_ended(endpoint, outcome, 1.0)
    assert totals(metrics.registry) == {**dict.fromkeys(TOTALS, 0.0), "requests": 3.0}
    assert json.dumps(totals(metrics.registry))
