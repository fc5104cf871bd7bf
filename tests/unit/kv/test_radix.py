"""The radix cache, against a plain set of prefixes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from packlight.core.hashing import page_hashes
from packlight.kv.pages import PageBook
from packlight.kv.radix import RadixCache

NUM_BLOCKS = 10
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=5)


def hashes_of(prompt):
    return page_hashes(prompt, 1, fingerprint="m")


class RadixMachine(RuleBasedStateMachine):
    """Requests come (match, share, allocate), leave (insert, release) and blocks are evicted, in any order."""

    def __init__(self):
        super().__init__()
        self.book = PageBook(NUM_BLOCKS)
        self.cache = RadixCache(self.book)
        self.running: list[tuple[list[int], np.ndarray]] = []
        self.stored: dict[tuple[int, ...], int] = {}

    def model_match(self, prompt):
        length = 0
        while length < len(prompt) and tuple(prompt[: length + 1]) in self.stored:
            length += 1
        return [self.stored[tuple(prompt[: i + 1])] for i in range(length)]

    @rule(prompt=prompts)
    def arrive(self, prompt):
        hit = self.cache.match(hashes_of(prompt))
        assert hit.tolist() == self.model_match(prompt)
        self.book.share(hit)
        needed = len(prompt) - len(hit)
        if needed > self.book.num_free:
            self.forget(self.cache.evict(needed - self.book.num_free))
        if needed > self.book.num_free:
            self.book.release(hit)
            return
        self.running.append((prompt, np.concatenate([hit, self.book.allocate(needed)])))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data):
        prompt, blocks = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        num_done = data.draw(st.integers(0, len(prompt)))
        kept = self.cache.insert(hashes_of(prompt)[:num_done], blocks[:num_done])
        for depth, block in enumerate(kept.tolist()):
            self.stored.setdefault(tuple(prompt[: depth + 1]), block)
        assert kept.tolist() == self.model_match(prompt)[:num_done]
        self.book.release(blocks)

    @rule(count=st.integers(1, NUM_BLOCKS))
    def evict(self, count):
        idle, free = self.book.num_cached, self.book.num_free
        self.forget(self.cache.evict(count))
        # A page below a held one is held too, so every idle block can go.
        assert self.book.num_free == free + min(count, idle)

    def forget(self, evictions):
        paths = {tuple(page_hash.hex() for page_hash in hashes_of(list(prefix))): prefix for prefix in self.stored}
        for eviction in evictions:
            lost = [page_hash.hex() for page_hash in eviction.hashes]
            assert 0 <= eviction.keep < len(lost)
            for path, prefix in list(paths.items()):
                if len(path) > eviction.keep and list(path[: eviction.keep]) == lost[: eviction.keep]:
                    same = min(len(path), len(lost))
                    if list(path[:same]) == lost[:same]:
                        self.stored.pop(prefix, None)

    @invariant()
    def books_balance(self):
        self.book.check([blocks for _, blocks in self.running])
        self.cache.check()
        assert self.book.num_kept == len(self.stored)
        assert {h for path in self.cache.prefixes() for h in path} == {
            hashes_of(list(prefix))[-1] for prefix in self.stored
        }


RadixMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestRadix = RadixMachine.TestCase


def fill(cache, book, *prompts_):
    for prompt in prompts_:
        hit = cache.match(hashes_of(prompt))
        book.share(hit)
        blocks = np.concatenate([hit, book.allocate(len(prompt) - len(hit))])
        cache.insert(hashes_of(prompt), blocks)
        book.release(blocks)


def test_least_recently_used_leaf_goes_first():
    book = PageBook(8)
    cache = RadixCache(book)
    fill(cache, book, [1, 2, 3], [1, 2, 4], [5])
    cache.match(hashes_of([1, 2, 3]))
    lost = cache.evict(2)
    assert [(len(eviction.hashes), eviction.keep) for eviction in lost] == [(3, 2), (1, 0)]
    assert len(cache.match(hashes_of([1, 2, 3]))) == 3
    assert len(cache.match(hashes_of([1, 2, 4]))) == 2
    assert len(cache.match(hashes_of([5]))) == 0


def test_a_lost_path_is_reported_once():
    book = PageBook(8)
    cache = RadixCache(book)
    fill(cache, book, [1, 2, 3, 4])
    (eviction,) = cache.evict(3)
    assert eviction.hashes == hashes_of([1, 2, 3, 4])
    assert eviction.keep == 1


def test_held_blocks_stay():
    book = PageBook(4)
    cache = RadixCache(book)
    fill(cache, book, [1, 2])
    held = cache.match(hashes_of([1, 2]))
    book.share(held)
    assert cache.evict(2) == []
    book.release(held)
    assert len(cache.evict(2)) == 1


@given(prompts, prompts)
def test_the_second_of_two_equal_pages_is_not_kept(first, second):
    book = PageBook(20)
    cache = RadixCache(book)
    blocks = [book.allocate(len(first)), book.allocate(len(second))]
    cache.insert(hashes_of(first), blocks[0])
    kept = cache.insert(hashes_of(second), blocks[1])
    shared = len([1 for a, b in zip(hashes_of(first), hashes_of(second), strict=False) if a == b])
    assert kept.tolist() == [*blocks[0][:shared].tolist(), *blocks[1][shared:].tolist()]
    for table in blocks:
        book.release(table)
    assert book.num_free == 20 - book.num_kept
