"""What every prefix index does, asked of each: in memory, in Redis, in Valkey, and in clusters of both."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from packlight.core.config import IndexConfig
from packlight.core.errors import ConfigError
from packlight.core.hashing import PageHash, page_hashes
from packlight.prefix.base import Holder, PrefixIndex
from packlight.prefix.memory import MemoryPrefixIndex
from packlight.prefix.redis_index import RedisPrefixIndex
from packlight.prefix.registry import build_index
from packlight.redis_link.link import RedisLink
from tests.support.redis_servers import ENGINES, running_cluster, running_server

PATIENT_S = 10.0
"""A time-out that a busy machine does not reach: these tests are about answers, not about speed."""

MODELS = (f"model-{number}" for number in itertools.count())
A, B, C = Holder("a", 1), Holder("b", 1), Holder("c", 1)


@pytest.fixture(scope="module", params=["memory", *ENGINES, *(f"{engine} cluster" for engine in ENGINES)])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Where the index is kept; None: in this process."""
    engine, _, is_cluster = request.param.partition(" ")
    if engine == "memory":
        yield None
    else:
        with (running_cluster if is_cluster else running_server)(engine) as server:
            yield server.url


def open_index(url: str | None, max_nodes: int = 100_000) -> PrefixIndex:
    if url is None:
        return MemoryPrefixIndex(max_nodes)
    return RedisPrefixIndex(RedisLink(url, timeout_s=PATIENT_S, cooldown_s=0.0, clock=time.monotonic), max_nodes)


@pytest.fixture
async def index(url: str | None) -> AsyncIterator[PrefixIndex]:
    index = open_index(url)
    yield index
    assert index.available
    assert index.num_dropped == 0
    await index.close()


@pytest.fixture
def model() -> str:
    """A fingerprint that no other test uses."""
    return next(MODELS)


def pages(*tokens: int) -> list[PageHash]:
    """A path of one page per token."""
    return page_hashes(tokens, 1, fingerprint="any")


LONG = pages(*range(100))


async def test_an_empty_index_matches_nothing(index: PrefixIndex, model: str) -> None:
    assert await index.match(model, LONG) == {}
    assert await index.match(model, []) == {}


async def test_a_path_is_matched_as_far_as_it_is_held(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG[:40])
    assert await index.match(model, LONG[:40]) == {"a": 40}
    assert await index.match(model, LONG) == {"a": 40}
    assert await index.match(model, LONG[:7]) == {"a": 7}
    assert await index.match(model, pages(*range(30), 999, *range(31, 50))) == {"a": 30}
    assert await index.match(model, pages(999, *range(1, 50))) == {}


async def test_each_worker_has_its_own_length(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG[:40])
    await index.insert(model, B, LONG[:70])
    await index.insert(model, C, LONG[:10])
    assert await index.match(model, LONG) == {"a": 40, "b": 70, "c": 10}
    assert await index.match(model, LONG[:20]) == {"a": 20, "b": 20, "c": 10}


async def test_an_edge_splits_where_paths_part(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG)
    await index.insert(model, B, LONG[:50])
    await index.insert(model, C, pages(*range(30), *range(500, 520)))
    assert await index.match(model, LONG) == {"a": 100, "b": 50, "c": 30}
    assert await index.match(model, pages(*range(30), *range(500, 520))) == {"a": 30, "b": 30, "c": 50}


async def test_inserting_a_part_again_changes_nothing(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG)
    await index.insert(model, A, LONG[:20])
    await index.insert(model, A, [])
    assert await index.match(model, LONG) == {"a": 100}


async def test_a_lost_page_takes_all_that_follows_it(index: PrefixIndex, model: str) -> None:
    branch = pages(*range(60), *range(500, 520))
    await index.insert(model, A, LONG)
    await index.insert(model, A, branch)
    await index.insert(model, B, LONG)
    await index.remove(model, A, LONG[:41], keep=40)
    assert await index.match(model, LONG) == {"a": 40, "b": 100}
    assert await index.match(model, branch) == {"a": 40, "b": 60}


async def test_a_lost_page_leaves_the_other_branch(index: PrefixIndex, model: str) -> None:
    branch = pages(*range(60), *range(500, 520))
    await index.insert(model, A, LONG)
    await index.insert(model, A, branch)
    await index.remove(model, A, LONG, keep=60)
    assert await index.match(model, LONG) == {"a": 60}
    assert await index.match(model, branch) == {"a": 80}


async def test_what_followed_a_lost_page_does_not_come_back_with_it(index: PrefixIndex, model: str) -> None:
    branch = pages(*range(60), *range(500, 520))
    await index.insert(model, A, LONG)
    await index.insert(model, A, branch)
    await index.insert(model, B, LONG)
    await index.remove(model, A, LONG, keep=20)
    await index.insert(model, A, LONG[:60])
    assert await index.match(model, LONG) == {"a": 60, "b": 100}
    assert await index.match(model, branch) == {"a": 60, "b": 60}
    await index.insert(model, A, LONG[:70])
    assert await index.match(model, LONG) == {"a": 70, "b": 100}


