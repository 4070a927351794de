from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics.multiplicity import Graph, family, graphical, sequential

P = st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.025, 0.04, 0.05, 0.3, 1.0]), min_size=1, max_size=8)


def holm(p):
    """Holm's adjusted p values, step by step."""
    adjusted, largest = np.ones(len(p)), 0.0
    for step, index in enumerate(np.argsort(p, kind="stable")):
        largest = min(max(largest, (len(p) - step) * p[index]), 1.0)
        adjusted[index] = largest
    return adjusted


def of_single_tests(shares, passes):
    return Graph([[test] for test in range(len(shares))], [False] * len(shares), shares, passes)


def expanded(graph):
    """The shares and passes of a graph's single tests: of the groups, one by one."""
    shares = graph.shares_of_tests()
    passes = np.zeros((len(shares), len(shares)))
    for g, (tests, in_order) in enumerate(zip(graph.groups, graph.in_order, strict=True)):
        for test in tests:
            if in_order and test != tests[-1]:
                passes[test, tests[tests.index(test) + 1]] = 1
                continue
            for h, others in enumerate(graph.groups):
                to = others[:1] if graph.in_order[h] else [other for other in others if other != test]
                for other in to:
                    passes[test, other] += graph.passes[g, h] / len(to)
    return shares, passes


def without(shares, passes, kept):
    """The shares of the tests in `kept` after all others are removed from the graph, one by one."""
    shares, passes = np.array(shares), np.array(passes)
    for gone in set(range(len(shares))) - set(kept):
        new = passes.copy()
        for one in range(len(shares)):
            for other in range(len(shares)):
                back = passes[one, gone] * passes[gone, one]
                new[one, other] = (
                    (passes[one, other] + passes[one, gone] * passes[gone, other]) / (1 - back)
                    if one != other and back < 1 - 1e-12
                    else 0.0
                )
        shares = shares + shares[gone] * passes[gone]
        shares[gone], new[gone], new[:, gone] = 0.0, 0.0, 0.0
        passes = new
    return shares


def closed_test(p, shares, passes, level):
    """Which hypotheses the closed test rejects: all intersections that contain them, each by weighted Bonferroni."""
    everything = range(len(p))
    sets = [kept for n in range(1, len(p) + 1) for kept in combinations(everything, n)]
    rejected = {kept: any(p[i] <= level * without(shares, passes, kept)[i] for i in kept) for kept in sets}
    return [all(rejected[kept] for kept in sets if i in kept) for i in everything]


@pytest.mark.parametrize("seed", range(12))
def test_graph_rejects_as_its_closed_test_does(seed):
    rng = np.random.default_rng(seed)
    passes = rng.dirichlet(np.ones(5), size=5) * rng.uniform(0.5, 1, size=(5, 1))
    np.fill_diagonal(passes, 0)
    shares = rng.dirichlet(np.ones(5))
    for _ in range(20):
        p = rng.uniform(0, 0.1, size=5) ** rng.uniform(1, 2)
        found = graphical(p, of_single_tests(shares, passes), 0.05)
        assert (found.adjusted <= 0.05).tolist() == closed_test(p, shares, passes, 0.05)
        left = without(shares, passes, np.flatnonzero(found.adjusted > 0.05))
        assert found.shares == pytest.approx(left)


@given(P)
def test_equal_shares_that_pass_to_all_others_are_holm(p):
    m = len(p)
    single = of_single_tests(np.full(m, 1 / m), (1 - np.eye(m)) / max(m - 1, 1))
    assert graphical(p, single, 0.05).adjusted == pytest.approx(holm(p))
    group = Graph([list(range(m))], [False], np.ones(1), np.full((1, 1), float(m > 1)))
    assert graphical(p, group, 0.05).adjusted == pytest.approx(holm(p))


@pytest.mark.parametrize(
    ("n_sizes", "chains"), [([2], []), ([3], []), ([2, 1], [2]), ([2, 3], [1]), ([1, 1], [3, 1]), ([4], [2])]
)
def test_groups_decide_as_their_single_tests_do(n_sizes, chains):
    graph = family(n_sizes, chains).graph
    shares, passes = expanded(graph)
    rng = np.random.default_rng(0)
    for _ in range(8):
        p = rng.uniform(0, 0.1, size=len(shares)) ** rng.uniform(1, 2.5)
        found, single = graphical(p, graph, 0.05), graphical(p, of_single_tests(shares, passes), 0.05)
        assert found.adjusted == pytest.approx(single.adjusted, rel=1e-6)
        assert found.shares == pytest.approx(single.shares, abs=1e-9)
        assert (found.adjusted <= 0.05).tolist() == closed_test(p, shares, passes, 0.05)


def test_groups_with_any_passes_decide_as_their_single_tests_do():
    rng = np.random.default_rng(1)
    for _ in range(40):
        passes = rng.dirichlet(np.ones(4), size=4) * rng.uniform(0.5, 1, size=(4, 1))
        passes[0, 0] = passes[3, 3] = 0  # of one test, and of a sequence
        graph = Graph([[4], [0, 1, 2], [3, 5], [6, 7]], [False, False, False, True], rng.dirichlet(np.ones(4)), passes)
        p = rng.uniform(0, 0.1, size=8) ** rng.uniform(1, 2.5)
        found, single = graphical(p, graph, 0.05), graphical(p, of_single_tests(*expanded(graph)), 0.05)
        assert found.adjusted == pytest.approx(single.adjusted)
        assert found.shares == pytest.approx(single.shares)


