"""Selecting on a GPU: the tokens that the CPU selects by the same scores, and no wait for the device."""

from dataclasses import replace

import pytest
import torch

from packlight.compress.select import Selector, read_masses
from packlight.compress.window import window_attention
from packlight.core.types import PackSpec
from tests.support.packing import make_layers

pytestmark = pytest.mark.gpu


def known(view, device):
    """The view without keys, as a worker makes it where the window's attention is worked out in place."""
    mass_KS, lse_WH = window_attention(view.q_WHD, view.k_KSD, view.scale)
    moved = {name: getattr(view, name).to(device) for name in ("q_WHD", "k_KSD", "accumulated_KS")}
    return replace(view, mass_KS=mass_KS.to(device), lse_WH=lse_WH.to(device), **moved)


def select(views, spec, **how):
    selector = Selector(spec, num_prompt_tokens=views[0].num_tokens, num_tokens=views[0].num_tokens + 5, **how)
    return [selection for view in views for _, selection in selector.add(view)]


@pytest.mark.parametrize("name", ["snapkv", "rocketkv", "pyramidkv", "streaming_llm", "h2o"])
@pytest.mark.parametrize("num_tokens", [300, 9000])
def test_nothing_waits_and_the_same_tokens_are_kept(name, num_tokens, no_waiting):
    views, spec = make_layers(num_tokens, 32, 3), PackSpec(name, num_tokens // 8 + 40)
    expected = select([known(view, "cpu") for view in views], spec)
    on_device = [known(view, "cuda") for view in views]
    select(on_device, spec, reads_late=True)  # what is compiled or allocated at first may wait
    torch.cuda.synchronize()
    no_waiting()
    got = select(on_device, spec, reads_late=True)
    torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(got, expected, strict=True):
        assert [index.tolist() for index in ours.indices] == [index.tolist() for index in theirs.indices]
    masses = read_masses([(layer, selection.retained_mass) for layer, selection in enumerate(got)])
    assert masses == pytest.approx([selection.retained_mass for selection in expected], abs=1e-6)


@pytest.mark.parametrize("name", ["adakv", "cake", "mass"])
def test_lengths_that_depend_on_scores_are_the_same(name):
    views, spec = make_layers(2000, 32, 3), PackSpec(name, 300)
    expected = select([known(view, "cpu") for view in views], spec)
    got = select([known(view, "cuda") for view in views], spec, reads_late=True)
    for ours, theirs in zip(got, expected, strict=True):
        difference = [abs(a - b) for a, b in zip(ours.lengths(), theirs.lengths(), strict=True)]
        assert max(difference) <= 2  # weights and sums are added up in another order