async def test_removing_what_is_not_held_changes_nothing(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG[:50])
    await index.remove(model, A, LONG[:50], keep=50)
    await index.remove(model, A, LONG, keep=70)
    await index.remove(model, A, pages(*range(30), 999), keep=30)
    await index.remove(model, A, [], keep=0)
    await index.remove(model, B, LONG, keep=0)
    assert await index.match(model, LONG) == {"a": 50}


async def test_everything_can_be_removed(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG)
    await index.remove(model, A, LONG, keep=0)
    assert await index.match(model, LONG) == {}


async def test_a_restart_kills_the_claims_of_the_life_before(index: PrefixIndex, model: str) -> None:
    reborn = Holder("a", 2)
    await index.insert(model, A, LONG)
    await index.insert(model, B, LONG[:10])
    await index.insert(model, reborn, LONG[:5])
    assert await index.match(model, LONG) == {"a": 5, "b": 10}
    await index.insert(model, A, LONG)
    await index.remove(model, A, LONG, keep=0)
    await index.drop_worker(model, "a", 1)
    assert await index.match(model, LONG) == {"a": 5, "b": 10}


async def test_generations_may_be_nanoseconds(index: PrefixIndex, model: str) -> None:
    """Two that a double cannot tell apart, and two whose texts sort the other way round."""
    await index.insert(model, Holder("a", 1_800_000_000_000_000_001), LONG[:9])
    await index.insert(model, Holder("a", 1_800_000_000_000_000_000), LONG)
    await index.insert(model, Holder("b", 10), LONG[:9])
    await index.insert(model, Holder("b", 9), LONG)
    assert await index.match(model, LONG) == {"a": 9, "b": 9}


async def test_a_dropped_worker_is_matched_no_more_until_it_claims_again(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG)
    await index.insert(model, B, LONG[:10])
    await index.drop_worker(model, "a", 1)
    assert await index.match(model, LONG) == {"b": 10}
    await index.insert(model, A, LONG[:3])
    assert await index.match(model, LONG) == {"a": 3, "b": 10}


async def test_dropping_concerns_older_lives_too(index: PrefixIndex, model: str) -> None:
    await index.insert(model, A, LONG)
    await index.drop_worker(model, "a", 5)
    await index.insert(model, Holder("a", 4), LONG)
    assert await index.match(model, LONG) == {}
    await index.drop_worker(model, "stranger", 1)
    await index.insert(model, Holder("stranger", 0), LONG)
    assert await index.match(model, LONG) == {}


async def test_the_epoch_changes_only_when_claims_are_gone(index: PrefixIndex, model: str) -> None:
    epoch = await index.enroll(model, A)
    await index.insert(model, A, LONG)
    await index.remove(model, A, LONG, keep=50)
    await index.enroll(model, B)
    await index.drop_worker(model, "b", 1)
    assert await index.enroll(model, A) == epoch
    await index.drop_worker(model, "a", 1)
    assert await index.enroll(model, A) != epoch


async def test_models_are_kept_apart(index: PrefixIndex) -> None:
    names = [f"{next(MODELS)}{odd}" for odd in ("", "}x", "{y}", "/ü :")]
    for length, name in enumerate(names, start=1):
        await index.insert(name, A, LONG[:length])
    assert [await index.match(name, LONG) for name in names] == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]


async def test_worker_ids_may_be_any_text(index: PrefixIndex, model: str) -> None:
    await index.insert(model, Holder("pod ä/1 2", 3), LONG[:4])
    assert await index.match(model, LONG) == {"pod ä/1 2": 4}


async def test_the_least_recently_used_go_first(url: str | None, model: str) -> None:
    index = open_index(url, max_nodes=100)
    paths = [pages(1000 + number, 1, 2, 3) for number in range(250)]
    for number, path in enumerate(paths):
        await index.insert(model, A, path)
        if number % 50 == 0:
            assert await index.match(model, paths[0]) == {"a": 4}
    held = [bool(await index.match(model, path)) for path in paths]
    assert held == [number == 0 or number > 150 for number in range(250)]
    await index.close()


async def test_a_shared_prefix_outlives_its_branches(url: str | None, model: str) -> None:
    index = open_index(url, max_nodes=50)
    for number in range(300):
        await index.insert(model, A, pages(1, 2, 3, 1000 + number))
    assert await index.match(model, pages(1, 2, 3)) == {"a": 3}
    assert await index.match(model, pages(1, 2, 3, 1299)) == {"a": 4}
    assert await index.match(model, pages(1, 2, 3, 1000)) == {"a": 3}
    await index.close()


def _path(length: int, bits: int) -> list[PageHash]:
    return pages(*(bits >> page & 1 for page in range(length)))


