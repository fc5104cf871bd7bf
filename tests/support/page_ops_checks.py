"""What every `PageOps` must do, against the twins in torch on a CPU: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import torch

from packlight.attention.flashinfer.ops import PageOps, TokenPlaces, TorchPageOps
from packlight.attention.flashinfer.rating import mass_of
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool
from packlight.kv.reading import PageRating, PageRule
from tests.support.page_heads import POISON, head_case
from tests.support.paged_rows import model_spec

# head dim, group, pages at most, page size, budget
SHAPES = [(64, 1, 3, 16, 2), (40, 7, 33, 1, 5), (96, 3, 70, 4, 16), (128, 4, 40, 16, 12)]
BOUNDS = PageRule(PageRating.SUM_OF_BOUNDS)
MASS, MASS_OF_FEW_DIMS = (PageRule(PageRating.MASS_OF_REPRESENTATIVES, num_dims) for num_dims in (1000, 13))
SCALE = 0.4
twin = TorchPageOps()


def check_ratings(
    ops: PageOps, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], rule: PageRule
) -> None:
    head_dim, group, max_pages, page_size, budget = shape
    case = head_case(dtype, head_dim, group, max_pages, page_size=page_size, budget=budget)
    moved = case.on(device)
    got = ops.rate(rule, moved.q_XGD, SCALE, moved.bounds_NE, moved.table, moved.heads).cpu()
    expected = twin.rate(rule, case.q_XGD, SCALE, case.bounds_NE, case.table, case.heads)
    assert got.shape == expected.shape
    is_page_YRM = case.is_page_YM[:, None].expand_as(got)
    torch.testing.assert_close(got[is_page_YRM], expected[is_page_YRM], atol=2e-4, rtol=1e-4)


def check_picked(ops: PageOps, device: str, shape: tuple[int, int, int, int, int], *, few: bool, seed: int) -> None:
    """Of given scores the same lists to the bit, and nothing written beside them."""
    head_dim, group, max_pages, page_size, budget = shape
    case = head_case(torch.float32, head_dim, group, max_pages, page_size=page_size, budget=budget, seed=seed)
    moved, ratings = case.on(device), case.random_ratings(1, few=few)
    got, expected = moved.poisoned_indices(), case.poisoned_indices()
    ops.pick(ratings.to(device), moved.table, moved.heads, got, are_logits=False)
    twin.pick(ratings, case.table, case.heads, expected, are_logits=False)
    assert (expected != POISON).any()
    assert (expected == POISON).any()
    assert torch.equal(got.cpu(), expected)


def check_picked_by_mass(ops: PageOps, device: str, shape: tuple[int, int, int, int, int]) -> None:
    """No page is left out whose share of attention exceeds a chosen one's by more than rounding."""
    head_dim, group, max_pages, page_size, budget = shape
    case = head_case(torch.float32, head_dim, group, max_pages, page_size=page_size, budget=budget)
    moved, ratings = case.on(device), case.random_ratings(group, few=False)
    # How full the last page is then decides what the others weigh in a row.
    ratings[torch.arange(len(ratings)), 0, case.heads.num_stored_Y - 1] += 13
    got, expected = moved.poisoned_indices(), case.poisoned_indices()
    ops.pick(ratings.to(device), moved.table, moved.heads, got, are_logits=True)
    twin.pick(ratings, case.table, case.heads, expected, are_logits=True)
    got = got.cpu()
    assert torch.equal(got == POISON, expected == POISON)
    mass_YM = mass_of(ratings, case.heads.num_tokens_YM)
    pages_YM = case.heads.pages_YM(case.table)
    for y, (begin, count) in enumerate(zip(*case.heads.fields_FY[[4, 3]].tolist(), strict=True)):
        stored = pages_YM[y][case.is_page_YM[y]]
        listed, wanted = (lists[begin : begin + count] for lists in (got, expected))
        assert stored[torch.isin(stored, listed)].tolist() == listed.tolist(), "pages are listed in order"
        shares = dict(zip(stored.tolist(), mass_YM[y].tolist(), strict=False))
        assert sum(shares[page] for page in listed.tolist()) >= sum(shares[page] for page in wanted.tolist()) - 1e-5
        assert {int(stored[0]), int(stored[-1])} <= set(listed.tolist())


def check_stored(
    ops: PageOps,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    *,
    fp8: bool = False,
    exact: bool = False,
) -> None:
    """Every byte of pool and summaries, poison beside what is written included. Rows are given as a model gives them:
    k contiguous, v as a part of a wider tensor; the last two are of one row, as in a step that was filled up. `exact`:
    numbers that FP8 has, and some beyond, because Triton's interpreter rounds others in a way of its own."""
    generator = torch.Generator().manual_seed(head_dim)
    spec, layer, num_kv_heads = model_spec(3, 2, head_dim), 1, 2
    num_dense_B = torch.tensor([0, 1, 2, 3, 0, 0])
    num_rows, num_pages = len(num_dense_B), 7 * 3 * 2
    k_BKD = 300 * torch.randn(num_rows, num_kv_heads, head_dim, generator=generator).to(dtype)
    v_BKD = torch.randn(num_rows, 3 * num_kv_heads, head_dim, generator=generator).to(dtype)
    if exact:
        k_BKD, v_BKD = (_in_fp8(x) for x in (k_BKD, v_BKD))
    pages_LX = torch.randperm(num_pages, generator=generator)[: 3 * num_rows * num_kv_heads].view(3, -1)
    offsets_LX = torch.randint(page_size, pages_LX.shape, generator=generator)
    offsets_LX[:, ::3] = 0
    slots_LX = pages_LX * page_size + offsets_LX
    slots_LX[:, -num_kv_heads:] = slots_LX[:, -2 * num_kv_heads : -num_kv_heads]
    k_BKD[-1], v_BKD[-1] = k_BKD[-2], v_BKD[-2]
    found = []
    for some_ops, where in ((ops, device), (twin, "cpu")):
        pool = (FP8Pool if fp8 else KVPool)(spec, num_blocks=7, page_size=page_size, dtype=dtype, device=where)
        for pages in (pool.k_pages, pool.v_pages):
            pages.view(torch.uint8).fill_(0x3B)
        bounds_NE = 200 * torch.randn(num_pages, 2 * head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
        bounds_NE[(pages_LX[layer])[offsets_LX[layer] == 0]] = torch.nan
        bounds_NE = bounds_NE.to(where)
        places = TokenPlaces(slots_LX.to(where), num_dense_B.to(where))
        given = k_BKD.to(where), v_BKD.to(where)[:, num_kv_heads : 2 * num_kv_heads]
        some_ops.store(pool, bounds_NE, layer, *given, places)
        some_ops.store(pool, None, 2, *given, places)
        found.append([x.view(torch.uint8).cpu() for x in (pool.k_pages, pool.v_pages, bounds_NE)])
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def _in_fp8(x: torch.Tensor) -> torch.Tensor:
    rounded = x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
    return torch.where(x.abs() > 448, x, rounded.masked_fill(rounded.abs() < 2**-6, 0.0))
