"""Data-aware fitting: optimality where it is claimed, monotony, and independent oracles in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_core.fitting.chain_fit import improve_cores
from mpo_core.fitting.fit import FIT_METHODS, fit_cores, low_rank_svd, whitened_tt_svd
from mpo_core.fitting.metric import Metric
from mpo_core.fitting.shared_space import SharedSpace
from mpo_core.fitting.whitening import kronecker_factors
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.tensor_train.algebra import balance_cores, contract, rel_error, tt_svd
from mpo_core.tensor_train.bonds import clip_bonds

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_gram(size, seed, n_samples=None, decades=2):
    """Of inputs whose directions differ in scale by up to 100; singular when there are fewer samples than entries."""
    scales = torch.logspace(0, -decades, size, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(size, size, seed=seed))[0]
    x = normal(n_samples or 4 * size, size, seed=seed + 1) * scales @ rotation
    return x.T @ x / len(x)


def output_error(W, W_hat, gram):
    return Metric(gram).error(W, W_hat)


def kronecker(factors):
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


@st.composite
def problems(draw, max_sites=3):
    """(W, d_out, d_in, chi, gram)"""
    n_sites = draw(st.integers(1, max_sites))
    sizes = st.lists(st.integers(1, 4), min_size=n_sites, max_size=n_sites)
    d_out, d_in, seed = draw(sizes), draw(sizes), draw(seeds)
    rows, columns = math.prod(d_out), math.prod(d_in)
    n_samples = draw(st.sampled_from([None, max(1, columns // 2)]))
    gram = make_gram(columns, seed, n_samples)
    return normal(rows, columns, seed=seed + 2), d_out, d_in, draw(st.integers(1, 5)), gram


# Low rank -------------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_low_rank_svd_reaches_the_bound_of_eckart_and_young(rows, columns, data):
    """In coordinates where the Gram matrix is 1, by Cholesky where the code takes eigenvalues."""
    seed, rank = data.draw(seeds), data.draw(st.integers(1, min(rows, columns)))
    W, gram = normal(rows, columns, seed=seed), make_gram(columns, seed)
    A, B = low_rank_svd(W, rank, Metric(gram))
    assert (A.shape, B.shape) == ((rows, rank), (rank, columns))
    L = torch.linalg.cholesky(gram)
    s = torch.linalg.svdvals(W @ L)
    assert output_error(W, A @ B, gram) == pytest.approx(
        float(torch.linalg.norm(s[rank:]) / torch.linalg.norm(s)), abs=1e-9
    )
    torch.testing.assert_close(torch.linalg.norm(A, dim=0), torch.linalg.norm(B, dim=1))


@pytest.mark.parametrize("n_samples", [None, 3])
def test_low_rank_svd_is_not_beaten_by_alternating_least_squares(n_samples):
    """From many starts; and with fewer samples than inputs, where no whitener has an inverse."""
    W, gram = normal(5, 6, seed=0), make_gram(6, 1, n_samples)
    best = output_error(W, torch.matmul(*low_rank_svd(W, 2, Metric(gram))), gram)
    for seed in range(20):
        A = normal(5, 2, seed=seed)
        for _ in range(200):
            B = torch.linalg.lstsq(A, W).solution
            A = W @ gram @ B.T @ torch.linalg.pinv(B @ gram @ B.T)
        assert output_error(W, A @ B, gram) >= best - 1e-9


def test_low_rank_svd_without_a_gram_is_the_truncated_svd():
    W = normal(5, 7, seed=0)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(torch.matmul(*low_rank_svd(W, 3)), U[:, :3] * s[:3] @ Vh[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_svd_keeps_the_dtype_and_stays_finite_at_zero(dtype):
    A, B = low_rank_svd(torch.zeros(3, 4, dtype=dtype), 2)
    assert A.dtype == B.dtype == dtype
    assert torch.isfinite(A).all()
    assert torch.equal(A @ B, torch.zeros(3, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("W", "rank", "message"),
    [
        (torch.zeros(3, 4), 0, "`1 <= rank <= 3` must hold, but got rank=0"),
        (torch.zeros(3, 4), 4, "`1 <= rank <= 3` must hold, but got rank=4"),
        (torch.zeros(3, 4) / 0, 2, "`W` must be finite to be decomposed, but 12 entries are not"),
        (torch.zeros(3), 1, r"`W` must have shape .*, but got \(3,\)"),
    ],
)
def test_low_rank_svd_refuses(W, rank, message):
    with pytest.raises(ValueError, match=message):
        low_rank_svd(W, rank)


# Whitening ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[6], [2, 3], [3, 1, 4], [2, 2, 2, 2]])
def test_kronecker_factors_of_a_kronecker_product_are_its_own(sizes):
    G = kronecker([make_gram(size, size, decades=0.5) for size in sizes])
    factors = kronecker_factors(G, sizes)
    torch.testing.assert_close(kronecker(factors), G, rtol=1e-6, atol=1e-8)
    assert all(torch.linalg.eigvalsh(factor)[0] > 0 for factor in factors)


@pytest.mark.parametrize("sizes", [[3, 4], [2, 3, 2]])
def test_kronecker_factors_make_the_mean_over_the_other_sites_the_identity(sizes):
    for seed in range(5):
        G = make_gram(12, seed, decades=1)
        roots = [torch.linalg.cholesky(factor) for factor in kronecker_factors(G, sizes)]
        whitener = torch.linalg.inv(kronecker(roots))
        T = (whitener @ G @ whitener.T).reshape(*sizes, *sizes)
        for site, size in enumerate(sizes):
            left = [*range(len(sizes)), *(len(sizes) + at if at == site else at for at in range(len(sizes)))]
            mean = torch.einsum(T, left, [site, len(sizes) + site]) * size / 12
            torch.testing.assert_close(mean, torch.eye(size, dtype=torch.float64), rtol=0, atol=0.05)


def test_kronecker_factors_refuse_zeros():
    with pytest.raises(ValueError, match="a moment of zeros has no Kronecker factors"):
        kronecker_factors(torch.zeros(4, 4, dtype=torch.float64), [2, 2])


@few
@given(seeds, st.integers(1, 8))
def test_whitened_tt_svd_of_two_sites_is_optimal_for_a_kronecker_gram(seed, chi):
    d_out, d_in = [2, 3], [4, 3]
    factors = [make_gram(size, seed + size) for size in d_in]
    W, gram = normal(6, 12, seed=seed), kronecker(factors)
    error = output_error(W, contract(whitened_tt_svd(W, d_out, d_in, chi, Metric(gram))), gram)
    weighted = W @ kronecker([torch.linalg.cholesky(factor) for factor in factors])
    s = torch.linalg.svdvals(weighted.reshape(2, 3, 4, 3).transpose(1, 2).reshape(8, 9))
    assert error == pytest.approx(float(torch.linalg.norm(s[chi:]) / torch.linalg.norm(s)), abs=1e-8)


@few
@given(problems())
def test_whitened_tt_svd_is_exact_at_full_chi(problem):
    W, d_out, d_in, _, gram = problem
    assert rel_error(W, contract(whitened_tt_svd(W, d_out, d_in, 64, Metric(gram)))) < 1e-7


# L-BFGS over all cores ------------------------------------------------------------------------------------------------


def objective(W, cores, gram):
    E = W - contract(cores)
    return torch.sum((E @ gram) * E) / torch.sum((W @ gram) * W)


@few
@given(problems())
def test_improve_cores_never_raises_the_error_and_keeps_the_bonds(problem):
    W, d_out, d_in, chi, gram = problem
    start = tt_svd(W, d_out, d_in, chi)
    errors = [output_error(W, contract(start), gram)]
    for max_steps in (1, 2, 4, 8):
        cores = improve_cores(W, start, Metric(gram), max_steps=max_steps, tolerance=0)
        assert [core.shape for core in cores] == [core.shape for core in start]
        errors.append(output_error(W, contract(cores), gram))
    assert all(later <= earlier + 1e-7 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("with_sensitivity", [False, True])
@pytest.mark.parametrize(("d_out", "d_in", "chi"), [([3, 4], [4, 3], 3), ([2, 3, 2], [3, 2, 2], 3)])
def test_improve_cores_ends_where_no_core_has_a_gradient(d_out, d_in, chi, with_sensitivity):
    """Autograd of the objective is the oracle."""
    W, gram = normal(12, 12, seed=0), make_gram(12, 1, decades=0.5)
    sensitivity = make_gram(12, 2, decades=0.5) if with_sensitivity else torch.eye(12, dtype=torch.float64)
    metric = Metric(gram, sensitivity)
    start = tt_svd(W, d_out, d_in, chi)
    cores = improve_cores(W, start, metric, max_steps=1000, tolerance=0)
    assert metric.error(W, contract(cores)) < 0.97 * metric.error(W, contract(start))

    def slopes(cores):
        cores = [core.clone().requires_grad_() for core in cores]
        E = W - contract(cores)
        return torch.autograd.grad(torch.sum((sensitivity @ E @ gram) * E), cores)

    largest = max(float(slope.norm()) for slope in slopes(start))
    assert max(float(slope.norm()) for slope in slopes(cores)) < 1e-4 * largest


def test_improve_cores_finds_the_best_of_low_rank():
    """A split with whole sides is low rank, and the truncated SVD of the outputs is the oracle."""
    x = normal(40, 6, seed=3)
    W = normal(4, 6, seed=0)
    cores = [normal(1, 4, 1, 2, seed=1), normal(2, 1, 6, 1, seed=2)]  # W = A B with A (4, 2), B (2, 6)
    fitted = improve_cores(W, cores, Metric(x.T @ x / 40), max_steps=1000, tolerance=0)
    s = torch.linalg.svdvals(x @ W.T)
    best = torch.linalg.norm(s[2:]) / torch.linalg.norm(s)
    assert output_error(W, contract(fitted), x.T @ x) == pytest.approx(float(best), rel=1e-6)


@pytest.mark.parametrize("n_sites", [1, 2, 3])
def test_improve_cores_recovers_a_chain_from_a_distance(n_sites):
    d_out, d_in = [3, 2, 2][:n_sites], [2, 3, 2][:n_sites]
    bonds = clip_bonds(2, d_out, d_in)
    shapes = list(zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True))
    cores = [normal(*shape, seed=site) for site, shape in enumerate(shapes)]
    W, gram = contract(cores), make_gram(math.prod(d_in), 7, decades=0)
    far = [core + 0.3 * normal(*core.shape, seed=9) for core in cores]
    before = output_error(W, contract(far), gram)
    fitted = improve_cores(W, far, Metric(gram), max_steps=1000, tolerance=0)
    assert before > 0.1
    assert rel_error(W, contract(fitted)) < 1e-3 * before


def of_a_mean(size, spread):
    """E[x xᵀ] of inputs near one vector, with the ridge that calibration adds."""
    mean = normal(size, seed=1)
    gram = torch.outer(mean, mean) + spread**2 * make_gram(size, 2, decades=0)
    return gram + 1e-6 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("spread", [0, 1e-3])
@pytest.mark.parametrize("n_sites", [3, 4, 5, 6])
def test_improve_cores_holds_for_inputs_near_one_direction(n_sites, spread):
    """Where every factor of the whitener is nearly singular, and their product far beyond what float64 can undo."""
    d_in, d_out = [4, 4, 2, 2, 2, 2][:n_sites], [2] * n_sites
    W, gram = normal(2**n_sites, math.prod(d_in), seed=0), of_a_mean(math.prod(d_in), spread)
    start = tt_svd(W, d_out, d_in, 3)
    cores = improve_cores(W, start, Metric(gram), tolerance=0)
    assert output_error(W, contract(cores), gram) < 0.1 * output_error(W, contract(start), gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fits_rounded_to_low_precision_are_never_worse_than_their_starts(dtype):
    d_in, d_out = [4, 4, 4], [2, 2, 2]
    gram = of_a_mean(64, 0)
    for seed in range(3):
        W = normal(8, 64, seed=seed).to(dtype)

        def error_of(cores, W=W):
            return output_error(W, contract([core.double() for core in cores]), gram)

        # At full bonds TT-SVD is as good as the dtype allows, and a fit can only lose.
        for chi in (3, 64):
            start = tt_svd(W, d_out, d_in, chi)
            assert error_of(improve_cores(W, start, Metric(gram))) <= error_of(start)
            fits = [fit_cores(W, d_out, d_in, chi=chi, metric=Metric(gram), method=method) for method in FIT_METHODS]
            assert error_of(fits[2]) <= error_of(fits[1])


def test_improve_cores_stops_on_tolerance():
    W, gram = normal(12, 12, seed=0), make_gram(12, 1)
    start = tt_svd(W, [3, 4], [4, 3], 2)
    errors = [
        output_error(W, contract(improve_cores(W, start, Metric(gram), tolerance=tolerance)), gram)
        for tolerance in (0.5, 1e-2, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    unchanged = improve_cores(W, start, Metric(gram), max_steps=0)
    torch.testing.assert_close(contract(unchanged), contract(start))


def test_improve_cores_leaves_what_the_inputs_never_show():
    """A column that no input reaches neither disturbs the fit nor becomes infinite."""
    W, gram = normal(6, 6, seed=0), make_gram(6, 1)
    gram[:, 2] = gram[2] = 0
    start = tt_svd(W, [2, 3], [3, 2], 2)
    cores = improve_cores(W, start, Metric(gram), tolerance=0)
    assert output_error(W, contract(cores), gram) < output_error(W, contract(start), gram)
    assert all(torch.isfinite(core).all() for core in cores)
    assert contract(cores).abs().max() < 100 * W.abs().max()


def test_improve_cores_leaves_a_start_of_zeros():
    W, gram = normal(6, 6, seed=0), make_gram(6, 1)
    fitted = improve_cores(W, [torch.zeros(1, 2, 3, 2), torch.zeros(2, 3, 2, 1)], Metric(gram))
    assert output_error(W, contract(fitted).double(), gram) < 0.9


def test_improve_cores_refuses():
    W, gram = normal(6, 6, seed=0), make_gram(6, 1)
    start = tt_svd(W, [2, 3], [3, 2], 2)
    with pytest.raises(ValueError, match="must not be negative, but got max_steps=-1"):
        improve_cores(W, start, Metric(gram), max_steps=-1)
    with pytest.raises(ValueError, match=r"`prod\(d_out\) == out_features` must hold"):
        improve_cores(W[:5], start, Metric(gram))
    with pytest.raises(ValueError, match=r"`gram` must have shape \(6, 6\)"):
        improve_cores(W, start, Metric(gram[:5, :5]))
    with pytest.raises(ValueError, match=r"`W` must be finite .* 36 entries"):
        improve_cores(W / 0, start, Metric(gram))


# All of it ------------------------------------------------------------------------------------------------------------


@few
@given(problems(), st.sampled_from([0, 2]))
def test_fit_cores_by_lbfgs_is_never_worse_than_whitened(problem, max_steps):
    W, d_out, d_in, chi, gram = problem
    how = {"chi": chi, "metric": Metric(gram), "max_steps": max_steps}
    whitened, fitted = (
        output_error(W, contract(fit_cores(W, d_out, d_in, method=method, **how)), gram)
        for method in ("whitened", "lbfgs")
    )
    assert fitted <= whitened + 1e-7


def test_fit_cores_by_lbfgs_is_far_better_on_a_gram_without_structure():
    W, gram = normal(64, 64, seed=0), make_gram(64, 1)
    errors = [
        output_error(W, contract(fit_cores(W, [8, 8], [8, 8], chi=10, metric=Metric(gram), method=method)), gram)
        for method in ("tt_svd", "whitened", "lbfgs")
    ]
    assert errors[2] < 0.8 * min(errors[:2])


def test_fit_cores_defaults_to_tt_svd_without_a_gram_and_to_lbfgs_with_one():
    W, gram = normal(6, 6, seed=0), make_gram(6, 1)
    for ours, theirs in zip(fit_cores(W, [2, 3], [3, 2], chi=2), tt_svd(W, [2, 3], [3, 2], 2), strict=True):
        assert torch.equal(ours, theirs)
    default, by_lbfgs = (
        fit_cores(W, [2, 3], [3, 2], bonds=(1, 2, 1), metric=Metric(gram), method=method) for method in (None, "lbfgs")
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(default, by_lbfgs, strict=True))


@pytest.mark.parametrize("method", FIT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_cores_keeps_the_dtype_and_takes_a_cap_per_bond(method, dtype):
    W, gram = normal(8, 8, seed=0).to(dtype), make_gram(8, 1)
    cores = fit_cores(W, [2, 2, 2], [2, 2, 2], bonds=(1, 2, 3, 1), metric=Metric(gram), method=method)
    assert {core.dtype for core in cores} == {dtype}
    assert [core.shape[3] for core in cores] == [2, 3, 1]


@pytest.mark.parametrize("method", ["whitened", "lbfgs"])
def test_fit_cores_under_a_gram_have_equal_norms(method):
    cores = fit_cores(normal(8, 8, seed=0), [2, 2, 2], [2, 2, 2], chi=3, metric=Metric(make_gram(8, 1)), method=method)
    norms = torch.stack([torch.linalg.norm(core) for core in cores])
    torch.testing.assert_close(norms, norms.mean().expand(3))


@pytest.mark.parametrize("method", FIT_METHODS)
def test_fit_cores_pads_with_rows_and_columns_that_do_not_count(method):
    W, gram = normal(5, 7, seed=0), make_gram(7, 1)
    W_hat = contract(fit_cores(W, [2, 3], [2, 4], chi=64, metric=Metric(gram), method=method))
    assert W_hat.shape == (6, 8)
    assert output_error(W, W_hat[:5, :7], gram) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `chi` and `bonds` must be given, but got chi=None, bonds=None"),
        ({"chi": 2, "bonds": (1, 2, 1)}, "exactly one of `chi` and `bonds`"),
        ({"chi": 2, "method": "best"}, "`method` must be one of tt_svd, whitened, lbfgs, but got 'best'"),
        ({"chi": 2, "method": "lbfgs"}, "`method` 'lbfgs' needs a metric other than the Frobenius norm"),
        ({"chi": 2, "metric": Metric(torch.eye(5))}, r"`gram` must have shape \(6, 6\), but got \(5, 5\)"),
        ({"chi": 0}, "`chi >= 1` must hold"),
    ],
)
def test_fit_cores_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fit_cores(normal(6, 6, seed=0), [2, 3], [3, 2], **options)


def test_a_gram_with_a_negative_eigenvalue_is_refused_and_rounding_is_not():
    W = normal(2, 2, seed=0)
    with pytest.raises(ValueError, match="`gram` must be positive semi-definite"):
        output_error(W, W, torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    x = normal(300, 2, seed=1).float() @ normal(2, 64, seed=2).float()
    gram = x.T @ x
    assert float(torch.linalg.eigvalsh(gram.double())[0]) < 0
    W = normal(64, 64, seed=3)
    assert output_error(W, W, gram) == 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("method", FIT_METHODS)
def test_the_scale_of_a_gram_changes_nothing(method, scale):
    W, gram = normal(6, 6, seed=0), make_gram(6, 1)
    both = [
        contract(fit_cores(W, [2, 3], [3, 2], chi=2, metric=Metric(G), method=method)) for G in (gram, scale * gram)
    ]
    torch.testing.assert_close(*both)
    assert output_error(W, both[0], scale * gram) == pytest.approx(output_error(W, both[0], gram))
    torch.testing.assert_close(*[torch.matmul(*low_rank_svd(W, 2, Metric(G))) for G in (gram, scale * gram)])


def test_fit_cores_refuses_sizes_below_the_matrix():
    with pytest.raises(ValueError, match=r"`prod\(d_out\) == out_features` must hold, but got d_out=\[2, 2\]"):
        fit_cores(normal(6, 6, seed=0), [2, 2], [3, 2], chi=1)


@pytest.mark.parametrize("which", ["gram", "sensitivity"])
@pytest.mark.parametrize("chi", [2, 4])
def test_padding_does_not_count_if_one_moment_is_absent(which, chi):
    """As with an identity in its place, which then gets the zeros too."""
    W = normal(13, 11, seed=0)
    one = {which: make_gram(11 if which == "gram" else 13, 1)}
    both = {"gram": torch.eye(11), "sensitivity": torch.eye(13), **one}
    errors = []
    for moments in (one, both):
        metric = Metric(**moments)
        cores = fit_cores(W, [4, 4], [3, 4], chi=chi, metric=metric, max_steps=1000, tolerance=0)
        errors.append(metric.error(W, contract(cores)[:13, :11]))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_singular_diagonal_sensitivity_gives_finite_factors():
    metric = Metric(None, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    A, B = low_rank_svd(torch.eye(4), 2, metric)
    assert metric.error(torch.eye(4), A @ B) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fit_cores_of_zeros_are_finite(dtype):
    vector = normal(8, seed=1)
    metric = Metric(make_gram(8, 0), torch.outer(vector, vector))
    cores = fit_cores(torch.zeros(8, 8, dtype=dtype), [2, 2, 2], [2, 2, 2], chi=3, metric=metric)
    assert all(torch.isfinite(core).all() for core in cores)
    assert not contract(cores).any()


@pytest.mark.parametrize("max_steps", [-1, 2.5])
def test_steps_that_are_refused(max_steps):
    W, metric = normal(6, 6, seed=0), Metric(make_gram(6, 1))
    for fit in (
        lambda: fit_cores(W, [2, 3], [3, 2], chi=2, max_steps=max_steps),
        lambda: MonarchLinear.from_matrix(W, rank=1, n_blocks=2, metric=metric, max_steps=max_steps),
    ):
        with pytest.raises(ValueError, match="`max_steps`"):
            fit()


# One shared row space -------------------------------------------------------------------------------------------------

SHARED = [
    ([6, 1], [2, 6]),
    ([1, 6], [6, 2]),
    ([2, 3], [12, 1]),
    ([3, 2], [1, 12]),
    ([6, 1], [4, 3]),
    ([6, 1], [1, 12]),
]


@pytest.mark.parametrize(("d_out", "d_in"), SHARED)
@pytest.mark.parametrize("with_sensitivity", [False, True])
def test_a_shared_space_ends_where_no_core_has_a_gradient(d_out, d_in, with_sensitivity):
    """Autograd of the objective is the oracle; and the joint descent of all cores finds nothing better from there."""
    W, gram = normal(6, 12, seed=0), make_gram(12, 1, decades=0.5)
    metric = Metric(gram, make_gram(6, 2, decades=0.5) if with_sensitivity else None)
    space = SharedSpace.of(W, metric, d_out, d_in)
    cores = fit_cores(W, d_out, d_in, chi=2, metric=metric, max_steps=4000, tolerance=0)
    leaves = [core.clone().requires_grad_() for core in cores]
    E = W - contract(leaves)
    slopes = torch.autograd.grad(torch.sum(metric.gradient(E) * E), leaves)
    assert max(float(slope.norm()) for slope in slopes) < 1e-4 * metric.norm(W) ** 2
    error = metric.error(W, contract(cores))
    assert space.error(2, 4000, 0) == pytest.approx(error, rel=1e-6)
    joint = improve_cores(W, cores, metric, max_steps=1000, tolerance=0)
    assert metric.error(W, contract(joint)) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("d_out", "d_in"), SHARED)
def test_the_errors_of_a_shared_space_never_rise_with_steps_or_size(d_out, d_in):
    W, metric = normal(6, 12, seed=0), Metric(make_gram(12, 1), make_gram(6, 2))
    space = SharedSpace.of(W, metric, d_out, d_in)
    by_steps = [space.error(2, steps, 0) for steps in (0, 4, 8, 40)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(by_steps))
    tail = space.squared_tail()
    assert all(later <= earlier for earlier, later in pairwise(tail))
    assert (tail[0], tail[-1]) == (pytest.approx(1), 0)
    assert space.error(len(tail) - 1, 0, 0) < 1e-6  # all of W


@pytest.mark.parametrize("n_samples", [96, 400])
@pytest.mark.parametrize("dead", [slice(0, 0), slice(0, 64), slice(0, None, 3)], ids=["none", "a block", "a third"])
@pytest.mark.parametrize("chi", [4, 8, 16])
def test_a_shared_space_is_as_near_as_the_joint_descent_if_inputs_are_zero(dead, chi, n_samples):
    """W is nearly of rank 8; the inputs span a subspace, or some are always zero."""
    W = (normal(48, 8, seed=0) @ normal(8, 192, seed=1) + 0.03 * normal(48, 192, seed=2)).float()
    x = (normal(n_samples, 192, seed=3) * torch.logspace(0, -2, 192)) @ torch.linalg.qr(normal(192, 192, seed=4))[0]
    x[:, dead] = 0
    metric, sizes = Metric(x.T @ x), ([48, 1], [2, 96])
    start = [core.float() for core in balance_cores(whitened_tt_svd(W.double(), *sizes, chi, metric))]
    joint = metric.error(W, contract(improve_cores(W, start, metric)))
    assert metric.error(W, contract(fit_cores(W, *sizes, chi=chi, metric=metric))) < 1.1 * joint


@pytest.mark.parametrize("scale", [1e-57, 1e57])
@pytest.mark.parametrize(("d_out", "d_in"), SHARED[:4])
def test_the_scale_of_a_metric_does_not_change_a_shared_space(d_out, d_in, scale):
    W, gram, sensitivity = normal(6, 12, seed=0), make_gram(12, 1), make_gram(6, 2)
    spaces = [SharedSpace(W, Metric(s * gram, s * sensitivity), d_out, d_in) for s in (1.0, scale)]
    assert spaces[1].error(2, 100, 1e-3) == pytest.approx(spaces[0].error(2, 100, 1e-3), rel=1e-6)
    torch.testing.assert_close(*[contract(space.cores(2, 100, 1e-3)) for space in spaces])


def test_a_shared_space_of_all_of_a_weight_is_exact():
    """The equations for A are ill-conditioned here: three inputs are a hundred times larger."""
    x = normal(400, 96, seed=1) * torch.logspace(0, -2, 96)
    x[:, :3] *= 100
    W, metric = normal(48, 96, seed=0).float(), Metric(x.T @ x)
    assert metric.error(W, contract(fit_cores(W, [48, 1], [48, 2], chi=2, metric=metric))) < 1e-5


def test_a_shared_space_is_kept_for_one_weight_alone():
    W, metric = normal(6, 12, seed=0), Metric(make_gram(12, 1))
    first = SharedSpace.of(W, metric, [6, 1], [2, 6])
    assert SharedSpace.of(W.clone(), metric, [6, 1], [2, 6]) is first
    assert SharedSpace.of(2 * W, metric, [6, 1], [2, 6]) is not first
    assert SharedSpace.of(W.float(), metric, [6, 1], [2, 6]) is not first


def test_a_shared_space_in_float32_resolves_small_errors():
    """Errors are sums over the residual, not differences of squares."""
    W = normal(32, 4, seed=0) @ normal(4, 64, seed=1) + 1e-4 * normal(32, 64, seed=2)
    metric = Metric(make_gram(64, 1, decades=0.5))
    errors = []
    for dtype in (torch.float32, torch.float64):
        cores = fit_cores(W.to(dtype), [32, 1], [2, 32], chi=8, metric=metric, tolerance=1e-6)
        errors.append(metric.error(W.to(dtype), contract(cores)))
    assert errors[1] < 1e-3
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
