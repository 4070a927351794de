"""Which classes are kinds of layer."""

from __future__ import annotations

import pytest
from own_kinds import OWN_KINDS

import mpo_core


def test_the_kinds_of_this_package_are_listed():
    assert set(OWN_KINDS) >= {"mpo", "low_rank", "monarch", "pruned"}
    assert "StructuredLinear" not in mpo_core.kinds()


def test_a_class_with_abstract_methods_is_not_a_kind_but_its_complete_subclass_is():
    class HalfMade(mpo_core.StructuredLinear, kind="half_made"):
        def structure(self):
            return "half made"

    class Whole(HalfMade, mpo_core.LowRankLinear, kind="whole"):
        pass

    assert "half_made" not in mpo_core.kinds()
    with pytest.raises(ValueError, match=r"HalfMade is not a kind of layer yet: it does not define to_matrix, .*draw"):
        mpo_core.kind_called("half_made")
    assert mpo_core.kinds()["whole"] is mpo_core.kind_called("whole") is Whole
