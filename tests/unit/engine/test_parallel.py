"""What ranks tell each other, without processes: messages survive the pipe, and mirrored tables are the table."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from packlight.compress.readers.shared import Readers
from packlight.core.types import PackSpec
from packlight.engine.parallel.messages import (
    Kind,
    Message,
    encoded,
    prefill_message,
    read_message,
    works_of,
)
from packlight.engine.parallel.readings import ReadingMirror, told_readings
from packlight.engine.parallel.tables import TableMirror, TableSender, TableUpdate, head_slices
from packlight.engine.runner import ChunkWork
from packlight.kv.reading import PageQuery
from packlight.kv.shards import ShardedPageBook
from packlight.kv.table import HeadPageTable

ROWS, LAYERS, HEADS, PAGE = 3, 2, 4, 4
int64s = arrays(np.int64, st.integers(0, 20), elements=st.integers(-(2**63), 2**63 - 1))


def through_a_pipe(*messages):
    pipe = io.BytesIO(b"".join(encoded(message) for message in messages))
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
    data = encoded(Message(Kind.KEYS, {"layer": 1}, [np.arange(5)]))
    for num_bytes in range(len(data)):
        with pytest.raises(EOFError):
            read_message(io.BytesIO(data[:num_bytes]))


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


def new_readers():
    return Readers(page_size=PAGE, head_dim=32, num_rows=ROWS)


PACKS = [
    PackSpec("quest", budget_tokens=16),
    PackSpec("rocketkv", ratio=0.3),
    PackSpec("freekv", budget_tokens=12, params=(("cosine", 0.1),)),
    PackSpec("freekv", budget_tokens=12),
    PackSpec("snapkv", budget_tokens=16),
]


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.sampled_from(PACKS)), max_size=12))
def test_rows_are_read_elsewhere_as_they_were_told(lives):
    """By a reader of the same constants, shared by the rows that share it here."""
    ours, mirror, readings = new_readers(), ReadingMirror(new_readers()), {}
    for row, pack in lives:
        readings[row] = ours.reading_of(pack, 100)
        mirror.apply([row], told_readings([readings[row]]))
    theirs = dict(zip(readings, mirror.of(list(readings)), strict=True))
    for row, own in readings.items():
        if own is None:
            assert theirs[row] is None
            continue
        assert (theirs[row].key, theirs[row].num_pages, theirs[row].num_dense_layers) == (
            own.key, own.num_pages, own.num_dense_layers)  # fmt: skip
        assert type(theirs[row].reader) is type(own.reader)
        for other, reading in readings.items():
            if reading is not None:
                assert (theirs[other].reader is theirs[row].reader) == (reading.reader is own.reader)


def test_a_row_that_begins_a_life_is_forgotten():
    """A reader that goes by the last query finds none."""
    told = told_readings(
        [new_readers().reading_of(PackSpec("freekv", budget_tokens=12, params=(("cosine", -1.0),)), 99)]
    )
    used, unused = ReadingMirror(new_readers()), ReadingMirror(new_readers())
    drawn = torch.Generator().manual_seed(0)
    bounds = torch.rand(1, 1, 3, 64, generator=drawn)
    asked = [
        PageQuery(
            0, [1], torch.randn(1, 1, 1, 32, generator=drawn), 0.1, bounds, torch.ones(1, 1, 3, dtype=torch.int64)
        )
        for _ in range(2)
    ]
    for mirror in used, unused:
        mirror.apply([1], told)
    readers = [mirror.of([1])[0].reader for mirror in (used, unused)]
    readers[0].score(asked[0])
    used.apply([1], told)
    assert torch.equal(readers[0].score(asked[1]), readers[1].score(asked[1]))
    assert not torch.equal(readers[0].score(asked[0]), new_score(told, asked[0])), "nothing is remembered"


def new_score(told, query):
    mirror = ReadingMirror(new_readers())
    mirror.apply([1], told)
    return mirror.of([1])[0].reader.score(query)
