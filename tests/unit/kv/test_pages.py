"""The page books, against a dictionary that does the same thing slowly."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from packlight.core.errors import InternalError
from packlight.kv.pages import OutOfPages, PageBook

NUM_PAGES = 12


class PageMachine(RuleBasedStateMachine):
    """Random holders allocate, share, release; a cache keeps and drops pages."""

    def __init__(self):
        super().__init__()
        self.book = PageBook(NUM_PAGES)
        self.tables: list[np.ndarray] = []
        self.kept: set[int] = set()

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def allocate(self, count):
        if count > self.book.num_free:
            with pytest.raises(OutOfPages):
                self.book.allocate(count)
            return
        pages = self.book.allocate(count)
        assert len(set(pages.tolist())) == count
        assert not {page for table in self.tables for page in table.tolist()} & set(pages.tolist())
        assert not self.kept & set(pages.tolist())
        self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data):
        table = data.draw(st.sampled_from(self.tables))
        self.book.share(table)
        self.tables.append(table.copy())

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def share_cached(self, data):
        pages = np.array(sorted(data.draw(st.sets(st.sampled_from(sorted(self.kept)), min_size=1))), dtype=np.int32)
        self.book.share(pages)
        self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.book.release(self.tables.pop(index))

    @precondition(lambda self: any(len(table) for table in self.tables))
    @rule(data=st.data())
    def keep(self, data):
        held = sorted({page for table in self.tables for page in table.tolist()} - self.kept)
        if held:
            page = data.draw(st.sampled_from(held))
            self.book.keep(page)
            self.kept.add(page)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data):
        page = data.draw(st.sampled_from(sorted(self.kept)))
        self.book.drop(page)
        self.kept.remove(page)

    @invariant()
    def books_balance(self):
        self.book.check(self.tables)
        held = {page for table in self.tables for page in table.tolist()}
        assert self.book.num_held == len(held)
        assert self.book.num_cached == len(self.kept - held)
        assert self.book.num_kept == len(self.kept)


PageMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPages = PageMachine.TestCase


def test_check_finds_a_wrong_table():
    book = PageBook(4)
    pages = book.allocate(2)
    book.check([pages])
    with pytest.raises(InternalError, match="tables"):
        book.check([pages, pages])


@pytest.mark.parametrize("misuse", ["release twice", "share free", "keep free", "drop unkept"])
def test_misuse_is_our_own_bug(misuse):
    book = PageBook(4)
    pages = book.allocate(1)
    book.release(pages)
    actions = {
        "release twice": lambda: book.release(pages),
        "share free": lambda: book.share(pages),
        "keep free": lambda: book.keep(int(pages[0])),
        "drop unkept": lambda: book.drop(int(pages[0])),
    }
    with pytest.raises(InternalError):
        actions[misuse]()
