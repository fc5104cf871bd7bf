"""What ranks tell each other, without processes: messages survive the pipe, and mirrored tables are the table."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from packlight.engine.parallel.messages import (
    Kind,
    Message,
    prefill_message,
    read_message,
    works_of,
    write_message,
)
from packlight.engine.parallel.tables import TableMirror, TableSender, TableUpdate, head_slices
from packlight.engine.runner import ChunkWork
from packlight.kv.shards import ShardedPageBook
from packlight.kv.table import HeadPageTable

ROWS, LAYERS, HEADS, PAGE = 3, 2, 4, 4
int64s = arrays(np.int64, st.integers(0, 20), elements=st.integers(-(2**63), 2**63 - 1))


def through_a_pipe(*messages):
    pipe = io.BytesIO()
    for message in messages:
        write_message(pipe, message)
    pipe.seek(0)
    read = [read_message(pipe) for _ in messages]
    with pytest.raises(EOFError):
        read_message(pipe)
    return read


@given(
    st.sampled_from(Kind),
    st.dictionaries(st.text(max_size=8), st.integers(-(2**40), 2**40), max_size=4),
    st.lists(int64s, max_size=4),
    st.text(max_size=50),
)
def test_messages_arrive_as_they_were(kind, numbers, values, text):
    for read in through_a_pipe(*[Message(kind, numbers, values, text)] * 2):
        assert (read.kind, read.numbers, read.text) == (kind, numbers, text)
        assert [array.tolist() for array in read.arrays] == [array.tolist() for array in values]


def test_a_message_that_is_cut_off_is_the_end():
    pipe = io.BytesIO()
    write_message(pipe, Message(Kind.KEYS, {"layer": 1}, [np.arange(5)]))
    for num_bytes in range(len(pipe.getvalue())):
        with pytest.raises(EOFError):
            read_message(io.BytesIO(pipe.getvalue()[:num_bytes]))


works = st.builds(
    ChunkWork,
    st.lists(st.integers(0, 200_000), min_size=1, max_size=9),
    st.integers(0, 10**6),
    arrays(np.int32, st.integers(1, 9), elements=st.integers(0, 10**6)),
    st.booleans(),
)


@given(st.lists(works, min_size=1, max_size=4), st.booleans())
def test_a_prefill_step_is_told_whole(told, is_watched):
    (message,) = through_a_pipe(prefill_message(3, told, is_watched=is_watched))
    assert message.numbers == {"runner": 3, "watched": is_watched}
    for work, heard in zip(told, works_of(message), strict=True):
        assert (heard.token_ids, heard.start, heard.wants_logits) == (work.token_ids, work.start, work.wants_logits)
        assert heard.blocks.tolist() == work.blocks.tolist()


class Ranks:
    """A table, what its owner tells the ranks, and what they make of it."""

    def __init__(self, num_ranks, num_pages=960):
        self.num_ranks, self.rank_pages = num_ranks, num_pages // num_ranks
        self.book = ShardedPageBook(num_pages, num_shards=num_ranks, num_kv_heads=HEADS)
        shape = {"num_rows": ROWS, "num_layers": LAYERS, "page_size": PAGE}
        self.table = HeadPageTable(self.book, num_kv_heads=HEADS, **shape)
        self.sender = TableSender(num_ranks=num_ranks, num_pages=num_pages, page_size=PAGE)
        self.mirrors = [TableMirror(num_kv_heads=HEADS // num_ranks, **shape) for _ in range(num_ranks)]

    def step(self, rows):
        """One decode step of `rows`; the number of pages that were told."""
        self.table.grow(rows)
        updates = self.sender.updates(self.table, rows)
        for mirror, update in zip(self.mirrors, updates, strict=True):
            (message,) = through_a_pipe(Message(Kind.DECODE, arrays=update.arrays()))
            mirror.apply(TableUpdate.of_arrays(message.arrays, LAYERS, HEADS // self.num_ranks))
        self.check(rows)
        self.table.advance(rows)
        return sum(len(update.pages_X) for update in updates)

    def check(self, rows):
        for rank, heads in enumerate(head_slices(HEADS, self.num_ranks)):
            mirror = self.mirrors[rank]
            assert (mirror.new_lengths(rows) == self.table.new_lengths(rows)[:, :, heads]).all()
            assert (mirror.new_index(rows) == self.table.new_index(rows)[:, :, heads]).all()
            for row in rows:
                for layer, head in np.ndindex(LAYERS, HEADS // self.num_ranks):
                    count = -(-int(mirror.new_lengths([row])[0, layer, head]) // PAGE)
                    own = self.table.pages[row, layer, heads.start + head, :count] - rank * self.rank_pages
                    assert mirror.pages[row, layer, head, :count].tolist() == own.tolist()
                    assert ((own >= 0) & (own < self.rank_pages)).all(), "a page of another rank"


lengths = st.lists(st.integers(0, 23), min_size=LAYERS * HEADS, max_size=LAYERS * HEADS)
events = st.lists(st.one_of(st.tuples(st.just("open"), lengths), st.tuples(st.just("close"), st.integers(0, 2)),
                            st.tuples(st.just("step"), st.sets(st.integers(0, 2)))), max_size=25)  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@settings(max_examples=60)
@given(events=events)
def test_mirrors_follow_the_table_through_any_lives(num_ranks, events):
    ranks, rows = Ranks(num_ranks), []
    for kind, value in events:
        if kind == "open" and ranks.table.num_free_rows:
            rows.append(ranks.table.open())
            for layer in range(LAYERS):
                ranks.table.fill_layer(rows[-1], layer, value[layer * HEADS : (layer + 1) * HEADS])
        elif kind == "close" and value < len(rows):
            ranks.table.close(rows.pop(value))
        elif kind == "step" and (batch := [rows[place] for place in sorted(value) if place < len(rows)]):
            ranks.step(batch)
    ranks.book.check([ranks.table.held(row) for row in rows])


def test_only_new_pages_are_told():
    ranks = Ranks(2)
    row = ranks.table.open()
    for layer in range(LAYERS):
        ranks.table.fill_layer(row, layer, [6, 8, 9, 17])
    assert ranks.step([row]) == LAYERS * (2 + 3 + 3 + 5)
    assert ranks.step([row]) == 0  # lengths 7, 9, 10, 18: room everywhere
    assert ranks.step([row]) == LAYERS * 1  # the head with 8 tokens in two full pages
    ranks.table.close(row)
    again = ranks.table.open()
    assert again == row
    assert ranks.step([again]) == LAYERS * HEADS