PATHS = st.builds(_path, st.integers(0, 8), st.integers(0, 255))
WORKERS = st.sampled_from("xyz")
AGES = st.sampled_from([0] * 20 + [-1, 1])
"""Of a caller's generation against the newest known: now and then it is a life that is over, or a new one."""


class NaiveModel(RuleBasedStateMachine):
    """An index beside the obvious: for each worker its newest generation and the set of pages it has.

    A bounded index may have forgotten pages, but may never claim one that a worker does not have.
    """

    def __init__(self, url: str | None, max_nodes: int, is_exact: bool) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.index = open_index(url, max_nodes)
        self.model = next(MODELS)
        self.is_exact = is_exact
        self.generations = dict.fromkeys("xyz", 10)
        self.pages: dict[str, set[PageHash]] = {worker: set() for worker in "xyz"}
        self.paths: list[list[PageHash]] = []

    def _holder(self, worker: str, age: int) -> tuple[Holder, bool]:
        """Who calls, and whether it will be heard."""
        holder = Holder(worker, self.generations[worker] + age)
        if age > 0:
            self.generations[worker] += age
            self.pages[worker] = set()
        return holder, age >= 0

    @initialize()
    def everybody_is_known(self) -> None:
        for worker, generation in self.generations.items():
            self.loop.run(self.index.enroll(self.model, Holder(worker, generation)))

    @rule(worker=WORKERS, age=AGES)
    def enroll(self, worker: str, age: int) -> None:
        self.loop.run(self.index.enroll(self.model, self._holder(worker, age)[0]))

    @rule(worker=WORKERS, age=AGES, path=PATHS)
    def insert(self, worker: str, age: int, path: list[PageHash]) -> None:
        holder, is_heard = self._holder(worker, age)
        if is_heard:
            self.pages[worker] |= set(path)
            self.paths.append(path)
        self.loop.run(self.index.insert(self.model, holder, path))

    @rule(worker=WORKERS, age=AGES, path=PATHS, keep=st.integers(0, 8))
    def remove(self, worker: str, age: int, path: list[PageHash], keep: int) -> None:
        holder, is_heard = self._holder(worker, age)
        if is_heard and keep < len(path):
            self.pages[worker] -= {page for known in self.paths if path[keep] in known for page in known[keep:]}
        self.loop.run(self.index.remove(self.model, holder, path, keep))

    @rule(worker=WORKERS, age=st.sampled_from([-1, -1, -1, 0, 1]))
    def drop(self, worker: str, age: int) -> None:
        holder, is_heard = self._holder(worker, age)
        if is_heard:
            self.pages[worker] = set()
        self.loop.run(self.index.drop_worker(self.model, holder.worker_id, holder.generation))

    @rule(path=PATHS)
    def match(self, path: list[PageHash]) -> None:
        self._compare(path)

    def _compare(self, path: list[PageHash]) -> None:
        found = self.loop.run(self.index.match(self.model, path))
        expected = {worker: _num_leading(path, held) for worker, held in self.pages.items()}
        if self.is_exact:
            assert found == {worker: length for worker, length in expected.items() if length}
        else:
            assert all(0 < length <= expected[worker] for worker, length in found.items())

    @invariant()
    def agrees_on_recent_paths(self) -> None:
        for path in self.paths[-3:]:
            self._compare(path)

    def teardown(self) -> None:
        assert self.index.num_dropped == 0
        self.loop.run(self.index.close())
        self.loop.close()


def _num_leading(path: list[PageHash], held: set[PageHash]) -> int:
    return len(list(itertools.takewhile(held.__contains__, path)))


@pytest.mark.parametrize(("max_nodes", "is_exact"), [(100_000, True), (3, False)], ids=["exact", "bounded"])
def test_agrees_with_a_naive_model(url: str | None, max_nodes: int, is_exact: bool) -> None:
    run_state_machine_as_test(
        lambda: NaiveModel(url, max_nodes, is_exact),
        settings=settings(
            max_examples=25 if url is None else 12,  # the same scripts run in four kinds of server
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_redis_without_a_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="REDIS_URL"):
        build_index(IndexConfig(backend="redis"), {}, time.monotonic)
    with pytest.raises(ConfigError, match="unknown prefix index 'etcd'"):
        build_index(IndexConfig(backend="etcd"), {}, time.monotonic)


async def test_the_url_comes_from_the_configuration_or_the_environment() -> None:
    for config, environ in (
        (IndexConfig(backend="redis", redis_url="redis://configured"), {"REDIS_URL": "not looked at"}),
        (IndexConfig(backend="redis"), {"REDIS_URL": "redis://from-the-environment"}),
    ):
        index = build_index(config, environ, time.monotonic)
        assert isinstance(index, RedisPrefixIndex)
        await index.close()
    assert isinstance(build_index(IndexConfig(), {}, time.monotonic), MemoryPrefixIndex)
