import torch

from packlight.compress.base import Selection
from packlight.compress.pack import pack


def test_ragged_heads_have_pages_of_their_own():
    k_KSD = torch.arange(3 * 10 * 2, dtype=torch.float32).view(3, 10, 2) + 1
    indices = (torch.tensor([0, 3, 4, 9]), torch.tensor([7]), torch.tensor([0, 1, 2, 3, 5]))
    packed = pack(k_KSD, -k_KSD, Selection(indices, 1.0), page_size=2)
    assert packed.lengths == (4, 1, 5)
    assert packed.k_pages.shape == packed.v_pages.shape == (2 + 1 + 3, 2, 2)
    zero = torch.zeros(1, 2)
    expected = torch.cat([k_KSD[0, indices[0]], k_KSD[1, indices[1]], zero, k_KSD[2, indices[2]], zero])
    assert torch.equal(packed.k_pages.reshape(-1, 2), expected)
    assert torch.equal(packed.v_pages, -packed.k_pages)


def test_strided_sources():
    k_SKD = torch.randn(10, 3, 2)
    selection = Selection((torch.tensor([1, 4, 6]),) * 3, 1.0)
    strided = pack(k_SKD.transpose(0, 1), k_SKD.transpose(0, 1), selection, 4)
    dense = pack(k_SKD.transpose(0, 1).contiguous(), k_SKD.transpose(0, 1).contiguous(), selection, 4)
    assert torch.equal(strided.k_pages, dense.k_pages)


def test_a_head_that_keeps_nothing_has_no_page():
    k_KSD = torch.ones(2, 3, 4)
    packed = pack(k_KSD, k_KSD, Selection((torch.tensor([], dtype=torch.int64), torch.tensor([2])), 1.0), 2)
    assert packed.num_pages == 1
    assert packed.k_pages.tolist() == [[[1.0] * 4, [0.0] * 4]]
