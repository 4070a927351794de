"""p values adjusted for the number of tests; they are compared with the level of the whole family.

The other adjustment in use, Benjamini and Hochberg's, is `scipy.stats.false_discovery_control`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Graph(NamedTuple):
    """Tests that pass their part of the level on when they are rejected, in G groups.

    The tests of a group are alike: each has the same part of the share, and passes the same. Or they are a fixed
    sequence: the first that is open has the whole share; a test passes it to the next, and the last one passes it on.
    """

    groups: list[list[int]]
    """The numbers of each group's tests."""
    in_order: list[bool]
    """Whether each group is a fixed sequence."""
    shares: NDArray[np.float64]
    """(G,), at least 0, at most 1 together: the part of the level that each group has at first."""
    passes: NDArray[np.float64]
    """(G, G), rows at most 1 together: the part of its share that a rejected test (row) passes to each group; on the
    diagonal, to the other tests of its own group."""

    def shares_of_tests(self) -> NDArray[np.float64]:
        """(m,): the part of the level that each test has at first."""
        of_tests = np.zeros(sum(map(len, self.groups)))
        for tests, in_order, share in zip(self.groups, self.in_order, self.shares, strict=True):
            of_tests[tests[:1] if in_order else tests] = share if in_order else share / len(tests)
        return of_tests


class Decisions(NamedTuple):
    """Adjusted p values (m,), and the share of the level (m,) that is left for each test that is not rejected."""

    adjusted: NDArray[np.float64]
    shares: NDArray[np.float64]


