"""A device that a process cannot have, and one that it has lost."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from packlight.core.errors import ConfigError, DeviceLost, InternalError
from packlight.core.types import Failed
from packlight.decode import worker as decode_worker
from packlight.engine.device import check_device, find_lost
from packlight.models.fake import fake_answer
from packlight.prefill import worker as prefill_worker
from tests.support.fake_pair import FakePair, answer, collect, fake_pair, make_request

PROMPT = list(range(1, 41))


def test_a_device_that_there_is_not_is_refused_before_weights_are_read():
    check_device("cpu")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ConfigError, match=f"model.device '{device}'"):
            check_device(device)


def test_a_device_that_answers_is_not_lost():
    assert find_lost(torch.device("cpu")) is None
    lost = find_lost(torch.device("meta"))  # takes work, and has no results
    assert lost is not None
    assert lost.retryable
    assert "meta is lost" in lost.message


INVALID = RuntimeError("CUDA error: an illegal memory access was encountered")


async def fail_steps(pair: FakePair, role: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a reason of its own, and one that takes the device with it."""
    gate = pair.prefill_gate if role == "prefill" else pair.decode_gate
    gate.error = INVALID
    _, event = await collect(pair.decode, make_request(PROMPT, request_id="1"))
    assert isinstance(event, Failed)
    assert isinstance(event.error, InternalError)
    gate.error = None
    assert await answer(pair.decode, make_request(PROMPT, request_id="2")) == fake_answer(PROMPT, 8)
    gate.error = INVALID
    monkeypatch.setattr(module, "find_lost", lambda device: DeviceLost(f"{device} is lost"))
    _, event = await collect(pair.decode, make_request(PROMPT, request_id="3"))
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeviceLost)


@pytest.mark.parametrize(("role", "module"), [("prefill", prefill_worker), ("decode", decode_worker)])
async def test_a_worker_ends_with_its_device_and_not_with_a_step(role, module, monkeypatch):
    """What it was about may be tried elsewhere."""
    with pytest.raises(DeviceLost, match="cpu is lost"):
        async with fake_pair() as pair:
            await fail_steps(pair, role, module, monkeypatch)
