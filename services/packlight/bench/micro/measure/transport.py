"""Shipping KV from prefill to decode, by each transport in turns, with and without computing it first.

Knows which processes there are: the decode worker is this one (`receiver.py`), the prefill worker another, where a
transport has two ends. `time_shipping` asks one that computes nothing and has the prompt cached (`peer.py`),
`time_hiding` one that is started like any other, and computes the prompt anew each time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from packlight.bench.micro.measure.peer import hollow_prefill
from packlight.bench.micro.measure.processes import packlight_role, worker_process
from packlight.bench.micro.measure.receiver import Receiver, Shipment, receiver
from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.core.errors import PacklightError
from packlight.core.types import ModelSpec, PackSpec

ONE_PROCESS = "inproc"
_PEER = "packlight.bench.micro.measure.peer"


@dataclass(frozen=True, slots=True)
class Question:
    """`settings` are those of every process. A prompt of `num_tokens` tokens, packed by `pack`."""

    settings: tuple[str, ...]
    spec: ModelSpec
    num_tokens: int
    pack: PackSpec
    num_threads: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens of no meaning."""
        return tuple(1 + position % (self.spec.vocab_size - 1) for position in range(self.num_tokens))

    def config(self) -> Config:
        return build_config({}, list(self.settings))


async def time_shipping(
    question: Question, names: tuple[str, ...], num_rounds: int, on_progress: Callable[[str], None]
) -> tuple[dict[str, list[Shipment]], dict[str, str]]:
    """By transport, one shipment per round; and why some transports are missing."""
    shipped: dict[str, list[Shipment]] = {}
    skipped: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        receivers = await _receivers(question, names, stack, on_progress)
        for name, each in receivers.items():
            try:
                await each.fetch(question.prompt, question.pack, "")  # the prompt is cached from here on
                shipped[name] = []
            except PacklightError as error:
                skipped[name] = error.message
        for name in shipped:  # by now the links are made that the first shipments asked for
            await receivers[name].fetch(question.prompt, question.pack, "")
        on_progress(f"shipping {question.num_tokens} tokens by {', '.join(shipped)}")
        for _ in range(num_rounds):
            for name, shipments in shipped.items():
                shipments.append(await receivers[name].fetch(question.prompt, question.pack, ""))
    return shipped, skipped


async def time_hiding(
    question: Question, names: tuple[str, ...], num_rounds: int, on_progress: Callable[[str], None]
) -> dict[str, list[Shipment]]:
    """By transport, one prefilled and shipped prompt per round."""
    threads = f"prefill.threads={question.num_threads}"
    hidden: dict[str, list[Shipment]] = {name: [] for name in names}
    async with AsyncExitStack() as stack:
        on_progress("starting a prefill worker with the real model")
        role = packlight_role("prefill", (*question.settings, threads, "prefill.shadow_ratio=0"))
        peer = stack.enter_context(worker_process(*role))
        entered = [receiver(question.config(), question.spec, name, question.num_tokens, peer) for name in names]
        receivers = [await stack.enter_async_context(each) for each in entered]
        for index in range(num_rounds):
            for name, each in zip(names, receivers, strict=True):
                on_progress(f"prefilling and shipping by {name}, {index + 1} of {num_rounds}")
                hidden[name].append(await each.fetch(question.prompt, question.pack, f"{name} {index}"))
    return hidden


async def _receivers(
    question: Question, names: tuple[str, ...], stack: AsyncExitStack, on_progress: Callable[[str], None]
) -> dict[str, Receiver]:
    """One per transport. All but `inproc` ask the same process."""
    config, receivers = question.config(), {}
    crossing = [name for name in names if name != ONE_PROCESS]
    if len(crossing) < len(names):
        local = await stack.enter_async_context(hollow_prefill(config))
        made = receiver(config, question.spec, ONE_PROCESS, question.num_tokens, local)
        receivers[ONE_PROCESS] = await stack.enter_async_context(made)
    if crossing:
        on_progress("starting a prefill worker that computes nothing")
        peer = stack.enter_context(worker_process(_PEER, *question.settings))
        for name in crossing:
            made = receiver(config, question.spec, name, question.num_tokens, peer)
            receivers[name] = await stack.enter_async_context(made)
    return receivers
