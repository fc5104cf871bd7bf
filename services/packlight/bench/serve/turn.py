"""One turn: a server under one load, until all its conversations are over.

Knows when requests are sent. Does not know what they ask or how they are timed. A conversation's later turns follow its
answers at once, under either load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.client import Client, Clock
from packlight.bench.serve.prompts import Exchange
from packlight.bench.serve.workloads import Conversation

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Pace:
    """Time as a turn sees it: a test brings its own."""

    clock: Clock
    sleep: Sleep = asyncio.sleep


async def run_closed(client: Client, conversations: Sequence[Conversation], concurrency: int) -> list[Answer]:
    """Never more than `concurrency` at once, and as many as there are left."""
    waiting = iter(conversations)
    answers: list[Answer] = []

    async def user() -> None:
        for conversation in waiting:
            answers.extend(await converse(client, conversation))

    async with asyncio.TaskGroup() as users:
        for _ in range(concurrency):
            users.create_task(user())
    return answers


async def run_open(
    client: Client, conversations: Sequence[Conversation], due_s: Sequence[float], pace: Pace
) -> list[Answer]:
    """Each conversation begins when it is due, `due_s` on the pace's clock, whatever else is running."""
    answers: list[Answer] = []

    async def begin(conversation: Conversation, at_s: float) -> None:
        await pace.sleep(max(0.0, at_s - pace.clock()))
        answers.extend(await converse(client, conversation, at_s))

    async with asyncio.TaskGroup() as users:
        for conversation, at_s in zip(conversations, due_s, strict=True):
            users.create_task(begin(conversation, at_s))
    return answers


async def converse(client: Client, conversation: Conversation, due_s: float | None = None) -> list[Answer]:
    """All turns of a conversation, or those up to the first that failed: what follows would ask something else."""
    past: list[Exchange] = []
    answers: list[Answer] = []
    for question in conversation.questions:
        is_follow_up = conversation.is_follow_up or bool(past)
        answer = await client.ask(conversation.tag, question, past, due_s=due_s, is_follow_up=is_follow_up)
        answers.append(answer)
        if answer.error is not None:
            break
        past.append(Exchange(question, answer.text))
        due_s = None
    return answers


async def prefill_first(client: Client, conversations: Sequence[Conversation]) -> None:
    """Has the server compute every first prompt, one after the other and untimed, so that it finds them in its prefix
    cache and the turn measures decoding only. A failure shows in the turn itself."""
    for conversation in conversations:
        await client.ask(conversation.tag, conversation.questions[0], max_tokens=1)
