"""The console in a real Chromium: over a scripted backend where the answer matters, over real workers where they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from packlight.compress.policy import Decision, Plan
from packlight.core.config_tree import build_config
from packlight.core.kept_map import KeptMap
from packlight.core.types import Finished, GenerateRequest, Progress
from packlight.embedded import Embedded
from packlight.models.opened import open_model
from packlight.router.service import BackendEvent, Decided
from tests.support.browser import CHROMIUM, Visit, chromium, visiting
from tests.support.router_harness import Harness, serving
from tests.support.scripted_backend import End, Say, Script, ScriptedBackend, Step, Wait

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]

KEY = "a-key-that-is-long-enough"
SPITE = '<img src=x onerror="window.taken=1"><script>window.taken=2</script><b>bold</b> &amp; &lt;'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One for all tests; each has a profile of its own."""
    async with chromium() as running:
        yield running


class PackingBackend(ScriptedBackend):
    """Says what the plan decided, and that layer group 0 kept all and group 1 its first tokens only."""

    async def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[BackendEvent, None]:
        decision = plan.usual if plan else Decision(request.pack)
        yield Decided(request.request_id, decision)
        async for event in super().generate(replace(request, pack=decision.pack)):
            if isinstance(event, Progress | Finished) and request.explain:
                kv = replace(event.usage.kv, recipe=decision.pack.recipe, kept_map=_map_of(request.num_prompt_tokens))
                event = replace(event, usage=replace(event.usage, kv=kv))
            yield event


def _map_of(num_tokens: int) -> KeptMap:
    first = num_tokens // 4
    return KeptMap(num_tokens, 2, 1, (num_tokens, first), b"\xff" * (num_tokens + first) + bytes(num_tokens - first))


@asynccontextmanager
async def console(browser: Browser, script: Script | list[Step], **router: Any) -> AsyncIterator[tuple[Visit, Harness]]:
    """The page of a router whose backend is scripted."""
    harness = Harness(script, 4096, **router)
    harness.use_backend(PackingBackend(script))
    async with serving(harness.app) as url, visiting(browser, url) as visit:
        yield visit, harness


def says(text: str) -> list[Step]:
    return [Say(Harness().ids(text)), End()]


async def send(visit: Visit, text: str) -> None:
    """Once the page knows the server."""
    await visit.page.locator('#status[data-state="good"]').wait_for()
    await visit.page.fill("#prompt", text)
    await visit.page.press("#prompt", "Enter")


async def until_state(visit: Visit, state: str, nth: int = -1) -> None:
    lane = visit.page.locator(".lane .state")
    await (lane.last if nth < 0 else lane.nth(nth)).filter(has_text=state).wait_for()


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tokens_are_shown_as_they_come(browser: Browser) -> None:
    rest = asyncio.Event()
    ids = Harness().ids
    async with console(browser, [Say(ids("The first")), Wait(rest), Say(ids(" and the rest.")), End()]) as (visit, _):
        await send(visit, "Hello")
        text = visit.page.locator(".lane .text")
        await text.filter(has_text="The first").wait_for()
        assert await text.text_content() == "The first"
        assert await text.get_attribute("aria-busy") == "true"
        await visit.page.locator("#stop").wait_for()
        rest.set()
        await until_state(visit, "complete")
        assert await text.text_content() == "The first and the rest."
        assert await text.get_attribute("aria-busy") == "false"
        await visit.page.locator("#send").wait_for()


