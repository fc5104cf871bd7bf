"""Who takes which conversation when: the schedule inside Locust's process.

Locust's users are *slots* here: each takes the next conversation, waits until it is due, goes through it, and comes
back for another. As long as a slot is free at every due moment the load is open: requests arrive whatever the
server does. When none is, the conversation starts late, and both are recorded: that it had to wait, and its latency
from when it was due.

Knows Locust's runners (alone, master, workers) and greenlets. Does not know HTTP.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import gevent  # type: ignore[import-untyped]
from gevent.event import Event  # type: ignore[import-untyped]
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest.asking import UNANSWERED, Asker
from loadtest.plan import Plan, PlannedConversation, PlannedTurn
from loadtest.samples import Sample, SampleFile
from packlight.bench.serve.answers import Answer

SAMPLE, OVER = "packlight_sample", "packlight_conversation_over"
LEAD_S = 0.5
"""From when Locust has made all slots to the beginning of the run: they also need to be waiting."""
_GRACE_S = 5.0

_log = logging.getLogger("loadtest")
Conversation = tuple[int, PlannedConversation]
Message = dict[str, Any]


class RunClock:
    """Seconds since the run began. `LEAD_S` before that its beginning is known."""

    def __init__(self) -> None:
        self._is_set = Event()
        self._zero = 0.0

    def begin(self) -> None:
        self._zero = time.perf_counter() + LEAD_S
        self._is_set.set()

    def wait(self) -> None:
        """Until it says something."""
        self._is_set.wait()

    def sleep_until(self, at_s: float) -> None:
        """Never less: gevent's own timers start from when its loop last looked at the time, and may end early."""
        while (left_s := at_s - self()) > 0:
            gevent.sleep(left_s)

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


class Conductor:
    """One test of one sending process. Locust makes a new test each time that one is started."""

    def __init__(self, environment: Environment, plan: Plan, make_asker: Callable[[RunClock], Asker]) -> None:
        assert environment.runner is not None
        self._environment, self._runner, self._plan = environment, environment.runner, plan
        self.clock = RunClock()
        self._asker = make_asker(self.clock)
        self._waiting: deque[Conversation] = deque(self._share())

    def work(self) -> None:
        """What one slot does: conversations, until none is left."""
        self.clock.wait()
        while self._waiting:
            number, conversation = self._waiting.popleft()
            slot_wait_s = max(0.0, self.clock() - conversation.due_s)
            try:
                self._converse(number, conversation, slot_wait_s)
            except Exception:
                _log.exception("conversation %d broke off: this is a bug of the load test", number)
            self._runner.send_message(OVER, {"conversation": number})

    def _share(self) -> list[Conversation]:
        """Every process deals the same plan and takes its own part of it."""
        numbered = list(enumerate(self._plan.conversations))
        if not isinstance(self._runner, WorkerRunner):
            return numbered
        options: Any = self._environment.parsed_options
        index, num_workers = self._runner.worker_index, options.expect_workers or 1
        if index >= num_workers:
            _log.warning("worker %d has nothing to do: start the master with --expect-workers", index)
            return []
        return list(islice(numbered, index, None, num_workers))

    def _converse(self, number: int, conversation: PlannedConversation, slot_wait_s: float) -> None:
        """All turns, or those up to the first that failed: what follows would ask something else."""
        messages: list[Message] = [{"role": "system", "content": conversation.system}]
        due_s = conversation.due_s
        for index, turn in enumerate(conversation.turns):
            self.clock.sleep_until(min(due_s, self._plan.end_s))
            messages.append({"role": "user", "content": turn.content})
            answer = self._ask(messages, turn, due_s, conversation.is_follow_up or index > 0)
            self._report(Sample(conversation=number, turn=index, slot_wait_s=slot_wait_s, answer=answer))
            if answer.error is not None or answer.last_s is None or index + 1 == len(conversation.turns):
                return
            messages.append({"role": "assistant", "content": answer.text})
            due_s, slot_wait_s = answer.last_s + conversation.turns[index + 1].think_s, 0.0

    def _ask(self, messages: list[Message], turn: PlannedTurn, due_s: float, is_follow_up: bool) -> Answer:
        """A request that is still open when the run ends has failed; so has one that was never sent."""
        body = self._plan.body | {"messages": messages, "max_tokens": turn.max_tokens}
        sent_s, answer = self.clock(), None
        if sent_s < self._plan.end_s:
            with gevent.Timeout(self._plan.end_s - sent_s, False):
                answer = self._asker.ask(body, due_s, is_follow_up=is_follow_up, references=turn.references)
        return answer or Answer(due_s=due_s, sent_s=sent_s, is_follow_up=is_follow_up, error=UNANSWERED)

    def _report(self, sample: Sample) -> None:
        self._runner.send_message(SAMPLE, sample.to_message())
        for kind, seconds in _durations(sample.answer):
            self._fire(kind, seconds, sample.answer)
        if sample.answer.error is not None:
            self._fire("E2E", 0.0, sample.answer)

    def _fire(self, kind: str, seconds: float, answer: Answer) -> None:
        """A row of Locust's own tables, page and CSV, in milliseconds."""
        self._environment.events.request.fire(  # type: ignore[no-untyped-call]
            request_type=kind,
            name=self._plan.scenario,
            response_time=1000 * seconds,
            response_length=answer.num_output_tokens,
            exception=None if answer.error is None else RuntimeError(answer.error),
            context={},
        )


def _durations(answer: Answer) -> list[tuple[str, float]]:
    named = [("TTFT", answer.ttft_s), ("TPOT", answer.tpot_s), ("E2E", answer.e2e_s)]
    gaps = [("ITL", after - before) for before, after in pairwise(answer.event_s)] if answer.error is None else []
    return [(name, value) for name, value in named if value is not None] + gaps


class Collector:
    """In the one process that collects: keeps samples, and ends the test when every conversation is over."""

    def __init__(
        self, environment: Environment, plan: Plan, file: SampleFile | None, *, stays: bool, linger_s: float
    ) -> None:
        """`stays`: there is a web page, on which the figures remain. `linger_s`: what Locust needs at the end to write
        its own figures, which it does at intervals."""
        assert environment.runner is not None
        self._runner, self._plan, self._file, self._stays = environment.runner, plan, file, stays
        self._linger_s = linger_s
        self._num_over, self._deadline = 0, gevent.Greenlet()
        self._runner.register_message(SAMPLE, self._on_sample)
        self._runner.register_message(OVER, self._on_over)

    def begin(self) -> None:
        """All slots are there, in all processes."""
        self._num_over = 0
        if self._file is not None:
            self._file.begin(time.time() + LEAD_S)
        self._deadline.kill(block=False)
        self._deadline = gevent.spawn_later(self._plan.end_s + _GRACE_S, self._end)

    def _on_sample(self, environment: Environment, msg: Any, **_: object) -> None:
        if self._file is not None:
            self._file.add(msg.data)

    def _on_over(self, environment: Environment, msg: Any, **_: object) -> None:
        self._num_over += 1
        if self._num_over == len(self._plan.conversations):
            gevent.spawn_later(self._linger_s, self._end)

    def _end(self) -> None:
        if self._stays:
            self._runner.stop()
        else:
            self._runner.quit()


def is_collecting(environment: Environment) -> bool:
    return not isinstance(environment.runner, WorkerRunner)


def is_sending(environment: Environment) -> bool:
    return not isinstance(environment.runner, MasterRunner)
