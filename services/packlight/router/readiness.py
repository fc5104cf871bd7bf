"""Whether the workers on the board can serve, and if not, what is wrong with them.

Pure: the workers in, a sentence out. Knows roles, models and compatibility hashes; does not know how workers are found.
"""

from __future__ import annotations

from collections.abc import Sequence

from packlight.core.types import ModelSpec
from packlight.core.workers import Role, WorkerInfo


def serves(worker: WorkerInfo, spec: ModelSpec, *, speaks_tls: bool = False) -> bool:
    """Whether the worker computes with the model whose tokens the router sends, and is called as the router calls.
    Names may differ, weights may not."""
    return worker.fingerprint == spec.fingerprint and worker.speaks_tls == speaks_tls


def why_unreachable(worker: WorkerInfo, *, speaks_tls: bool) -> str | None:
    """Why a router that speaks TLS, or plaintext, cannot call the worker, and what to do; None if it can."""
    if worker.speaks_tls == speaks_tls:
        return None
    theirs, ours = ("plaintext", "TLS") if speaks_tls else ("TLS", "plaintext")
    who = f"worker {worker.worker_id}" if speaks_tls else "the router"
    return (
        f"worker {worker.worker_id} at {worker.address} speaks {theirs}, this router {ours}: "
        f"give {who} tls.ca, tls.cert and tls.key too"
    )


def why_not_ready(workers: Sequence[WorkerInfo], spec: ModelSpec, *, speaks_tls: bool = False) -> str | None:
    """What keeps `workers` from answering with the model `spec`, and what to do; None if nothing does."""
    reachable = [worker for worker in workers if worker.speaks_tls == speaks_tls]
    why_not = _why_not_ready(reachable, spec)
    reasons = [why for worker in workers if (why := why_unreachable(worker, speaks_tls=speaks_tls))]
    if why_not is None or not reasons:
        return why_not
    others = f" ({len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
    return f"{why_not}; {reasons[0]}{others}" if reachable else f"{reasons[0]}{others}"


def _why_not_ready(workers: Sequence[WorkerInfo], spec: ModelSpec) -> str | None:
    fitting = [worker for worker in workers if worker.fingerprint == spec.fingerprint]
    able = [worker for worker in fitting if not worker.draining]
    if _can_serve(able):
        return None
    if not workers:
        return "no worker has reported: start `packlight prefill` and `packlight decode` with this registry"
    if not fitting:
        others = ", ".join(sorted({f"{worker.model} ({worker.fingerprint})" for worker in workers}))
        return f"the router has {spec.name} ({spec.fingerprint}), the workers have {others}: give all one model.path"
    if not able:
        return f"all {len(fitting)} workers are draining"
    return _what_misses(able)


def _can_serve(workers: Sequence[WorkerInfo]) -> bool:
    """A compatible pair, or a decode worker that prefills itself."""
    prefill, decode = ({w.compatibility for w in workers if w.role is role} for role in (Role.PREFILL, Role.DECODE))
    return bool(prefill & decode) or any(worker.local_prefill for worker in workers)


def _what_misses(workers: Sequence[WorkerInfo]) -> str:
    for role in Role:
        if not any(worker.role is role for worker in workers):
            return f"no {role} worker is up"
    kinds = ", ".join(sorted({f"{worker.role} {worker.compatibility}" for worker in workers}))
    return f"no prefill and decode worker fit together ({kinds}): give them one version, model, dtype and kv.page_size"
