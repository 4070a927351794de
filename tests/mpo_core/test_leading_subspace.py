"""The few leading singular vectors of a large matrix, against a spectrum that is known by construction."""

import pytest
import torch

from mpo_core import contract, rel_error, tt_svd
from mpo_core.tensor_train.leading_subspace import leading_left

N, K = 2048, 24


def matrix(m, n, singular_values):
    generator = torch.Generator().manual_seed(3)
    rank = len(singular_values)
    U, V = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))[0] for size in (m, n))
    return U @ (singular_values.double()[:, None] * V.mT)


INDEX = torch.arange(1, 97)
SPECTRA = {
    "falling": 1 / INDEX,
    "small remainder": torch.where(INDEX <= K, 1.0, 1e-5),
    "one far above the rest": torch.where(INDEX == 1, 1e3, torch.where(INDEX <= K, 1.1, 1.0)),
}


def assert_as_good_as_the_svd(M, singular_values, tolerance, rounding):
    """`tolerance`: of the squared error; `rounding`: of M's norm."""
    U = leading_left(M, K)
    assert U is not None
    assert U.shape == (M.shape[0], K)
    assert U.dtype == M.dtype
    torch.testing.assert_close(U.mT @ U, torch.eye(K, dtype=M.dtype), atol=2e-6, rtol=0)
    square = float(torch.linalg.vector_norm(M - U @ (U.mT @ M), dtype=torch.float64)) ** 2
    least = float(singular_values.double()[K:].square().sum())
    assert square <= (1 + tolerance) * least + rounding**2 * float(singular_values.double().square().sum())


@pytest.mark.parametrize(
    ("spectrum", "dtype"), [*((name, torch.float32) for name in SPECTRA), ("falling", torch.float64)]
)
def test_iteration_leaves_no_more_than_the_least_error(spectrum, dtype):
    singular_values = SPECTRA[spectrum]
    M = matrix(N, N, singular_values).to(dtype)
    assert_as_good_as_the_svd(M, singular_values, 1e-4, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(256, 16384), (16384, 256)], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", ["falling", "small remainder"])
def test_gram_matrix_leaves_no_more_than_the_least_error(spectrum, shape):
    M = matrix(*shape, SPECTRA[spectrum]).float()
    assert_as_good_as_the_svd(M, SPECTRA[spectrum], 1e-5, 16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("shape", [(N, N), (256, 16384), (16384, 256)])
@pytest.mark.parametrize("rank", [0, 5])
def test_rank_below_k_is_exact(shape, rank):
    M = matrix(*shape, torch.ones(rank)).float()
    assert_as_good_as_the_svd(M, torch.ones(rank), 0, 16 * torch.finfo(torch.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "singular_values", [torch.where(INDEX <= K, 1.0, 0.97), torch.ones(96)], ids=["no gap", "flat"]
)
def test_iteration_gives_up_or_is_as_good_where_its_gains_tell_little(singular_values):
    M = matrix(N, N, singular_values).float()
    if leading_left(M, K) is not None:
        assert_as_good_as_the_svd(M, singular_values, 2e-4, 16 * torch.finfo(torch.float32).eps)


def test_first_ones_first_and_the_same_every_time():
    M = matrix(N, N, SPECTRA["falling"]).float()
    U = leading_left(M, K)
    torch.testing.assert_close(torch.linalg.vector_norm(U.mT @ M, dim=1), SPECTRA["falling"][:K], atol=1e-3, rtol=0)
    assert torch.equal(U, leading_left(M, K))


def test_left_to_a_full_svd_where_that_is_no_slower():
    assert leading_left(torch.ones(512, 512), 4) is None
    assert leading_left(torch.ones(N, N), N // 4) is None
    assert leading_left(torch.ones(256, 16384, dtype=torch.float64), 64) is None  # a Gram matrix would cost digits


def test_tt_svd_of_a_large_matrix_is_as_good_as_its_full_svds():
    """With rel_error = 0 and the same caps, the cuts are full SVDs."""
    W, sizes = matrix(N, N, SPECTRA["falling"]).float(), ((8, 16, 16), (16, 16, 8))
    cores, full = tt_svd(W, *sizes, K), tt_svd(W, *sizes, K, rel_error=0.0)
    assert [core.shape for core in cores] == [core.shape for core in full]
    assert rel_error(W, contract(cores)) <= (1 + 1e-4) * rel_error(W, contract(full))
    for core in cores[:-1]:
        M = core.reshape(-1, core.shape[3])
        torch.testing.assert_close(M.mT @ M, torch.eye(core.shape[3]), atol=2e-6, rtol=0)
