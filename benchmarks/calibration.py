"""How often a family of declared tests errs, and what it finds, in simulated studies with known truth.

    python -m benchmarks.calibration    writes the table into docs/analysis.md

The tests are those of `analysis.statistics.differences`, in the graph of `analysis.statistics.multiplicity.family`.

A study has a dense model and three contrasts at four sizes: an arm against dense, and two pairs of arms. Loss and
accuracy are two measures with independent noise of standard deviation 1. Kinds of noise: "equal"; "unequal": each
configuration has its own deviation, of log-sd .5; "skewed": exponential; "ties": rounded to whole standard deviations.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.differences import (
    TTest,
    compatible_intervals,
    group_test,
    not_inferior,
    pair_tests,
    rounding_step,
)
from analysis.statistics.multiplicity import family, graphical, sequential
from benchmarks.document import put_table

LEVEL = 0.05
KINDS = ("equal", "unequal", "skewed", "ties")
SEEDS = (3, 5, 8)
LOOKS = {3: 0.005, 5: 0.015, 8: 0.03}
N_SIZES, N_MEASURES = 4, 2
_FIRST = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [13, 14, 15, 16]])
_SECOND = np.array([[0, 0, 0, 0], [9, 10, 11, 12], [17, 18, 19, 20]])
N_ROWS = 21
"""The dense model (row 0), four sizes against it, and four sizes of two arms, twice."""
FAMILY = family([N_SIZES] * len(_FIRST) * N_MEASURES, [N_SIZES] * N_MEASURES)
AT_FIRST = FAMILY.graph.shares_of_tests()


class Decided(NamedTuple):
    """Decisions in simulated studies. Negative: the first is better.

    overall: (studies, measures, contrasts), −1, 0 or 1. sizes: (studies, measures, contrasts, sizes), likewise.
    not_inferior: (studies, measures, sizes), of the contrast with dense. covered: (studies,), whether all simultaneous
    intervals contain the truth.
    """

    overall: NDArray[np.float64]
    sizes: NDArray[np.float64]
    not_inferior: NDArray[np.bool_]
    covered: NDArray[np.bool_]


def noise(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Noise of mean 0 over seeds (the last axis); "ties" are made of "equal" by the rounding of values."""
    if kind == "skewed":
        return rng.exponential(size=shape) - 1
    drawn = rng.normal(size=shape)
    return drawn * np.exp(0.5 * rng.normal(size=(*shape[:-1], 1))) if kind == "unequal" else drawn


def decide(seed: int, kind: str, n: int, losses: NDArray[np.float64], margin: float, n_studies: int) -> Decided:
    """Simulate studies, and decide each.

    Args:
        n: seeds of each configuration.
        losses: (N_ROWS,), the true losses, in standard deviations; equal for both measures.
    """
    rng = np.random.default_rng(seed)
    overall, sizes, claims, covered = [], [], [], []
    truths = _truths(losses)
    for _ in range(n_studies):
        whole, p = _tests(_study(rng, kind, n, losses), margin)
        m = len(whole.p)
        found = graphical(p, FAMILY.graph, LEVEL)
        rejected = found.adjusted <= LEVEL
        signs = (np.sign(whole.difference) * rejected[:m]).reshape(N_MEASURES, len(_FIRST), 1 + N_SIZES)
        overall.append(signs[..., 0])
        sizes.append(signs[..., 1:])
        claims.append(np.array([rejected[chain][::-1] for chain in FAMILY.chains]))
        shares = np.where(found.shares > 0, found.shares, AT_FIRST)[:m]
        low, high = compatible_intervals(whole, found.adjusted[:m], shares, LEVEL)
        covered.append(((low <= truths) & (truths <= high)).all())
    return Decided(np.array(overall), np.array(sizes), np.array(claims), np.array(covered))


