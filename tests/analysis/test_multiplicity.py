from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics.multiplicity import benjamini_hochberg, holm

P = st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.025, 0.04, 0.05, 0.3, 1.0]), min_size=1, max_size=8)


def test_holm_by_hand():
    # Sorted .01 .03 .04 → × 3, 2, 1 → .03 .06 .04 → no lower than the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.4, 0.9]).tolist() == [1, 1, 1]


def test_benjamini_hochberg_by_hand():
    # Sorted .01 .03 .04 .2 → × 4/1, 4/2, 4/3, 4/4 → .04 .06 .0533 .2 → the lowest from there on.
    assert benjamini_hochberg([0.2, 0.04, 0.01, 0.03]) == pytest.approx([0.2, 0.04 * 4 / 3, 0.04, 0.04 * 4 / 3])


@given(P, st.sampled_from([0.01, 0.05, 0.1]))
def test_holm_rejects_as_its_steps_do(p, level):
    rejected = np.zeros(len(p), dtype=bool)
    for step, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] > level / (len(p) - step) * (1 + 1e-12):
            break
        rejected[index] = True
    assert (holm(p) <= level * (1 + 1e-9)).tolist() == rejected.tolist()


@given(P)
def test_benjamini_hochberg_matches_scipy(p):
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
@given(p=P)
def test_adjusted_values_keep_the_order_and_are_no_smaller(adjust, p):
    adjusted = adjust(p)
    assert (adjusted >= np.array(p) - 1e-15).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_nan_stays_nan_and_is_not_counted(adjust):
    nan = np.nan
    adjusted = adjust([nan, 0.04, nan, 0.01, 0.03])
    assert np.isnan(adjusted).tolist() == [True, False, True, False, False]
    assert adjusted[[1, 3, 4]].tolist() == adjust([0.04, 0.01, 0.03]).tolist()
    assert np.isnan(adjust([nan, nan])).all()
    assert adjust([]).size == 0


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_families_lie_along_the_last_axis(adjust):
    families = np.random.default_rng(5).uniform(size=(3, 2, 6))
    families[1, 1, 2:4] = np.nan
    expected = [[adjust(family) for family in row] for row in families]
    np.testing.assert_array_equal(adjust(families), expected)


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
@pytest.mark.parametrize("p", [[0.1, 1.1], [-0.1, np.nan]])
def test_values_that_are_no_probabilities_are_refused(adjust, p):
    with pytest.raises(ValueError, match="`0 <= p <= 1` must hold, but got p from"):
        adjust(p)


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_a_single_number_is_refused(adjust):
    with pytest.raises(ValueError, match="axis of tests"):
        adjust(0.1)
