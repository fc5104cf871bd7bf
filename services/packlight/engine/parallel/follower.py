"""A rank that is not the first: does what the first process tells it, until that process closes the pipe.

Has no queue, no books and no network but the group. An error ends it, which the first process notices.
"""

from __future__ import annotations

import logging
from typing import BinaryIO

import torch
from torch import Tensor

from packlight.attention.base import LayerQueries
from packlight.core.config import Config
from packlight.core.errors import InternalError, StartupError
from packlight.engine.parallel.followers import take_input
from packlight.engine.parallel.group import Group, Meeting, join_store
from packlight.engine.parallel.messages import Kind, Message, read_message, works_of
from packlight.engine.parallel.pools import packed_tokens
from packlight.engine.parallel.rank import Rank, rank_device, window_of
from packlight.engine.parallel.share import PackedShare
from packlight.engine.runner import Runner
from packlight.models.opened import open_model
from packlight.telemetry.logs import set_up_logging

log = logging.getLogger(__name__)


class Follower:
    """Models and runners by number, in the order in which they were loaded and opened."""

    def __init__(self, pipe: BinaryIO, group: Group, meeting: Meeting) -> None:
        self._pipe, self._group, self._meeting = pipe, group, meeting
        self._models: list[Rank] = []
        self._runners: list[Runner | PackedShare] = []

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
            case Kind.LOAD:
                self._load(Config.model_validate_json(message.text))
            case Kind.EXACT_POOL | Kind.PACKED_POOL:
                self._runners.append(self._runner(message))
            case Kind.PREFILL:
                self._prefill(message)
            case Kind.DECODE | Kind.STORE | Kind.SUMMARISE:
                share = self._runners[message.numbers["runner"]]
                assert isinstance(share, PackedShare), f"{message.kind} of exact KV"
                self._on_share(share, message)
            case _:
                raise InternalError(f"rank {self._group.rank} was told {message.kind} between two steps")

    def _load(self, config: Config) -> None:
        opened = open_model(config.model, on_progress=log.debug)
        self._models.append(Rank(opened, config, len(self._models), self._group, self._meeting, log.debug))
        log.info("rank %d of %d is ready", self._group.rank, self._group.num_ranks)

    def _runner(self, message: Message) -> Runner | PackedShare:
        rank, numbers = self._models[message.numbers["model"]], message.numbers
        if message.kind is Kind.EXACT_POOL:
            return rank.exact(message.text, numbers["memory_bytes"])
        return PackedShare(rank.packed(message.text, numbers["memory_bytes"]), num_rows=numbers["num_rows"])

    def _prefill(self, message: Message) -> None:
        runner = self._runners[message.numbers["runner"]]
        assert isinstance(runner, Runner), "a prefill step on packed KV"
        answers = Answers(self._pipe, self._group, runner) if message.numbers["watched"] else None
        runner.prefill(works_of(message), answers)

    def _on_share(self, share: PackedShare, message: Message) -> None:
        if message.kind is Kind.DECODE:
            token_ids, positions, *table = message.arrays
            share.decode(token_ids.tolist(), positions.tolist(), share.update_of(table), message.text)
            return
        pool = share.pool
        pages_X, *more = (torch.tensor(array, device=pool.device) for array in message.arrays)
        if message.kind is Kind.SUMMARISE:
            share.summarise(pages_X, *more)
            return
        shape = (len(pages_X), pool.page_size, pool.head_dim)
        share.store(pages_X, *(self._group.receive(shape, pool.dtype, 0) for _ in range(2)))


class Answers:
    """The layer hook of a watched step: hands over the layer's queries, and then what is asked for."""

    def __init__(self, pipe: BinaryIO, group: Group, runner: Runner) -> None:
        self._pipe, self._group, self._pool = pipe, group, runner.pool
        self._window = window_of(runner)

    def __call__(self, layer: int, queries: LayerQueries) -> None:
        self._group.send(queries.q_THD, 0)
        if queries.lse_TH is not None:
            self._group.send(queries.lse_TH, 0)
        while (question := read_message(self._pipe)).kind is not Kind.RESUME:
            for answer in self._answer(question, queries):
                self._group.send(answer, 0)

    def _answer(self, question: Message, queries: LayerQueries) -> tuple[Tensor, ...]:
        numbers, pool = question.numbers, self._pool
        layer, blocks = numbers["layer"], torch.tensor(question.arrays[0], device=pool.device)
        match question.kind:
            case Kind.KEYS:
                return (pool.read_keys(layer, blocks, numbers["num_tokens"]),)
            case Kind.WINDOW:
                num_rows, q_THD = numbers["num_rows"], queries.q_THD
                q_WHD = self._group.receive((num_rows, *q_THD.shape[1:]), q_THD.dtype, 0)
                lse_WH = self._group.receive(q_WHD.shape[:2], torch.float32, 0) if numbers["lse_is_known"] else None
                return self._window.attend(layer, q_WHD, blocks, numbers["num_tokens"], queries.scale, lse_WH)
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
    device, timeout_s = rank_device(config.model.device, index), numbers["timeout_ms"] / 1000
    group = Group(meeting.store, index, num_ranks, device, timeout_s)
    Follower(pipe, group, meeting).run()
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
