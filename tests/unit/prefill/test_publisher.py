"""What the index is told: everything, in order, and again when it forgot or could not keep up."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.config import PrefillConfig
from packlight.kv.radix import Eviction
from packlight.models.fake_spec import fake_spec
from packlight.prefill import publisher as module
from packlight.prefill.publisher import Publisher
from packlight.prefix.base import Holder
from packlight.prefix.memory import MemoryPrefixIndex
from tests.support.fake_pair import answer, fake_pair, make_request, running, until

ME = Holder("prefill-0", 1)
MODEL = "model"


def path(*pages: int) -> list[bytes]:
    """Chained hashes: a page is named by all pages up to it."""
    return [bytes(pages[: end + 1]).ljust(16, b"\0") for end in range(len(pages))]


class SlowIndex(MemoryPrefixIndex):
    """Takes one write after another, each when the test says so."""

    def __init__(self) -> None:
        super().__init__(10_000)
        self.permits = asyncio.Semaphore(0)
        self.num_writes = 0

    async def insert(self, fingerprint, holder, hashes):
        await self.permits.acquire()
        self.num_writes += 1
        await super().insert(fingerprint, holder, hashes)

    async def remove(self, fingerprint, holder, hashes, keep):
        await self.permits.acquire()
        self.num_writes += 1
        await super().remove(fingerprint, holder, hashes, keep)

    def let_all(self) -> None:
        for _ in range(10_000):
            self.permits.release()


class Held:
    """What a worker holds, as its cache would list it."""

    def __init__(self, *paths: list[bytes]) -> None:
        self.paths = list(paths)

    def __call__(self):
        return iter(self.paths)


async def held_by_me(index, hashes) -> int:
    return (await index.match(MODEL, hashes)).get(ME.worker_id, 0)


async def told(index, publisher: Publisher) -> None:
    """Everything that waits was sent."""
    await until(lambda: not publisher._pending and not publisher._wake.is_set())


async def test_stores_and_losses_reach_the_index_in_order():
    index = MemoryPrefixIndex(100)
    publisher = Publisher(index, MODEL, ME, Held())
    async with running(publisher.run()):
        await publisher.beat()
        publisher.stored(path(1, 2, 3))
        publisher.stored(path(1, 2, 4))
        publisher.evicted([Eviction(path(1, 2, 3), keep=2)])
        await told(index, publisher)
    assert await held_by_me(index, path(1, 2, 3)) == 2
    assert await held_by_me(index, path(1, 2, 4)) == 3


async def test_nothing_is_told_twice_while_the_index_remembers():
    index = SlowIndex()
    index.let_all()
    publisher = Publisher(index, MODEL, ME, Held(path(1, 2)))
    async with running(publisher.run()):
        for _ in range(5):
            await publisher.beat()
        await told(index, publisher)
    assert index.num_writes == 1


async def test_an_index_that_forgot_is_told_everything_again():
    index = MemoryPrefixIndex(100)
    held = Held(path(1, 2), path(5))
    publisher = Publisher(index, MODEL, ME, held)
    async with running(publisher.run()):
        await publisher.beat()
        await told(index, publisher)
        await index.drop_worker(MODEL, ME.worker_id, ME.generation)  # a router thought that we were dead
        assert await held_by_me(index, path(1, 2)) == 0
        held.paths.append(path(7, 8, 9))
        await publisher.beat()
        await told(index, publisher)
    assert [await held_by_me(index, p) for p in (path(1, 2), path(5), path(7, 8, 9))] == [2, 1, 3]


async def test_a_loss_that_waits_is_not_forgotten_when_everything_is_told_again():
    """The claim it withdraws is on its way just then."""
    index = SlowIndex()
    held = Held()
    publisher = Publisher(index, MODEL, ME, held)
    async with running(publisher.run()):
        await publisher.beat()
        publisher.stored(path(1, 2, 3))
        await until(lambda: not publisher._pending)  # being written
        publisher.evicted([Eviction(path(1, 2, 3), keep=1)])
        held.paths = [path(1)]
        await index.drop_worker(MODEL, ME.worker_id, ME.generation)
        await publisher.beat()
        index.let_all()
        await told(index, publisher)
    assert await held_by_me(index, path(1, 2, 3)) == 1


async def test_an_index_that_cannot_keep_up_is_told_anew_and_believes_nothing_stale(monkeypatch):
    monkeypatch.setattr(module, "MAX_PENDING", 10)
    index, held = SlowIndex(), Held()
    publisher = Publisher(index, MODEL, ME, held)
    async with running(publisher.run()):
        await publisher.beat()
        publisher.stored(path(1))
        index.permits.release()
        await until(lambda: index.num_writes == 1)
        publisher.evicted([Eviction(path(1), keep=0)])
        for page in range(2, 50):  # far too many: the loss of page 1 is thrown away with the rest
            publisher.stored(path(page))
        held.paths = [path(page) for page in range(30, 50)]  # more than may wait, which is no reason to give up again
        index.let_all()
        await until(lambda: not publisher._pending)
        await publisher.beat()
        publisher.stored(path(30, 1))
        await told(index, publisher)
        assert await held_by_me(index, path(1)) == 0
        assert await held_by_me(index, path(30, 1)) == 2
        assert [await held_by_me(index, path(page)) for page in range(30, 50)] == [1] * 20
        num_writes = index.num_writes
        await publisher.beat()
        await told(index, publisher)
        assert index.num_writes == num_writes


@given(script=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 2), min_size=1, max_size=4))))
def test_whatever_happens_the_index_ends_up_right(script):
    """Pages come and go, the index forgets, heartbeats come: at rest the index knows exactly what is held."""
    asyncio.run(_play(script))


async def _play(script) -> None:
    index, held = MemoryPrefixIndex(1000), set()
    publisher = Publisher(index, MODEL, ME, lambda: [path(*pages) for pages in sorted(held)])
    async with running(publisher.run()):
        await publisher.beat()
        for action, pages in script:
            if action == 0:
                held |= {tuple(pages[: end + 1]) for end in range(len(pages))}
                publisher.stored(path(*pages))
            elif action == 1 and tuple(pages) in held:
                held -= {other for other in held if other[: len(pages)] == tuple(pages)}
                publisher.evicted([Eviction(path(*pages), keep=len(pages) - 1)])
            elif action == 2:
                await index.drop_worker(MODEL, ME.worker_id, ME.generation)
            else:
                await publisher.beat()
        await publisher.beat()
        await told(index, publisher)
    for first in (1, 2):
        for second in (1, 2):
            for third in (1, 2):
                pages = (first, second, third)
                expected = sum(pages[: end + 1] in held for end in range(3))
                assert await held_by_me(index, path(*pages)) == expected


async def test_a_worker_s_cache_and_the_index_agree_under_eviction():
    """A pool of 12 pages and prompts of 8: each evicts most of the one before."""
    index = MemoryPrefixIndex(1000)
    fingerprint = fake_spec().fingerprint
    async with fake_pair(prefill=PrefillConfig(), prefill_blocks=12) as pair:
        publisher = Publisher(index, fingerprint, ME, pair.prefill.blocks.cache.prefixes)
        pair.prefill.blocks.inventory = publisher
        async with running(publisher.run()):
            await publisher.beat()
            for number in range(6):
                await answer(pair.decode, make_request([number % 3 + 1] * 32, 2, request_id=str(number)))
                await told(index, publisher)
                for hashes in pair.prefill.blocks.cache.prefixes():
                    assert (await index.match(fingerprint, hashes)) == {ME.worker_id: len(hashes)}
        listed = sum(len(hashes) for hashes in pair.prefill.blocks.cache.prefixes())
        assert 0 < listed <= 12


async def test_an_index_that_raises_ends_the_loop_and_with_it_the_process():
    """No implementation may: a bug must not leave a worker that looks alive and reports nothing."""

    class Broken(MemoryPrefixIndex):
        async def insert(self, fingerprint, holder, hashes):
            raise ValueError("a bug")

    publisher = Publisher(Broken(10), MODEL, ME, Held(path(1)))
    await publisher.beat()
    with pytest.raises(ValueError, match="a bug"):
        await publisher.run()