def decide_at_looks(
    seed: int, kind: str, losses: NDArray[np.float64], margin: float, n_studies: int
) -> tuple[Decided, NDArray[np.float64]]:
    """Simulate studies that are tested at `LOOKS`; between looks, trials of undecided contrasts get more seeds.

    Returns:
        The decisions; and the number of runs of each study, as a share of those with the seeds of the last look for
        all.
    """
    rng = np.random.default_rng(seed)
    overall, sizes, claims, covered, runs = [], [], [], [], []
    numbers, levels = list(LOOKS), np.array(list(LOOKS.values()))
    truths = _truths(losses)
    for _ in range(n_studies):
        study, n_seeds = _study(rng, kind, numbers[-1], losses), np.full(N_ROWS, numbers[0])
        tests, p, reached = [], [], []
        for n, following in zip(numbers, [*numbers[1:], numbers[-1]], strict=True):
            whole, values = _tests([each[:, :n] for each in study], margin)
            pairs = (n_seeds >= n)[_FIRST] & (n_seeds >= n)[_SECOND]
            has = np.concatenate([np.concatenate([[own.all()], own]) for _ in range(N_MEASURES) for own in pairs])
            of_chains = np.concatenate([pairs[0][::-1]] * N_MEASURES)
            tests.append(whole)
            reached.append(has)
            p.append(np.where(np.concatenate([has, of_chains]), values, 1.0))
            found = sequential(np.array(p), FAMILY.graph, list(levels[: len(p)]))
            every, m = np.arange(len(AT_FIRST)), len(has)
            rejected = np.array([each.adjusted for each in found.decisions])[found.look, every] <= levels[found.look]
            holds = np.array([rejected[chain][::-1] for chain in FAMILY.chains])
            is_open = ~rejected[:m].reshape(N_MEASURES, len(_FIRST), 1 + N_SIZES)
            is_open[:, 0, 1:] &= ~holds  # not inferior is a decision
            wanted = (is_open[..., 1:] | is_open[..., :1]).any(axis=0) & pairs
            for rows in (_FIRST[wanted], _SECOND[wanted]):
                n_seeds[rows] = following
        last = len(numbers) - 1 - np.array(reached)[::-1].argmax(axis=0)
        look = np.where(rejected[:m], found.look[:m], last)
        shown = TTest(*(np.array(each)[look, every[:m]] for each in zip(*tests, strict=True)))
        signs = (np.sign(shown.difference) * rejected[:m]).reshape(N_MEASURES, len(_FIRST), 1 + N_SIZES)
        overall.append(signs[..., 0])
        sizes.append(signs[..., 1:])
        claims.append(holds)
        adjusted, left = (np.array(each)[look, every[:m]] for each in zip(*found.decisions, strict=True))
        low, high = compatible_intervals(shown, adjusted, np.where(left > 0, left, AT_FIRST[:m]), levels[look])
        covered.append(((low <= truths) & (truths <= high)).all())
        runs.append(n_seeds.mean() / numbers[-1])
    return Decided(np.array(overall), np.array(sizes), np.array(claims), np.array(covered)), np.array(runs)


