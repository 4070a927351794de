from __future__ import annotations

import numpy as np
import pytest
from least_squares import anova_residual

from analysis.statistics.ranking import rank_agreement, rank_intervals, reliability

# rank_agreement -------------------------------------------------------------------------------------------------------


def test_rank_agreement_by_hand():
    # Of three pairs of configurations the second seed reverses one, the third all.
    assert rank_agreement([[1, 2, 9], [2, 1, 8], [3, 3, 7]]) == pytest.approx(-1 / 3)
    assert np.isnan(rank_agreement([[1], [2]]))
    assert np.isnan(rank_agreement([[1, 2], [1, 3]]))


# rank_intervals -------------------------------------------------------------------------------------------------------


def test_rank_intervals_of_configurations_far_apart_are_their_ranks():
    values = np.array([[30.0], [10.0], [20.0]]) + np.random.default_rng(6).normal(size=(3, 5))
    for direction, ranks in (("minimize", [3, 1, 2]), ("maximize", [1, 3, 2])):
        result = rank_intervals(values, direction, np.random.default_rng(0))
        assert result.rank.tolist() == result.low.tolist() == result.high.tolist() == ranks


def test_rank_intervals_match_the_normal_probability_of_two_configurations():
    """The worse of two is drawn first with probability Φ(−Δ/√(2 s²_res/n)); the limits turn where that is 2.5 %."""
    noise = np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    error = np.sqrt(2 * anova_residual(noise) / 3)
    for z, high in ((1.8, 2), (2.1, 1)):
        values = noise + np.array([[0], [z * error]])
        result = rank_intervals(values, "minimize", np.random.default_rng(1), n_draws=40_000)
        assert result.low.tolist() == [1, 3 - high]
        assert result.high.tolist() == [high, 2]


def test_rank_intervals_ignore_what_seeds_share():
    rng = np.random.default_rng(7)
    values = rng.normal(size=(6, 4))
    plain, shifted = (
        rank_intervals(values + shared, "minimize", np.random.default_rng(0))
        for shared in (0, 100 * rng.normal(size=4))
    )
    assert plain.low.tolist() == shifted.low.tolist()
    assert plain.high.tolist() == shifted.high.tolist()
    assert (plain.high > plain.low).any()


def test_rank_intervals_below_three_seeds_are_nan():
    result = rank_intervals([[1, 2], [3, 5], [1, 2]], "minimize", np.random.default_rng(0))
    assert result.rank.tolist() == [1.5, 3, 1.5]
    assert np.isnan([result.low, result.high]).all()
    assert np.isnan(rank_intervals([[1, 2, 3]], "minimize", np.random.default_rng(0)).low).all()


def test_rank_intervals_refuse_more_than_a_table():
    with pytest.raises(ValueError, match=r"must be \(configurations, seeds\), but its shape is \(2, 2, 3\)"):
        rank_intervals(np.ones((2, 2, 3)), "minimize", np.random.default_rng(0))


# reliability ----------------------------------------------------------------------------------------------------------


def test_reliability_is_cronbachs_alpha():
    values = np.random.default_rng(8).normal(size=(6, 4)) + 2 * np.arange(6)[:, None]
    n = values.shape[1]
    alpha = n / (n - 1) * (1 - values.var(axis=0, ddof=1).sum() / values.sum(axis=1).var(ddof=1))
    assert reliability(values) == pytest.approx(alpha)


def test_reliability_has_no_negative_variance():
    # Means that are all equal, with noise in each.
    assert reliability([[1, 2, 3], [3, 2, 1], [2, 3, 1]]) == 0


def test_reliability_without_spread_noise_or_replicates():
    assert reliability([[1, 1, 1], [2, 2, 2]]) == 1
    assert np.isnan(reliability([[1, 1, 1], [1, 1, 1]]))
    assert np.isnan(reliability([[1], [2]]))
    assert np.isnan(reliability([[1, 2, 3]]))
