"""The order of a shipment's events, who makes them, and what is counted of them."""

import asyncio
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

from packlight.core.errors import InternalError
from packlight.core.shipping import Accepted, Chunk, FirstToken, LayerHeader, Shipped
from packlight.core.types import Token
from packlight.prefill.outbox import Outbox

ACCEPTED, FIRST = Accepted("hash", b""), FirstToken(Token(7), 0)
END = Shipped(2, 10, 20, 3.0, 1.0, 0.0, 0.0, 0.0)


def layer(number, *sizes, offset=None):
    return [LayerHeader(number, (1,), 100, 0, offset), *(Chunk(bytes(size)) for size in sizes)]


async def rest_of(reader):
    """What is left; the end without what it took to pass things on."""
    return [replace(event, ship_s=0.0) if isinstance(event, Shipped) else event async for event in reader]


async def read_all(outbox):
    return await rest_of(outbox.read())


def put_elsewhere(outbox, events):
    thread = threading.Thread(target=outbox.put_threadsafe, args=(events,))
    thread.start()
    thread.join()


async def test_the_first_token_overtakes_what_still_waits():
    outbox, (one, two) = Outbox(), (layer(0, 3), layer(1, 4, 5))
    for events in ([ACCEPTED], one, two):
        put_elsewhere(outbox, events)
    reader = outbox.read()
    assert [await anext(reader) for _ in range(2)] == [ACCEPTED, one[0]]
    outbox.put(FIRST)
    outbox.put(END)
    assert await rest_of(reader) == [FIRST, one[1], *two, END]


async def test_the_first_token_does_not_overtake_what_says_how_to_read_it():
    outbox = Outbox()
    for events in ([ACCEPTED], layer(0, 3)):
        put_elsewhere(outbox, events)
    await asyncio.sleep(0)
    outbox.put(FIRST)
    outbox.put(END)
    assert await read_all(outbox) == [ACCEPTED, FIRST, *layer(0, 3), END]


async def test_frames_are_made_on_the_readers_thread():
    made_on = []

    def frames():
        made_on.append(threading.current_thread())
        yield from layer(0, 1)

    outbox = Outbox()
    put_elsewhere(outbox, frames())
    await asyncio.sleep(0)
    outbox.put(END)
    assert len(await read_all(outbox)) == 3
    assert made_on == [threading.main_thread()]


async def test_a_reader_waits_for_what_is_not_there_yet():
    outbox = Outbox()
    reading = asyncio.create_task(read_all(outbox))
    for events in ([ACCEPTED], layer(0, 1), []):
        put_elsewhere(outbox, events)
        await asyncio.sleep(0)
        assert not reading.done()
    outbox.put(END)
    assert await reading == [ACCEPTED, *layer(0, 1), END]


async def test_an_error_comes_after_what_was_put_before_it():
    outbox, error = Outbox(), InternalError("step failed")
    outbox.put(ACCEPTED)
    outbox.fail(error)
    reader = outbox.read()
    assert await anext(reader) == ACCEPTED
    with pytest.raises(InternalError, match="step failed"):
        await anext(reader)
    assert not outbox.is_complete


async def test_bytes_count_once_wherever_they_went():
    outbox = Outbox()
    for events in (layer(0, 60, 40), layer(1, offset=4096), [ACCEPTED]):
        outbox.put_threadsafe(events)
    await asyncio.sleep(0)
    outbox.put(END)
    assert not outbox.is_complete
    await read_all(outbox)
    assert outbox.sent.amount == pytest.approx(200, rel=1e-3)  # it fades, by the microseconds that this took
    assert outbox.is_complete


async def test_what_passes_before_the_prompt_is_computed_is_hidden():
    outbox = Outbox()
    outbox.put_threadsafe(layer(0, 1))
    await asyncio.sleep(0)
    reader = outbox.read()
    for _ in range(2):
        await anext(reader)
    outbox.put(FIRST)
    assert await anext(reader) == FIRST  # asking for it ended the last frame
    hidden_s = outbox.time.busy_s
    assert hidden_s > 0
    assert outbox.time.exposed_s < hidden_s
    exposed_s = outbox.time.exposed_s
    outbox.put_threadsafe(layer(1, 1))
    await asyncio.sleep(0)
    outbox.put(END)
    assert await rest_of(reader) == [*layer(1, 1), END]
    assert outbox.time.exposed_s - exposed_s == pytest.approx(outbox.time.busy_s - hidden_s)


def elsewhere(landing, frames):
    """A layer whose bytes are on their way beside the stream."""
    while not landing.done():
        yield landing
    yield from frames


async def test_a_layer_on_its_way_elsewhere_holds_up_the_layers_behind_it_but_not_the_first_token():
    outbox, landing = Outbox(), Future()
    outbox.put_threadsafe([ACCEPTED])
    outbox.put_threadsafe(elsewhere(landing, layer(0, offset=1)))
    outbox.put_threadsafe(layer(1, 1))
    await asyncio.sleep(0)
    reader = outbox.read()
    assert await anext(reader) == ACCEPTED
    first = asyncio.create_task(anext(reader))
    await asyncio.sleep(0)
    assert not first.done()
    outbox.put(FIRST)
    assert await first == FIRST
    outbox.put(END)
    rest = asyncio.create_task(rest_of(reader))
    await asyncio.sleep(0)
    threading.Thread(target=landing.set_result, args=(None,)).start()
    assert await rest == [*layer(0, offset=1), *layer(1, 1), END]
    assert (outbox.time.num_beside, outbox.time.num_inline) == (1, 1)


async def test_a_layer_that_is_waited_for_no_longer_goes_on_without_its_landing():
    outbox, never, num_asked = Outbox(look_again_s=0.001), Future(), 0

    def given_up_in_the_end():
        nonlocal num_asked
        while (num_asked := num_asked + 1) < 4:
            yield never
        yield from layer(0, 1)

    outbox.put_threadsafe(given_up_in_the_end())
    await asyncio.sleep(0)
    outbox.put(END)
    assert await read_all(outbox) == [*layer(0, 1), END]
    assert not never.done()


async def test_waiting_for_a_layer_counts_as_passing_it_on():
    outbox, landing = Outbox(), Future()
    outbox.put_threadsafe(elsewhere(landing, layer(0, offset=1)))
    await asyncio.sleep(0)
    outbox.put(END)
    since = time.perf_counter()
    reading = asyncio.create_task(read_all(outbox))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, landing.set_result, None)
    await reading
    assert 0.04 < outbox.time.busy_s < time.perf_counter() - since + 0.01


async def test_the_end_says_how_long_layers_were_passed_on():
    outbox = Outbox()
    outbox.put_threadsafe(layer(0, 1))
    await asyncio.sleep(0)
    outbox.put(END)
    *_, end = [event async for event in outbox.read()]
    assert end.ship_s == outbox.time.busy_s > 0
