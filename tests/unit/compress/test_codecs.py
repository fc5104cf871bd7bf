"""Each codec's own promises: its error against the theory, its memory. What they have in common: `tests/contract`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packlight.compress.base import Selection
from packlight.compress.codecs.fp8 import FP8Codec
from packlight.compress.codecs.kivi import Int2Codec, Int4Codec, Int8Codec, dequantise, quantise
from packlight.compress.codecs.lloyd_max import boundaries, codebook
from packlight.compress.codecs.native import NativeCodec
from packlight.compress.codecs.records import pack_bits, packed_bytes, unpack_bits
from packlight.compress.codecs.rotation import hadamard_rotation, signs
from packlight.compress.codecs.turboquant import SphereQuantiser, TurboQuant2, TurboQuant3, TurboQuant4
from packlight.compress.pack import pack
from packlight.core.errors import InvalidRequest

CPU = torch.device("cpu")


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- records -----------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_packed_codes_come_back(bits, num_records, num_codes, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (num_records, num_codes), generator=generator, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (num_records, packed_bytes(num_codes, bits))
    assert torch.equal(unpack_bits(packed, num_codes, bits), codes)


@pytest.mark.parametrize(("bits", "num_bytes"), [(2, 256), (3, 384), (4, 512), (8, 1024)])
def test_codes_take_exactly_their_bits(bits, num_bytes):
    assert packed_bytes(1024, bits) == num_bytes


# --- native ------------------------------------------------------------------


def test_native_copies_neither_on_the_way_out_nor_in():
    k_KSD, codec = gaussian(2, 9, 6), NativeCodec()
    packed = pack(k_KSD, -k_KSD, Selection((torch.tensor([0, 8]), torch.tensor([1, 2, 5, 6, 7])), 1.0), 4)
    records = codec.encode(packed.k_pages, packed.v_pages, [1, 2])
    assert records.data_ptr() == packed.pages.data_ptr()
    k_PTD, v_PTD = codec.decode(records, 4, 6, torch.float32)
    assert k_PTD.data_ptr() == records.data_ptr()
    assert torch.equal(k_PTD, packed.k_pages)
    assert torch.equal(v_PTD, packed.v_pages)


def test_native_is_not_fooled_by_neighbours_in_one_storage():
    codec, whole = NativeCodec(), gaussian(8, 4, 6)
    for k_PTD, v_PTD in ((whole[4:], whole[:4]), (whole[1::2], whole[::2]), (whole[::4], whole[1::4]), (whole, whole)):
        decoded = codec.decode(codec.encode(k_PTD, v_PTD, [len(k_PTD)]), 4, 6, torch.float32)
        assert torch.equal(decoded[0], k_PTD)
        assert torch.equal(decoded[1], v_PTD)


# --- fp8 ---------------------------------------------------------------------


def test_fp8_error_is_half_a_step_of_its_three_fraction_bits():
    k_PTD = gaussian(50, 16, 64) * torch.logspace(-4, 1, 50)[:, None, None]
    counts = [20, 30]
    decoded, _ = FP8Codec().decode(FP8Codec().encode(k_PTD, k_PTD, counts), 16, 64, torch.float32)
    largest_K = torch.stack([k_PTD[:20].abs().max(), k_PTD[20:].abs().max()])
    scale_P11 = (largest_K / 448).repeat_interleave(torch.tensor(counts))[:, None, None]
    limit = torch.maximum(k_PTD.abs() * 2**-4, scale_P11 * 2**-10) * (1 + 1e-5)
    assert ((decoded - k_PTD).abs() <= limit).all()
    assert decoded.abs().max() == pytest.approx(k_PTD.abs().max().item(), rel=1e-6)


def test_fp8_records_of_a_head_share_one_scale_each_for_k_and_v():
    k_PTD, v_PTD = gaussian(5, 4, 8), gaussian(5, 4, 8, seed=1)
    records = FP8Codec().encode(k_PTD, v_PTD, [2, 3])
    scales = records[:, -8:].clone().view(torch.float32)
    for rows in (slice(0, 2), slice(2, 5)):
        expected = torch.stack([k_PTD[rows].abs().max(), v_PTD[rows].abs().max()]) / 448
        torch.testing.assert_close(scales[rows], expected.expand(len(scales[rows]), 2))


def test_fp8_reads_every_code_as_torch_does():
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)  # without the NaNs
    record = torch.cat([codes, codes, torch.tensor([1.0, 1.0]).view(torch.uint8)])[None]
    k_PTD, _ = FP8Codec().decode(record, 1, len(codes), torch.float32)
    assert torch.equal(k_PTD.flatten(), codes.view(torch.float8_e4m3fn).float())


# --- KIVI --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_quantiser_has_the_textbook_distortion(bits):
    """step^2 / 12, except for the two ends of each group, which are exact."""
    x = uniform(4000, 32)
    codes, scale, low = quantise(x, bits, dim=1)
    error = (dequantise(codes, scale, low) - x).double().square().mean()
    theory = (scale.double().square() / 12).mean() * 30 / 32
    assert error.item() == pytest.approx(theory.item(), rel=0.02)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 20.0, -300.0])
def test_no_value_is_off_by_more_than_half_a_step(bits, offset):
    """Though `low` and the step are rounded to fp16, far from zero by much more than such a step."""
    x = gaussian(500, 16) + offset
    codes, scale, low = quantise(x, bits, dim=1)
    error = (dequantise(codes, scale, low) - x).abs()
    assert (error <= scale.float() * (0.5 + 1e-3)).all()
    assert (low.float() <= x).all()


@pytest.mark.parametrize("codec", [Int8Codec(), Int4Codec(), Int2Codec()])
def test_outlier_channels_of_k_and_outlier_tokens_of_v_hurt_only_themselves(codec):
    k_PTD, v_PTD = gaussian(20, 16, 64), gaussian(20, 16, 64, seed=1)
    plain = codec.decode(codec.encode(k_PTD, v_PTD, [20]), 16, 64, torch.float32)
    k_PTD[:, :, 5] *= 1000
    v_PTD[:, 7] *= 1000
    k_out, v_out = codec.decode(codec.encode(k_PTD, v_PTD, [20]), 16, 64, torch.float32)
    others_D, others_T = torch.arange(64) != 5, torch.arange(16) != 7
    assert torch.equal(k_out[:, :, others_D], plain[0][:, :, others_D])
    assert torch.equal(v_out[:, others_T], plain[1][:, others_T])


def test_values_below_fp16_are_clamped_to_it_and_wide_groups_stay_finite():
    k_PTD = torch.tensor([0.0, 1e30, -1e6, 5.0]).view(1, 4, 1).expand(1, 4, 8)
    k_out, v_out = Int4Codec().decode(Int4Codec().encode(k_PTD, k_PTD, [1]), 4, 8, torch.float32)
    assert k_out[0, 2].tolist() == v_out[0, 2].tolist() == [-65504.0] * 8
    assert k_out[0, 1].tolist() == [-65504.0 + 15 * 65504.0] * 8
    assert v_out[0, 1].tolist() == [65504.0 + 15 * 65504.0] * 8


@pytest.mark.parametrize(("head_dim", "groups"), [(16, 1), (32, 1), (64, 2), (80, 4), (96, 3), (128, 4)])
def test_a_token_of_v_is_cut_into_groups_of_up_to_32_channels(head_dim, groups):
    codes, k_range, v_range = 2 * 16 * head_dim // 2, 2 * 2 * head_dim, 2 * 2 * 16 * groups
    assert Int4Codec().record_bytes(16, head_dim, torch.float32) == codes + k_range + v_range


# --- TurboQuant --------------------------------------------------------------

# J. Max, "Quantizing for minimum distortion" (1960), table I: a standard normal variable.
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", MAX_1960)
def test_codebook_for_many_dimensions_is_that_of_the_normal_distribution(bits):
    points = codebook(bits, 4096)
    sample = gaussian(400_000).double().numpy()
    nearest = points[np.searchsorted(boundaries(points), sample)]
    assert np.square(nearest - sample).mean() == pytest.approx(MAX_1960[bits], rel=0.01)


def test_codebook_values_of_the_paper():
    assert codebook(1, 4096).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-3)
    assert codebook(2, 4096).tolist() == pytest.approx([-1.510, -0.453, 0.453, 1.510], abs=2e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_of_random_directions(bits, head_dim):
    """Relative squared error: Max's figure, a little less for a sphere of few dimensions, never below 4^-bits."""
    x_VD = torch.nn.functional.normalize(gaussian(4000, head_dim), dim=1)
    quantiser = SphereQuantiser.build(bits, head_dim, CPU)
    error = (quantiser.restore(*quantiser.quantise(x_VD)) - x_VD).double().square().sum(dim=1).mean().item()
    assert error == pytest.approx(MAX_1960[bits], rel=0.05)
    assert error > 4.0**-bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_rotation_makes_the_worst_directions_ordinary(bits):
    """All of a vector in one channel, where a scale per vector would lose every other one."""
    x_VD = 40 * torch.eye(64) + 0.1 * gaussian(64, 64)
    quantiser = SphereQuantiser.build(bits, 64, CPU)
    error = (quantiser.restore(*quantiser.quantise(x_VD)) - x_VD).square().sum() / x_VD.square().sum()
    assert error.item() < 4 * MAX_1960[bits]