def _truths(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The true difference of each test of a contrast, in the order of `_tests`."""
    truth = (losses[_FIRST] - losses[_SECOND]).astype(float)
    return np.concatenate([np.concatenate([[own.mean()], own]) for _ in range(N_MEASURES) for own in truth])


def _study(rng: np.random.Generator, kind: str, n: int, losses: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Values of each measure, (N_ROWS, n)."""
    values = [losses[:, None] + noise(rng, kind, (N_ROWS, n)) for _ in range(N_MEASURES)]
    return [np.round(each) for each in values] if kind == "ties" else values


def _tests(study: list[NDArray[np.float64]], margin: float) -> tuple[TTest, NDArray[np.float64]]:
    """The tests of all contrasts, each as overall, then its sizes; and the p values of these and of the chains."""
    p, tests = np.ones(len(AT_FIRST)), []
    for measure, values in enumerate(study):
        step = rounding_step(values)
        pairs = pair_tests(values, _FIRST.ravel(), _SECOND.ravel(), False, step=step)
        for contrast, (first, second) in enumerate(zip(_FIRST, _SECOND, strict=True)):
            rows = np.union1d(first, second)
            weights = [((first == row).sum() - (second == row).sum()) / N_SIZES for row in rows]
            tests.append(group_test(values[rows], weights, rows, step=step))
            tests.append(pairs.at(np.arange(contrast * N_SIZES, (contrast + 1) * N_SIZES)))
        of_dense = pairs.at(np.arange(N_SIZES))
        p[FAMILY.chains[measure]] = np.minimum(1, 2 * not_inferior(of_dense, margin, "minimize")[::-1])
    whole = TTest(*(np.concatenate(each) for each in zip(*tests, strict=True)))
    p[: len(whole.p)] = whole.p
    return whole, p


NOTHING = np.zeros(N_ROWS)
"""True losses without any difference."""


def some() -> NDArray[np.float64]:
    """True losses with some differences.

    All sizes are worse than dense by 1, the margin. Of the first pair of arms two sizes are better by two standard
    deviations, and two are alike. The second pair is alike.
    """
    losses = np.zeros(N_ROWS)
    losses[1:5], losses[5:7] = 1.0, -2.0
    return losses


def gap(size: float) -> NDArray[np.float64]:
    """True losses where one arm of the first pair is better by a gap at every size."""
    losses = np.zeros(N_ROWS)
    losses[5:9] = -size
    return losses


def null_errors(found: Decided) -> NDArray[np.bool_]:
    """In which studies of `NOTHING` something is called better or worse."""
    return (found.overall != 0).any(axis=(1, 2)) | (found.sizes != 0).any(axis=(1, 2, 3))


def mixed_errors(found: Decided) -> NDArray[np.bool_]:
    """In which studies of `some` a claim is false."""
    worse = found.overall[:, :, 0] < 0, found.overall[:, :, 1] > 0, found.overall[:, :, 2] != 0
    wrong = np.any([each.any(axis=1) for each in worse], axis=0) | found.not_inferior.any(axis=(1, 2))
    of_sizes = (
        found.sizes[:, :, 0] < 0,
        found.sizes[:, :, 1] > 0,
        found.sizes[:, :, 1, 2:] != 0,
        found.sizes[:, :, 2] != 0,
    )
    return wrong | np.any([each.any(axis=(1, 2)) for each in of_sizes], axis=0)


def power(found: Decided) -> tuple[float, float]:
    """Shares of overall tests, and of sizes, that are found in studies of `gap`."""
    return float((found.overall[:, :, 1] < 0).mean()), float((found.sizes[:, :, 1] < 0).mean())


# The table ------------------------------------------------------------------------------------------------------------

HEADINGS = (
    *("noise", "seeds", "false verdict, nothing differs", "false claim, some differ", "all intervals hold"),
    *("arm found, gap of 2 sd", "each size found, 2 sd", "each size found, 4 sd"),
)
AT_LOOKS = (*HEADINGS, "runs, nothing differs", "runs, gap of 4 sd")


def rows(n_studies: int) -> Iterator[tuple[str, ...]]:
    for kind, n in product(KINDS, SEEDS):
        nothing, mixed, two, four = (
            decide(seed, kind, n, losses, 1.0, n_studies)
            for seed, losses in enumerate((NOTHING, some(), gap(2.0), gap(4.0)), start=1)
        )
        rates = null_errors(nothing).mean(), mixed_errors(mixed).mean(), mixed.covered.mean()
        yield kind, str(n), *(f"{rate:.3f}" for rate in (*rates, *power(two), power(four)[1]))


def rows_at_looks(n_studies: int) -> Iterator[tuple[str, ...]]:
    for kind in KINDS:
        (nothing, n_nothing), (mixed, _), (two, _), (four, n_four) = (
            decide_at_looks(seed, kind, losses, 1.0, n_studies)
            for seed, losses in enumerate((NOTHING, some(), gap(2.0), gap(4.0)), start=1)
        )
        rates = (
            null_errors(nothing).mean(),
            mixed_errors(mixed).mean(),
            mixed.covered.mean(),
            *power(two),
            power(four)[1],
        )
        yield kind, ", ".join(map(str, LOOKS)), *(f"{rate:.3f}" for rate in (*rates, n_nothing.mean(), n_four.mean()))


def main() -> None:
    n_studies = 2000
    caption = (
        f"Shares of {n_studies:,} simulated studies for each row; the standard error of .050 is "
        f"{np.sqrt(0.05 * 0.95 / n_studies):.3f}. `python -m benchmarks.calibration` writes this table, and says what "
        "is simulated."
    )
    put_table("docs/analysis.md", "calibration", caption, HEADINGS, list(rows(n_studies)))
    levels = ", ".join(f"{level:g} at {n}" for n, level in LOOKS.items())
    caption = f"As above, with looks (levels {levels} seeds). Runs are shares of those with 8 seeds for every trial."
    put_table("docs/analysis.md", "looks", caption, AT_LOOKS, list(rows_at_looks(n_studies)))


if __name__ == "__main__":
    main()
