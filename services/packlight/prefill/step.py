"""One prefill step, on the compute thread: the chunks of a plan, and what becomes of the prompts that end in it.

Knows the runner, the dispatch and the tasks of the plan. Changes no task but for its outbox and sender; what the step
means for queues and blocks is `worker.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from packlight.core.errors import InternalError, PacklightError
from packlight.core.types import Token
from packlight.engine.runner import ChunkWork, PrefillRunner
from packlight.engine.sampler import PenaltyState, SampleRow, sample
from packlight.prefill.dispatch import Dispatch
from packlight.prefill.scheduler import ChunkPlan
from packlight.prefill.shipper import Shipment, Shipper, Watch
from packlight.prefill.task import Task


def run_step(
    runner: PrefillRunner, dispatch: Dispatch, plan: Sequence[ChunkPlan], tasks: Sequence[Task]
) -> tuple[list[Token | PacklightError], list[Shipment]]:
    """Compute the chunks; the first tokens and shipments of the prompts that end here, in the plan's order."""
    works, shipments, watches, rows, start = [], [], [], [], 0
    for chunk, task in zip(plan, tasks, strict=True):
        is_last = chunk.end == task.num_tokens
        works.append(ChunkWork(task.request.token_ids[chunk.start : chunk.end], chunk.start, task.blocks, is_last))
        if task.accumulated is not None and chunk.start < task.anchor:
            num_rows = min(chunk.end, task.anchor) - chunk.start
            watches.append(Watch(task.accumulated, dispatch.block_ids(task), start, chunk.start, num_rows))
        if is_last:
            task.outbox.put_threadsafe([dispatch.announce(task)])
            shipments.append(dispatch.open(task, start, chunk.start))
            rows.append(_sample_row(task))
        start += chunk.end - chunk.start
    shipper = Shipper(
        runner.model.spec, runner.pool, dispatch.packer, shipments, watches, dispatch.window, dispatch.staging
    )
    logits = runner.prefill(works, shipper if shipments or watches else None)
    tokens = sample(logits, rows)
    return [_settled(token, shipment) for token, shipment in zip(tokens, shipments, strict=True)], shipments


def _settled(token: Token | PacklightError, shipment: Shipment) -> Token | PacklightError:
    """No answer begins before it is known that its selection means something."""
    try:
        shipment.settle()
    except InternalError as error:
        return error
    return token


def _sample_row(task: Task) -> SampleRow:
    request, penalties = task.request, None
    if request.sampling.has_penalties:
        penalties = PenaltyState(request.token_ids[: task.anchor], request.token_ids[task.anchor :])
    return SampleRow(request.sampling, task.num_tokens, penalties, request.banned_token_ids, task.constraint)