def graphical(p: ArrayLike, graph: Graph, level: float) -> Decisions:
    """Test hypotheses one by one, the most certain first; each that is rejected passes its share on.

    If every test with an adjusted value of at most α is rejected, the chance of any false rejection is at most α, for
    any dependence of the tests and any logical relation of the hypotheses. Holm's procedure is the graph of one group.

    Args:
        p: (m,), p values in [0, 1].
        level: α, at which the shares are left.
    Raises:
        ValueError: a p value is outside [0, 1] or NaN.
    Cost: O(m G²); the source's graph of single tests takes O(m³).
    Source: Bretz, Maurer, Brannath and Posch 2009, A graphical approach to sequentially rejective multiple test
        procedures, algorithm 1; here for groups of equal tests.
    """
    values: NDArray[np.float64] = np.asarray(p, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p values must be in [0, 1], but one is not")
    share, passes = graph.shares.copy(), graph.passes.copy()
    # The next test of each group is its last.
    waiting = [
        tests[::-1] if in_order else sorted(tests, key=lambda test: -values[test])
        for tests, in_order in zip(graph.groups, graph.in_order, strict=True)
    ]
    n_open = np.array([1 if each else len(tests) for each, tests in zip(graph.in_order, graph.groups, strict=True)])
    following = np.array([values[tests[-1]] for tests in waiting])
    adjusted, left = np.ones(values.size), np.zeros(values.size)
    largest = 0.0
    while n_open.any():
        ratio = np.divide(following * n_open, share, out=np.full(share.size, np.inf), where=(n_open > 0) & (share > 0))
        group = int(np.argmin(ratio))
        if largest <= level < ratio[group]:
            for tests, in_order, own, n in zip(waiting, graph.in_order, share, n_open, strict=True):
                left[tests[-1:] if in_order else tests] = own / max(n, 1)
        largest = max(largest, ratio[group])
        if not largest < 1:
            break  # what is open keeps an adjusted value of 1
        adjusted[waiting[group].pop()] = largest
        if waiting[group]:
            following[group] = values[waiting[group][-1]]
        if not (graph.in_order[group] and waiting[group]):
            _remove(group, share, passes, n_open)
    return Decisions(adjusted, left)


class Looks(NamedTuple):
    """Decisions of tests at several looks, by `sequential`.

    look: (m,), the number of the look that decided: the first that rejected, or the last. decisions: those of each
    look, whose adjusted values are compared with the level of that look.
    """

    look: NDArray[np.intp]
    decisions: list[Decisions]


def sequential(p: ArrayLike, graph: Graph, levels: Sequence[float]) -> Looks:
    """Test hypotheses at several looks, each with more data than the one before; what was rejected stays so.

    A look has the graph with its own level, where hypotheses that were rejected before count as p = 0. The chance of
    any false rejection at any look is at most the sum of the levels. The reason: before the first false rejection,
    every rejected hypothesis is false, so each look errs at most at its level. This holds for any dependence of the
    looks. Which hypotheses get more data may depend on the data before; the others count as p = 1.

    Args:
        p: (K, m), the p values at each look in [0, 1], from all data until then; 1 for those without new data.
        levels: (K,), fixed beforehand.
    Source: the levels add up as in Slud and Wei 1982, Two-sample repeated significance tests based on the modified
        Wilcoxon statistic; the graph as in `graphical`.
    """
    values = np.asarray(p, dtype=np.float64)
    look = np.full(values.shape[1], len(levels) - 1)
    rejected = np.zeros(values.shape[1], dtype=np.bool_)
    decisions = []
    for number, (own, level) in enumerate(zip(values, levels, strict=True)):
        found = graphical(np.where(rejected, 0.0, own), graph, level)
        is_new = (found.adjusted <= level) & ~rejected
        look[is_new] = number
        rejected |= is_new
        decisions.append(found)
    return Looks(look, decisions)


def _remove(group: int, share: NDArray[np.float64], passes: NDArray[np.float64], n_open: NDArray[np.intp]) -> None:
    """Take one test out of a group, in place: what it had and got goes where it passed it to."""
    n, own = n_open[group], passes[group, group]
    row, column = passes[group].copy(), passes[:, group] / n  # from the test, to the test
    freed = share[group] / n
    share[group] -= freed
    share += freed * row
    each = np.divide(1.0, n_open, out=np.zeros(share.size), where=n_open > 0)
    back = column * row * each  # to the test and from it back
    to_others = row.copy()
    passes += column[:, None] * row
    passes[:, group] -= column
    passes[np.diag_indices_from(passes)] -= back
    passes *= np.divide(1.0, 1 - back, out=np.zeros(share.size), where=back < 1)[:, None]
    sibling = own / (n - 1) if n > 1 else 0.0  # from each other test of the group to this one
    scale = 1 / (1 - sibling) if sibling < 1 else 0.0
    passes[group] = to_others * scale if n > 1 else 0.0
    passes[group, group] = sibling * (n - 2) * scale if n > 1 else 0.0
    if n == 1:
        passes[:, group] = share[group] = 0.0
    n_open[group] -= 1


class Family(NamedTuple):
    """A study's declared tests (see `family`).

    overall: for each contrast the test of its mean over all sizes; with one size it is that size's. sizes: for each
    contrast its tests. chains: for each sequence its tests, in order.
    """

    overall: list[int]
    sizes: list[list[int]]
    chains: list[list[int]]
    graph: Graph


_LITTLE = 1e-6
"""Share that a size passes elsewhere while other sizes of its contrast are open; too small to change a decision."""


def family(n_sizes: Sequence[int], chain_lengths: Sequence[int]) -> Family:
    """The graph of a study's declared tests.

    Contrasts and chains have equal shares at first. Half of a contrast's share is for its overall test, of its mean
    over all sizes. The other half is for its sizes: a mean says nothing where two arms change places. An overall test
    that is rejected passes half to its sizes and half to the other contrasts and chains. Each chain is a fixed
    sequence: a test passes all to the next. What sizes and chains no longer need goes to the other contrasts and
    chains; if there are none, that of the sizes goes to the overall test. Half of what a contrast receives is for its
    overall test, half for its sizes.

    Args:
        n_sizes: for each contrast, its number of sizes, at least 1.
        chain_lengths: for each fixed sequence, its number of tests, at least 1.
    """
    overall, sizes, chains = [], [], []
    groups: list[list[int]] = []
    parts: list[list[int]] = []  # the groups of each contrast and chain
    count = 0
    for n in n_sizes:
        overall.append(count)
        sizes.append([count] if n == 1 else list(range(count + 1, count + 1 + n)))
        own = [[count]] if n == 1 else [[count], sizes[-1]]
        parts.append(list(range(len(groups), len(groups) + len(own))))
        groups += own
        count += 1 if n == 1 else 1 + n
    for n in chain_lengths:
        chains.append(list(range(count, count + n)))
        parts.append([len(groups)])
        groups.append(chains[-1])
        count += n

    splits = np.zeros((len(parts), len(groups)))  # of what a contrast or chain gets, over its groups
    for split, part in zip(splits, parts, strict=True):
        split[part] = 1 / len(part)
    passes = np.zeros((len(groups), len(groups)))
    for split, part in zip(splits, parts, strict=True):
        to_others = (splits.sum(axis=0) - split) / max(len(parts) - 1, 1)
        passes[part] = to_others
        if len(part) == 2:
            whole, single = part
            to_sizes = 0.5 if len(parts) > 1 else 1.0
            passes[whole] *= 1 - to_sizes
            passes[whole, single] = to_sizes
            passes[single] *= _LITTLE
            passes[single, single] = 1 - _LITTLE
            if len(parts) == 1:
                passes[single, whole] = _LITTLE
    in_order = [False] * (len(groups) - len(chains)) + [True] * len(chains)
    shares = splits.mean(axis=0) if parts else np.zeros(0)
    return Family(overall, sizes, chains, Graph(groups, in_order, shares, passes))
