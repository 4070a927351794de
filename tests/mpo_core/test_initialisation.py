"""What each init claims of the matrix of its cores, and where random numbers come from."""

from __future__ import annotations

import math

import pytest
import torch
from chains import few, random_cores, splits
from hypothesis import given
from hypothesis import strategies as st

from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.algebra import contract, tt_svd
from mpo_core.tensor_train.bonds import clip_bonds
from mpo_core.tensor_train.factorisation import factorise
from mpo_core.tensor_train.initialisation import (
    INITS,
    init_cores_,
    normal_,
    normal_cores_,
    paper_std,
    spectral_norm,
    variance_std,
)


def generators(n_sites, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + site) for site in range(n_sites)]


def empty_cores(split, chi, dtype=torch.float64):
    bonds = clip_bonds(chi, *split)
    return [torch.full(shape, math.nan, dtype=dtype) for shape in zip(bonds[:-1], *split, bonds[1:], strict=True)]


def fresh_cores(split, chi, init, *, seed=0, dtype=torch.float64, out_features=None, in_features=None):
    cores = empty_cores(split, chi, dtype)
    init_cores_(
        cores,
        init,
        generators(len(cores), seed),
        out_features=out_features or math.prod(split[0]),
        in_features=in_features or math.prod(split[1]),
        chi=chi,
    )
    return cores


def mean_square_times_n_in(out_features, in_features, *, n_sites, chi, init, n_draws):
    """Mean of W² · N_in over independent draws of the cores, and its standard error."""
    split = factorise(out_features, in_features, method="balanced", n_sites=n_sites)
    draws = [
        contract(fresh_cores(split, chi, init, seed=seed)).square().mean() * in_features for seed in range(n_draws)
    ]
    values = torch.stack(draws)
    return float(values.mean()), float(values.std()) / math.sqrt(n_draws)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4])
def test_variance_init_gives_one_over_n_in(n_sites):
    """Tolerance: four standard errors of the Monte Carlo mean, itself required to be below 3 %."""
    mean, error = mean_square_times_n_in(32, 64, n_sites=n_sites, chi=12, init="variance", n_draws=2000)
    assert error < 0.03
    assert abs(mean - 1) < 4 * error


def test_variance_init_draws_no_scale_for_all_of_the_matrix():
    """Cores of a single entry, which `min_params` gives where two sites are cheapest, are 1."""
    cores = fresh_cores(([1, 8, 1, 8], [1, 8, 1, 8]), 18, "variance")
    assert [core.numel() for core in cores] == [1, 64 * 18, 18 * 18, 64 * 18]
    assert cores[0].item() == 1
    squares = [contract(fresh_cores(([1, 8, 8], [1, 8, 8]), 18, "variance", seed=seed)).square() for seed in range(20)]
    # Of a matrix at χ = 18 the mean square has a relative standard error of 7 %, with a random scale of 140 %.
    assert all(64 * float(square.mean()) == pytest.approx(1, abs=0.35) for square in squares)


@pytest.mark.parametrize(("out_features", "in_features"), [(512, 128), (128, 512)])
def test_paper_init_at_three_sites_is_low_by_the_fourth_root_of_n_in(out_features, in_features):
    """Same tolerance, on the variance, which is low by the square root."""
    mean, error = mean_square_times_n_in(out_features, in_features, n_sites=3, chi=4, init="paper", n_draws=300)
    expected = in_features**-0.5
    assert error < 0.03 * expected
    assert abs(mean - expected) < 4 * error


def test_paper_init_is_the_variance_init_at_two_unclipped_sites():
    assert paper_std(128, 8, 2) == pytest.approx(variance_std(128, (1, 8, 1)))
    assert paper_std(128, 8, 3) < variance_std(128, (1, 8, 8, 1))


def test_paper_init_uses_chi_as_asked_for():
    """χ = 300 is clipped to 128, and the paper's standard deviation takes no notice."""
    cores = fresh_cores(((8, 16), (16, 8)), 300, "paper")
    assert cores[0].shape[3] == 128
    entries = torch.cat([core.flatten() for core in cores])
    assert float(entries.std()) == pytest.approx(128**-0.25 * 300**-0.25, rel=0.02)