@pytest.mark.parametrize("head_dim", [2, 8, 64, 256])
def test_rotation_is_orthogonal_and_mixes_every_channel(head_dim):
    rotation_DD = hadamard_rotation(head_dim)
    assert torch.equal(rotation_DD @ rotation_DD.T, head_dim * torch.eye(head_dim))
    assert torch.equal(rotation_DD.abs(), torch.ones(head_dim, head_dim))


def test_signs_are_what_the_specification_says():
    """Fixed for ever: a fleet in the middle of an upgrade must agree on them."""
    assert "".join("+-"[int(sign < 0)] for sign in signs(16)) == "---++--+--+++-++"


@pytest.mark.parametrize("head_dim", [1, 6, 80])
def test_head_dims_without_a_rotation_are_refused(head_dim):
    with pytest.raises(InvalidRequest, match=f"head_dim is {head_dim}.*int4"):
        TurboQuant4().record_bytes(16, head_dim, torch.float32)
    with pytest.raises(InvalidRequest, match=f"head_dim is {head_dim}"):
        TurboQuant4().encode(torch.zeros(1, 4, head_dim), torch.zeros(1, 4, head_dim), [1])


@pytest.mark.parametrize("codec", [TurboQuant2, TurboQuant3, TurboQuant4])
def test_keys_have_at_least_the_bits_of_values(codec):
    assert codec.k_bits >= codec.v_bits
    codes = 16 * 64 * (codec.k_bits + codec.v_bits) // 8
    assert codec().record_bytes(16, 64, torch.float32) == codes + 2 * 16 * 2