async def test_the_strip_and_the_figures_beside_an_answer(browser: Browser) -> None:
    async with console(browser, says("Yes.")) as (visit, harness):
        await send(visit, "one two three four five six seven eight nine ten")
        await until_state(visit, "complete")
        (request,) = harness.backend.requests
        labels = await visit.page.locator(".labels span").all_text_contents()
        assert labels == ["0", "1", str(request.num_prompt_tokens), str(request.num_prompt_tokens // 4)]
        top, bottom = await visit.page.locator(".field canvas").evaluate(_COLOURS)
        assert len(top) == 1, "all of the first group was kept"
        assert len(bottom) == 2, "a part of the second was"
        assert top[0] in bottom
        figures = await visit.page.locator(".figures").first.text_content() or ""
        for part in ("13 of", "1.00 kB of 8.00 kB", "8.0× less", "97.0", "+3 by the floor"):
            assert part in figures.replace("\u202f", " "), part
        legend = await visit.page.locator(".legend").text_content() or ""
        assert "prefill 26" in legend
        assert "queue 3.0" in legend
        assert await visit.page.locator('[data-figure="ttft"]').text_content() != "–"


_COLOURS = """canvas => {
  const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const row = y => new Set(Array.from({length: width - 8}, (_, x) => {
    const at = 4 * (Math.floor(y * height) * width + x + 4);
    return data.slice(at, at + 3).join();
  }));
  const often = colours => [...colours].filter(one => one);
  return [often(row(0.2)), often(row(0.8))];
}"""


async def test_the_prompt_can_be_read_by_pointer_and_by_keyboard(browser: Browser) -> None:
    async with console(browser, says("Yes.")) as (visit, _):
        await send(visit, "alpha beta gamma delta omega")
        await until_state(visit, "complete")
        field, reading = visit.page.locator(".field"), visit.page.locator(".reading")
        box = await field.bounding_box()
        assert box is not None
        await field.hover(position={"x": 2, "y": 2})
        await reading.filter(has_text="Token 1, 100").wait_for()
        await field.focus()
        await field.press("End")
        said = await field.get_attribute("aria-valuetext") or ""
        assert said.startswith("Token ")
        assert "50" in said, "half of the layers kept it"
        await field.press("ArrowLeft")
        assert await field.get_attribute("aria-valuetext") != said
        await visit.page.locator(".whole summary").click()
        prompt = visit.page.locator(".prompt-text")
        await prompt.filter(has_text="alpha beta gamma delta omega").wait_for()
        levels = await prompt.locator("span").evaluate_all("spans => spans.map(span => span.dataset.level)")
        assert set(levels[:5]) == {"5"}
        assert levels[-1] not in ("5", "0")


async def test_a_conversation_goes_on_from_what_was_said(browser: Browser) -> None:
    async with console(browser, says("An answer.")) as (visit, harness):
        await visit.page.fill("#system", "Be brief.")
        await send(visit, "First question")
        await until_state(visit, "complete")
        await send(visit, "Second question")
        await visit.page.locator(".lane").nth(1).wait_for()
        await until_state(visit, "complete")
        tokenizer = harness.model.tokenizer
        prompts = [b"".join(map(tokenizer.token_bytes, one.token_ids)).decode() for one in harness.backend.requests]
        assert prompts[1].index("Be brief.") < prompts[1].index("First question") < prompts[1].index("An answer.")
        assert prompts[1].index("An answer.") < prompts[1].index("Second question")
        await visit.page.click("#fresh")
        assert await visit.page.locator(".turn").count() == 0
        await send(visit, "Third")
        await until_state(visit, "complete")
        assert len(harness.backend.requests[-1].token_ids) < len(harness.backend.requests[0].token_ids)


async def test_stop_ends_the_work_behind_it(browser: Browser) -> None:
    async with console(browser, [Say(Harness().ids("Endless")), Wait()]) as (visit, harness):
        await send(visit, "Hello")
        await visit.page.locator(".lane .text").filter(has_text="Endless").wait_for()
        await visit.page.click("#stop")
        await until_state(visit, "stopped")
        await harness.backend.until(lambda: harness.backend.num_open == 0)
        assert list(harness.backend.ended.values()) == ["closed"]
        assert await visit.page.locator(".fault").count() == 0
        await visit.page.locator("#send").wait_for()


async def test_two_settings_side_by_side(browser: Browser) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        return says("It is ten." if request.pack.recipe == "none" else "It is two.")

    async with console(browser, script) as (visit, harness):
        await visit.page.locator('#status[data-state="good"]').wait_for()
        await visit.page.check("#compare")
        await visit.page.select_option("#recipe-B", "streaming_llm")
        await visit.page.select_option("#size-B", "budget")
        await visit.page.fill("#budget-B", "64")
        await send(visit, "How many?")
        await visit.page.locator(".verdict").wait_for()
        assert await visit.page.locator(".lane .text").all_text_contents() == ["It is ten.", "It is two."]
        assert await visit.page.locator(".lane .readout").count() == 2
        assert "agree for 7 characters" in (await visit.page.locator(".verdict").text_content() or "")
        first, second = harness.backend.requests
        assert [first.pack.recipe, second.pack.recipe, second.pack.budget_tokens] == ["none", "streaming_llm", 64]
        await visit.page.locator(".field").last.press("End")
        readings = await visit.page.locator(".reading").all_text_contents()
        assert readings[0] == readings[1], "both strips show the place that one was pointed at"
        assert first.cache_salt != second.cache_salt, "neither may find what the other left in the cache"
        tops = await visit.page.locator(".lane").evaluate_all("all => all.map(one => one.getBoundingClientRect().top)")
        assert tops[0] == tops[1]


# ── what must not happen ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_markup_in_prompt_and_answer_stays_text(browser: Browser) -> None:
    async with console(browser, says(SPITE)) as (visit, _):
        await send(visit, SPITE)
        await until_state(visit, "complete")
        assert await visit.page.locator(".lane .text").text_content() == SPITE
        assert await visit.page.locator(".question").text_content() == SPITE
        await visit.page.locator(".whole summary").click()
        await visit.page.locator(".prompt-text span").first.wait_for(state="attached")
        assert SPITE in (await visit.page.locator(".prompt-text").text_content() or "")
        for press in ("Home", *["ArrowRight"] * 20):
            await visit.page.locator(".field").press(press)
        assert await visit.page.locator("#log img, #log script, #log .text b, #log .question b").count() == 0
        assert await visit.page.evaluate("window.taken") is None


async def test_the_page_cannot_make_markup_of_text_even_if_it_tried(browser: Browser) -> None:
    async with console(browser, says("Yes.")) as (visit, _):
        tried = await visit.page.evaluate(
            "try { document.body.innerHTML = '<b>x</b>'; 'done' } catch (error) { error.name }"
        )
        assert tried == "TypeError"
        assert any("TrustedHTML" in complaint for complaint in visit.complaints)
        visit.complaints.clear()


async def test_the_servers_errors_are_shown_in_its_words(browser: Browser) -> None:
    async with console(browser, says("Yes.")) as (visit, _):
        await visit.page.locator('#status[data-state="good"]').wait_for()
        await visit.page.fill("#max-tokens", "4096")
        await send(visit, "Hello")
        fault = visit.page.locator('.fault[role="alert"]')
        await fault.wait_for()
        assert "maximum context length is 4096 tokens" in (await fault.text_content() or "")
        await visit.page.fill("#max-tokens", "16")
        await send(visit, "Hello again")
        await until_state(visit, "complete", nth=1)


async def test_a_key_is_asked_for_and_kept_in_the_tab_only(browser: Browser, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    async with console(browser, says("Yes."), api_keys_file=str(keys)) as (visit, _):
        await visit.page.locator("#key-form").wait_for()
        assert "API key" in (await visit.page.locator("#status").text_content() or "")
        await visit.page.fill("#key", KEY)
        await visit.page.press("#key", "Enter")
        await send(visit, "Hello")
        await until_state(visit, "complete")
        await visit.page.locator("#key-form").wait_for(state="hidden")
        assert await visit.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert await visit.page.input_value("#key") == ""


async def test_switched_off_there_is_nothing(browser: Browser) -> None:
    harness = Harness(says("Yes."), console=False)
    async with serving(harness.app) as url, visiting(browser, url) as visit:
        answer = await visit.page.goto(url)
        assert answer is not None
        assert answer.status == 404


# ── the page itself ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_control_has_a_name(browser: Browser) -> None:
    async with console(browser, says("Yes.")) as (visit, _):
        await visit.page.locator('#status[data-state="good"]').wait_for()
        nameless = await visit.page.locator("input, select, textarea, button, [tabindex]").evaluate_all(
            "all => all.filter(one => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())"
            ".map(one => one.id)"
        )
        assert nameless == []


@pytest.mark.parametrize("width", [360, 768, 1024, 1440])
async def test_it_fits_the_screen(browser: Browser, width: int) -> None:
    harness = Harness(says("A " + "very-long-word-without-any-break" * 8), 4096)
    harness.use_backend(PackingBackend(harness.backend.script))
    async with serving(harness.app) as url, visiting(browser, url, width=width, height=700) as visit:
        await send(visit, "word" * 200)
        await until_state(visit, "complete")
        wide = await visit.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1]
        over = await visit.page.locator(".lane, .readout, .figures, .track").evaluate_all(
            "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.className)"
        )
        assert over == []


async def test_real_workers_answer_and_the_fleet_is_live(browser: Browser) -> None:
    """Router, prefill and decode in one process, around the arithmetic model: a byte is a token."""
    config = build_config(
        {
            "model": {"path": "fake"},
            "prefill": {"kv_memory_bytes": 1 << 20},
            "decode": {"kv_memory_bytes": 1 << 20},
            "fleet": {"heartbeat_s": 0.2, "ttl_s": 30},
        }
    )
    embedded = Embedded(config, open_model(config.model, on_progress=print), print)
    await embedded.start()
    running = asyncio.create_task(embedded.run())
    try:
        async with serving(embedded.app) as url, visiting(browser, url) as visit:
            await visit.page.locator('#status[data-state="good"]').wait_for()
            assert await visit.page.locator(".worker").count() == 2
            await visit.page.select_option("#recipe-B", "streaming_llm")
            await visit.page.select_option("#size-B", "ratio")
            await visit.page.fill("#ratio-B", "0.25")
            await visit.page.fill("#max-tokens", "8")
            prompt = "The keeper wrote it down each day, and nobody ever read it. " * 10
            await send(visit, prompt.strip())
            await until_state(visit, "c")  # complete, or cut at the longest answer
            await visit.page.locator(".readout").wait_for()
            figures = (await visit.page.locator(".figures").first.text_content() or "").replace("\u202f", " ")
            assert f"{-(-(len(prompt) - 1) // 4)} of {len(prompt) - 1} tokens" in figures
            done = visit.page.locator("#fleet dl").last.locator("dd").first
            await done.filter(has_text="1").wait_for()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await embedded.close()