@pytest.mark.parametrize(("init", "std"), [("paper", paper_std(12, 5, 2)), ("variance", variance_std(12, (1, 5, 1)))])
def test_normal_inits_draw_core_l_from_generator_l(init, std):
    cores = fresh_cores(([3, 4], [2, 6]), 5, init)
    expected = [torch.empty_like(core) for core in cores]
    normal_cores_(expected, std, generators(2))
    assert all(torch.equal(core, other) for core, other in zip(cores, expected, strict=True))


@few
@given(splits(), st.integers(1, 20), st.integers(0, 1000))
def test_orthogonal_init_is_orthogonal_balanced_and_has_the_norm_of_variance_one_over_n_in(split, chi, seed):
    cores = fresh_cores(split, chi, "orthogonal", seed=seed)
    out_features = math.prod(split[0])
    torch.testing.assert_close(contract(cores).square().sum(), torch.tensor(float(out_features), dtype=torch.float64))
    norms = torch.stack([torch.linalg.norm(core) for core in cores])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    *first, last = cores
    for M in [*[core.reshape(-1, core.shape[3]) for core in first], last.reshape(last.shape[0], -1).T]:
        identity = torch.eye(M.shape[1], dtype=M.dtype)
        torch.testing.assert_close(M.T @ M, identity * M.square().sum() / M.shape[1])


@pytest.mark.slow
def test_orthogonal_init_is_haar_random():
    """The first core has the moments of a Haar-random 6×2 frame: E[q] = 0, E[q²] = 1/6, E[q_11² q_12²] = 1/48.

    QR's own sign convention makes the first moment of the diagonal -E|q|, which Householder's leaves at about -0.3.
    """
    split, n_draws = ([3, 2], [2, 3]), 4000
    frames = []
    for seed in range(n_draws):
        first = fresh_cores(split, 2, "orthogonal", seed=seed)[0].reshape(6, 2)
        frames.append(first / torch.linalg.norm(first[:, 0]))
    Q = torch.stack(frames)
    for values, expected in (
        (Q[:, 0, 0], 0),
        (Q[:, 1, 1], 0),
        (Q[:, 0, 0] ** 2, 1 / 6),
        (Q[:, 5, 1] ** 2, 1 / 6),
        (Q[:, 0, 0] ** 2 * Q[:, 0, 1] ** 2, 1 / 48),
        (Q[:, 0, 0] * Q[:, 1, 1], 0),
    ):
        error = float(values.std()) / math.sqrt(n_draws)
        assert abs(float(values.mean()) - expected) < 4.5 * error


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4])
@pytest.mark.parametrize(("out_features", "in_features"), [(36, 16), (16, 36), (7, 30)])
def test_spectral_init_sets_the_spectral_norm(out_features, in_features, n_sites):
    split = factorise(out_features, in_features, method="balanced", n_sites=n_sites)
    for seed in range(3):
        cores = fresh_cores(split, 4, "spectral", seed=seed)
        norm = float(torch.linalg.matrix_norm(contract(cores), 2))
        assert norm == pytest.approx(math.sqrt(out_features / in_features), rel=1e-4)


def test_spectral_init_scales_normal_cores_by_one_factor():
    cores = fresh_cores(([4, 3], [2, 8]), 3, "spectral")
    drawn = [torch.empty_like(core) for core in cores]
    normal_cores_(drawn, 1.0, generators(2))
    factors = torch.cat([(core / other).flatten() for core, other in zip(cores, drawn, strict=True)])
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))


def test_inits_with_padding_aim_at_the_true_sizes():
    """10×12 for a 9×11 matrix: its norms are those of the slice that is used."""
    split, true = ([2, 5], [4, 3]), {"out_features": 9, "in_features": 11}
    W = contract(fresh_cores(split, 3, "spectral", **true))[:9, :11]
    assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(math.sqrt(9 / 11), rel=1e-4)
    W = contract(fresh_cores(split, 3, "orthogonal", **true))
    assert float(W.square().mean()) == pytest.approx(1 / 11)
    squares = torch.stack([contract(fresh_cores(split, 3, "variance", seed=s, **true)).square() for s in range(2000)])
    assert float(squares.mean()) == pytest.approx(1 / 11, rel=0.1)
    with pytest.raises(ValueError, match=r"cores of a 10×12 matrix are too small for out_features=11, in_features=11"):
        fresh_cores(split, 3, "variance", out_features=11, in_features=11)


