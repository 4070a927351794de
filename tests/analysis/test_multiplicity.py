from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.statistics.multiplicity import holm

P = st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.025, 0.04, 0.05, 0.3, 1.0]), min_size=1, max_size=8)


def test_holm_by_hand():
    # Sorted .01 .03 .04 → × 3, 2, 1 → .03 .06 .04 → no lower than the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.4, 0.9]).tolist() == [1, 1, 1]


@given(P, st.sampled_from([0.01, 0.05, 0.1]))
def test_holm_rejects_as_its_steps_do(p, level):
    rejected = np.zeros(len(p), dtype=bool)
    for step, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] > level / (len(p) - step) * (1 + 1e-12):
            break
        rejected[index] = True
    assert (holm(p) <= level * (1 + 1e-9)).tolist() == rejected.tolist()


@given(P)
def test_adjusted_values_keep_the_order_and_are_no_smaller(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_families_lie_along_the_last_axis():
    families = np.random.default_rng(5).uniform(size=(3, 2, 6))
    np.testing.assert_array_equal(holm(families), [[holm(family) for family in row] for row in families])
