"""A rank that is not the first: does what the first process tells it, until that process closes the pipe.

Has no queue, no books and no network but the group. An error ends it, which the first process notices.
"""

from __future__ import annotations

import logging
from typing import BinaryIO

import torch
from torch import Tensor

from packlight.core.config import Config
from packlight.core.errors import InternalError, StartupError
from packlight.engine.parallel.followers import take_input
from packlight.engine.parallel.group import Group, Meeting, join_store
from packlight.engine.parallel.messages import Kind, Message, read_message, works_of
from packlight.engine.parallel.pools import packed_tokens
from packlight.engine.parallel.rank import Rank, rank_device, window_of
from packlight.engine.parallel.runner import mirror_of
from packlight.engine.parallel.tables import TableMirror, TableUpdate
from packlight.engine.runner import DecodeRunner, Runner
from packlight.models.opened import open_model
from packlight.telemetry.logs import set_up_logging

log = logging.getLogger(__name__)


class Follower:
    """Runners by number, in the order in which they were opened."""

    def __init__(self, pipe: BinaryIO, group: Group, rank: Rank) -> None:
        self._pipe, self._group, self._rank = pipe, group, rank
        self._runners: list[DecodeRunner] = []
        self._mirrors: dict[int, TableMirror] = {}

    def run(self) -> None:
        """Until the pipe ends."""
        while True:
            try:
                message = read_message(self._pipe)
            except EOFError:
                return
            self._do(message)

    def _do(self, message: Message) -> None:
        match message.kind:
            case Kind.EXACT_POOL:
                self._runners.append(self._rank.exact(message.text, message.numbers["memory_bytes"]))
            case Kind.PACKED_POOL:
                runner = self._rank.packed(message.text, message.numbers["memory_bytes"])
                self._mirrors[len(self._runners)] = mirror_of(runner, message.numbers["num_rows"])
                self._runners.append(runner)
            case Kind.PREFILL:
                self._prefill(message)
            case Kind.DECODE:
                self._decode(message)
            case Kind.STORE:
                self._store(message)
            case _:
                raise InternalError(f"rank {self._group.rank} was told {message.kind} between two steps")

    def _prefill(self, message: Message) -> None:
        runner = self._runners[message.numbers["runner"]]
        assert isinstance(runner, Runner), "a prefill step on packed KV"
        answers = Answers(self._pipe, self._group, runner) if message.numbers["watched"] else None
        runner.prefill(works_of(message), answers)

    def _decode(self, message: Message) -> None:
        number = message.numbers["runner"]
        runner, mirror = self._runners[number], self._mirrors[number]
        token_ids, positions, *table = message.arrays
        update = TableUpdate.of_arrays(table, runner.pool.num_layers, runner.pool.num_kv_heads)
        mirror.apply(update)
        runner.decode(mirror, update.rows_B.tolist(), token_ids.tolist(), positions.tolist())

    def _store(self, message: Message) -> None:
        pool = self._runners[message.numbers["runner"]].pool
        pages_X = torch.tensor(message.arrays[0], device=pool.device)
        shape = (len(pages_X), pool.page_size, pool.head_dim)
        k_XPD, v_XPD = (self._group.receive(shape, pool.dtype, 0) for _ in range(2))
        pool.write_pages(pages_X, k_XPD, v_XPD)


class Answers:
    """The layer hook of a watched step: hands over the layer's queries, and then what is asked for."""

    def __init__(self, pipe: BinaryIO, group: Group, runner: Runner) -> None:
        self._pipe, self._group, self._pool = pipe, group, runner.pool
        self._window = window_of(runner)

    def __call__(self, layer: int, q_THD: Tensor, scale: float) -> None:
        self._group.send(q_THD, 0)
        while (question := read_message(self._pipe)).kind is not Kind.RESUME:
            for answer in self._answer(question, q_THD, scale):
                self._group.send(answer, 0)

    def _answer(self, question: Message, q_THD: Tensor, scale: float) -> tuple[Tensor, ...]:
        numbers, pool = question.numbers, self._pool
        layer, blocks = numbers["layer"], torch.tensor(question.arrays[0], device=pool.device)
        match question.kind:
            case Kind.KEYS:
                return (pool.read_keys(layer, blocks, numbers["num_tokens"]),)
            case Kind.WINDOW:
                q_WHD = self._group.receive((numbers["num_rows"], *q_THD.shape[1:]), q_THD.dtype, 0)
                return self._window.attend(layer, q_WHD, blocks, numbers["num_tokens"], scale)
            case Kind.TOKENS:
                counts = [numbers[f"tokens_{head}"] for head in range(pool.num_kv_heads)]
                index_X = self._group.receive((sum(counts),), torch.int64, 0)
                return (packed_tokens(pool, layer, blocks, torch.split(index_X, counts)),)
        raise InternalError(f"rank {self._group.rank} was asked for {question.kind} inside a step")


def follow(pipe: BinaryIO) -> None:
    """The whole life of a follower. Raises StartupError where the first process does too."""
    hello = read_message(pipe)
    config, numbers = Config.model_validate_json(hello.text), hello.numbers
    set_up_logging(config.log_level, format=config.log_format)
    if numbers["threads"]:
        torch.set_num_threads(numbers["threads"])
    index, num_ranks = numbers["rank"], numbers["num_ranks"]
    meeting = Meeting(join_store(numbers["port"]), index, num_ranks, lambda: None)
    meeting.meet("started")
    group = Group(meeting.store, index, num_ranks, rank_device(config.model.device, index))
    opened = open_model(config.model, on_progress=log.debug)
    rank = Rank(opened, config, index, num_ranks, meeting.meet, log.debug)
    log.info("rank %d of %d is ready", index, num_ranks)
    Follower(pipe, group, rank).run()
    group.close()


def main() -> int:
    """0 when the first process ended it, 1 after an error."""
    try:
        follow(take_input())
    except EOFError:
        return 0
    except StartupError as error:
        log.error("a rank cannot start: %s", error.message)
        return 1
    except Exception:
        log.exception("a rank failed")
        return 1
    return 0