def test_a_chain_stops_at_its_first_failure():
    graph = family([], [4]).graph
    found = graphical([0.01, 0.04, 0.2, 0.001], graph, 0.05)
    assert found.adjusted == pytest.approx([0.01, 0.04, 0.2, 0.2])
    assert found.shares == pytest.approx([0, 0, 1, 0])


def test_an_overall_test_helps_its_sizes_and_the_other_contrasts():
    graph = family([3, 1], []).graph
    assert graph.shares_of_tests() == pytest.approx([1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 2])
    p = np.array([0.2, 0.008, 0.2, 0.2, 0.2])  # the overall test, its sizes, and a contrast of one size
    assert graphical(p, graph, 0.05).adjusted[1] == pytest.approx(12 * 0.008)
    p[0] = 0.01
    found = graphical(p, graph, 0.05)
    assert found.adjusted[0] == pytest.approx(4 * 0.01)
    assert found.adjusted[1] == pytest.approx(8 * 0.008)  # it passes a third of an eighth
    assert found.adjusted[4] == pytest.approx(0.2 / (1 / 2 + 1 / 8))


def test_sizes_at_which_two_arms_change_places_are_found_though_the_mean_is_not():
    graph = family([2], []).graph
    found = graphical([0.9, 0.001, 0.001], graph, 0.05)
    assert (found.adjusted <= 0.05).tolist() == [False, True, True]
    # Level that other contrasts no longer need reaches such sizes too.
    graph = family([2, 1, 1], []).graph
    found = graphical([0.9, 0.02, 0.02, 0.001, 0.001], graph, 0.05)
    assert found.adjusted[1] == pytest.approx(4 * 0.02)


def test_an_overall_test_without_others_passes_all_to_its_sizes():
    graph = family([2], []).graph
    found = graphical([0.02, 0.03, 0.04], graph, 0.05)
    assert found.adjusted == pytest.approx([0.04, 0.06, 0.06], abs=1e-6)


@pytest.mark.parametrize(("n_sizes", "chains"), [([1], []), ([4, 4, 1], [3]), ([2], [1, 1]), ([], [2])])
def test_a_family_spends_its_level_once(n_sizes, chains):
    tests = family(n_sizes, chains)
    graph, shares = tests.graph, tests.graph.shares_of_tests()
    assert shares.sum() == pytest.approx(1)
    assert (graph.passes >= 0).all()
    assert (graph.passes.sum(axis=1) <= 1 + 1e-9).all()
    assert sorted(test for group in graph.groups for test in group) == list(range(len(shares)))
    assert len(shares) == sum(n if n == 1 else n + 1 for n in n_sizes) + sum(chains)
    of_contrasts = [*tests.overall, *(size for sizes in tests.sizes for size in sizes)]
    assert (shares[of_contrasts] > 0).all()
    # If all is rejected, nothing is left.
    assert graphical(np.zeros(len(shares)), graph, 0.05).shares.sum() == 0


def test_sizes_without_others_pass_what_they_no_longer_need_to_the_overall_test():
    graph = family([2], []).graph
    found = graphical([0.04, 0.001, 0.001], graph, 0.05)
    assert found.adjusted == pytest.approx([0.04, 0.004, 0.004], abs=1e-4)


@pytest.mark.parametrize("p", [[np.nan, 0.1], [-0.1, 0.1], [0.1, 1.1]])
def test_p_values_outside_their_range_are_refused(p):
    with pytest.raises(ValueError, match="p values must be in"):
        graphical(p, family([1, 1], []).graph, 0.05)


def test_no_tests_are_no_family():
    graph = family([], []).graph
    assert graphical([], graph, 0.05).adjusted.size == 0


def test_what_a_look_rejects_stays_so_and_helps_the_others():
    graph = family([1, 1], []).graph
    found = sequential([[0.004, 0.5], [0.9, 0.02]], graph, [0.01, 0.04])
    assert found.look.tolist() == [0, 1]
    assert found.decisions[0].adjusted == pytest.approx([0.008, 0.5])
    assert found.decisions[1].adjusted == pytest.approx([0.0, 0.02])  # all of the level is left for the second
    again = sequential([[0.5, 0.5], [0.9, 0.02]], graph, [0.01, 0.04])
    assert again.decisions[1].adjusted == pytest.approx([0.9, 0.04])


@given(P)
def test_one_look_is_the_graph_itself(p):
    graph = family([1] * len(p), []).graph
    found = sequential([p], graph, [0.05])
    np.testing.assert_array_equal(found.decisions[0].adjusted, graphical(p, graph, 0.05).adjusted)


def test_looks_err_at_most_as_often_as_their_levels_say_though_the_data_choose_what_goes_on():
    """Two tests of nothing; the second gets more data only if the first was not rejected, and looks promising."""
    rng, graph, levels = np.random.default_rng(0), family([1, 1], []).graph, [0.02, 0.03]
    n_studies = 4000
    values = rng.normal(size=(n_studies, 2, 8))
    errors = 0
    for study in values:
        first = stats.ttest_1samp(study[:, :3], 0, axis=1).pvalue
        second = stats.ttest_1samp(study, 0, axis=1).pvalue
        p = np.array([first, np.where(first < 0.3, second, 1.0)])
        found = sequential(p, graph, levels)
        errors += any((each.adjusted <= level).any() for each, level in zip(found.decisions, levels, strict=True))
    assert errors / n_studies <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / n_studies)
