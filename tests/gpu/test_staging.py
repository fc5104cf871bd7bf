"""From a GPU's pool to the host: packed by one gather, copied beside what the GPU computes, read when it is there."""

from dataclasses import replace

import pytest
import torch

from packlight.compress.base import Selection
from packlight.compress.pack import pack
from packlight.compress.packers import TorchPacker
from packlight.core.shipping import Chunk
from packlight.kv.lending import pinned
from packlight.kv.pool import KVPool
from packlight.models.fake_spec import fake_spec
from packlight.prefill.staging import CudaCopier, Staging
from packlight.transfer.inproc import InprocSender

pytestmark = pytest.mark.gpu

PAGE, TOKENS, HEADS, DIM = 16, 4000, 8, 128
SLEEP_CYCLES = 200_000_000  # about a tenth of a second


@pytest.fixture
def staging():
    made = Staging(CudaCopier(torch.device("cuda")), limit_bytes=32 << 20)
    yield made
    made.close()


def arrived(frames):
    """The payload of one layer, waited for."""
    events = []
    for event in frames:
        events.append(event) if not hasattr(event, "result") else event.result(60)
    return torch.cat([torch.frombuffer(event.data, dtype=torch.uint8) for event in events if isinstance(event, Chunk)])


@pytest.fixture(scope="module")
def pool():
    spec = replace(fake_spec(), num_layers=2, num_kv_heads=HEADS, head_dim=DIM)
    made = KVPool(spec, num_blocks=TOKENS // PAGE, page_size=PAGE, dtype=torch.bfloat16, device="cuda")
    made.k.normal_()
    made.v.normal_()
    return made


def ragged(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [0, 1, 16, 17, 500, 512, 777, TOKENS]
    return tuple(torch.randperm(TOKENS, generator=generator)[:length].sort().values.cuda() for length in lengths)


def test_packing_equals_the_plain_way_and_waits_for_nothing(pool, no_waiting):
    blocks, selection = torch.arange(TOKENS // PAGE, device="cuda").flip(0), Selection(ragged(), 1.0)
    TorchPacker(pool).pack(1, blocks, selection)
    torch.cuda.synchronize()
    no_waiting()
    packed = TorchPacker(pool).pack(1, blocks, selection)
    torch.cuda.set_sync_debug_mode("default")
    k_KSD, v_KSD = (x.cpu() for x in pool.read_blocks(1, blocks, TOKENS))
    due = pack(k_KSD, v_KSD, Selection(tuple(index.cpu() for index in selection.indices), 1.0), PAGE)
    assert packed.lengths == due.lengths
    assert torch.equal(packed.pages.cpu().view(torch.int16), due.pages.view(torch.int16))


def test_memory_is_pinned():
    assert torch.from_numpy(pinned(1000)[:500]).is_pinned()


def test_a_layer_is_copied_when_it_is_computed_and_not_before(staging, no_waiting):
    data = torch.zeros(8 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    no_waiting()
    torch.cuda._sleep(SLEEP_CYCLES)
    data += 7
    frames = staging.frames(InprocSender(), 0, (1,), data)
    torch.cuda.set_sync_debug_mode("default")
    assert bool((arrived(frames) == 7).all())


def test_the_gpus_memory_of_a_payload_is_not_used_again_before_it_is_copied(staging):
    torch.cuda._sleep(SLEEP_CYCLES)
    layers = []
    for layer in range(6):
        data = torch.full((4 << 20,), layer, dtype=torch.uint8, device="cuda")
        layers.append(staging.frames(InprocSender(), layer, (1,), data))
        del data
        torch.full((4 << 20,), 99, dtype=torch.uint8, device="cuda")
    for layer in range(6):
        assert bool((arrived(layers[layer]) == layer).all())
        layers[layer] = None


def test_pinned_memory_that_is_used_again_has_the_later_layer(staging):
    for layer in range(64):
        data = torch.full((4 << 20,), layer, dtype=torch.uint8, device="cuda")
        assert bool((arrived(staging.frames(InprocSender(), layer, (1,), data)) == layer).all())
