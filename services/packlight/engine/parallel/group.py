"""Tensors between the processes of one worker: a torch.distributed group, Gloo for the CPU and NCCL for GPUs.

Knows ranks, shapes and time-outs. It is the process's default group, because transformers' tensor parallelism computes
in it; so a process is in one such group at most. Both ends of a transfer know its shape beforehand.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs know one kind of store
from torch.distributed.distributed_c10d import PrefixStore, Store

from packlight.core.errors import WorkerLost

HOST = "127.0.0.1"
_STORE_TIMEOUT = timedelta(seconds=60)
_MEET_PERIOD_S = 0.02
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def open_store() -> TCPStore:
    """Where the ranks find each other: on a free port (`port`) of this machine, for itself only."""
    listener = socket.create_server((HOST, 0))
    return TCPStore(
        HOST,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=_STORE_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def join_store(port: int) -> TCPStore:
    """The store that the first process opened."""
    return TCPStore(HOST, port, is_master=False, timeout=_STORE_TIMEOUT)


class Meeting:
    """Where ranks wait for each other while they start, however long one takes to load. `check` raises when it is no
    use waiting."""

    def __init__(self, store: Store, rank: int, num_ranks: int, check: Callable[[], None]) -> None:
        self.store, self._rank, self._num_ranks, self._check = store, rank, num_ranks, check

    def meet(self, name: str) -> None:
        """Returns when every rank has called it with `name`. Raises RuntimeError if the first process is gone."""
        self.store.set(f"{name}/{self._rank}", "here")
        while not self.store.check([f"{name}/{rank}" for rank in range(self._num_ranks)]):
            self._check()
            time.sleep(_MEET_PERIOD_S)


class Group:
    """`rank` of `num_ranks` processes on this machine, that meet in `store`."""

    def __init__(self, store: Store, rank: int, num_ranks: int, device: torch.device, timeout_s: float) -> None:
        """Returns when all have come. `timeout_s` is how long a rank waits for another, here and inside a step: they
        start together and do equal work. Raises RuntimeError after it."""
        self.rank, self.num_ranks, self._device = rank, num_ranks, device
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        with _environment(_LOOPBACK):  # nothing listens to anybody outside
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=timeout_s),
            )

    def send(self, tensor: Tensor, rank: int) -> None:
        """Raises WorkerLost if `rank` is gone, or does not take it in time."""
        if tensor.numel():
            with _between(self.rank, rank):
                dist.send(_as_bytes(tensor.contiguous()), rank)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
        """On this rank's device. Raises WorkerLost as `send` does."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        if tensor.numel():
            with _between(self.rank, rank):
                dist.recv(_as_bytes(tensor), rank)
        return tensor

    def close(self) -> None:
        dist.destroy_process_group()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


@contextmanager
def _between(own: int, other: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch says of a connection, a time-out or a wrong size
        raise WorkerLost(f"between the ranks {own} and {other} of this worker: {error}") from error


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set for the duration: torch reads these when a group is made, and from nowhere else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