@few
@given(splits(), st.integers(1, 6), st.integers(0, 1000))
def test_tt_svd_fresh_is_the_tt_svd_of_a_dense_draw(split, chi, seed):
    cores = fresh_cores(split, chi, "tt_svd_fresh", seed=seed)
    W = torch.empty(math.prod(split[0]), math.prod(split[1]), dtype=torch.float64)
    normal_(W, W.shape[1] ** -0.5, torch.Generator().manual_seed(1000 * seed))
    expected = tt_svd(W, *split, chi)
    assert all(torch.equal(core, other) for core, other in zip(cores, expected, strict=True))


def test_tt_svd_fresh_at_full_chi_has_the_variance_of_its_draw():
    W = contract(fresh_cores(([8, 8, 4], [8, 4, 8]), 10_000, "tt_svd_fresh"))
    assert float(W.std()) == pytest.approx(W.shape[1] ** -0.5, rel=0.02)


@few
@given(splits(), st.integers(1, 5), st.integers(0, 1000), st.data())
def test_spectral_norm_matches_the_matrix_and_its_slices(split, chi, seed, data):
    cores = random_cores(clip_bonds(chi, *split), *split, seed)
    W = contract(cores)
    rows, columns = data.draw(st.integers(1, W.shape[0])), data.draw(st.integers(1, W.shape[1]))
    assert spectral_norm(cores) == pytest.approx(float(torch.linalg.matrix_norm(W, 2)), rel=1e-6)
    part = float(torch.linalg.matrix_norm(W[:rows, :columns], 2))
    assert spectral_norm(cores, rows, columns) == pytest.approx(part, rel=1e-6, abs=1e-12)


def test_spectral_norm_of_zero_is_zero_and_too_few_iterations_are_an_error():
    assert spectral_norm([torch.zeros(1, 3, 4, 1)]) == 0
    with pytest.raises(RuntimeError, match="did not reach tolerance=1e-06 in 2 iterations"):
        spectral_norm(random_cores((1, 4, 1), [4, 4], [4, 4], 0), max_iterations=2)


@pytest.mark.parametrize("init", INITS)
def test_fresh_inits_draw_from_their_generators_alone(init):
    before = torch.get_rng_state()
    one, same, other = (fresh_cores(([4, 3], [2, 6]), 3, init, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(core, again) for core, again in zip(one, same, strict=True))
    assert not any(torch.equal(core, new) for core, new in zip(one, other, strict=True))
    assert all(torch.isfinite(core).all() for core in one)


@pytest.mark.parametrize("init", INITS)
def test_fresh_inits_in_low_precision_round_those_of_float32(init):
    single, half = (fresh_cores(([4, 3], [2, 6]), 3, init, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {core.dtype for core in half} == {torch.bfloat16}
    assert all(torch.equal(core.bfloat16(), low) for core, low in zip(single, half, strict=True))


@pytest.mark.parametrize("init", INITS)
def test_mpo_linear_takes_every_fresh_init(init):
    layer = MPOLinear(18, 12, chi=3, init=init, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer.init_cores(init, generators(2))
    expected = fresh_cores((layer.d_out, layer.d_in), 3, init)
    assert all(torch.equal(core, other) for core, other in zip(layer.cores, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "tt_svd"}, "must be one of paper, variance, .*, but got 'tt_svd'"),
        ({"init": "paper", "chi": None}, "init 'paper' needs `chi`, the requested cap, but got None"),
        ({"generators": generators(1)}, "one generator per core must be given, but got 1 for 2 cores"),
    ],
)
def test_init_cores_says_what_is_missing(arguments, message):
    defaults = {"init": "variance", "generators": generators(2), "out_features": 6, "in_features": 6, "chi": 2}
    with pytest.raises(ValueError, match=message):
        init_cores_(empty_cores(([2, 3], [3, 2]), 2), **(defaults | arguments))


def test_init_cores_refuses_bonds_out_of_reach():
    cores = [torch.empty(1, 2, 2, 5), torch.empty(5, 2, 2, 1)]
    with pytest.raises(ValueError, match=r"within reach of its neighbours \(`clip_bonds`\), but got \[1, 5, 1\]"):
        init_cores_(cores, "orthogonal", generators(2), out_features=4, in_features=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_draws_the_numbers_of_its_generator(dtype):
    tensor = torch.empty(3, 4, dtype=dtype)
    normal_(tensor, 0.5, torch.Generator().manual_seed(7))
    drawn_in = torch.float64 if dtype is torch.float64 else torch.float32
    expected = 0.5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=drawn_in)
    assert torch.equal(tensor, expected.to(dtype))
