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
from analysis.statistics.multiplicity import family, graphical
from benchmarks.document import put_table

LEVEL = 0.05
KINDS = ("equal", "unequal", "skewed", "ties")
SEEDS = (3, 5, 8)
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
    truth = (losses[_FIRST] - losses[_SECOND]).astype(float)
    truths = np.concatenate([np.concatenate([[own.mean()], own]) for _ in range(N_MEASURES) for own in truth])
    for _ in range(n_studies):
        p, tests = np.ones(len(AT_FIRST)), []
        for measure in range(N_MEASURES):
            values = losses[:, None] + noise(rng, kind, (N_ROWS, n))
            values = np.round(values) if kind == "ties" else values
            step = rounding_step(values)
            pairs = pair_tests(values, _FIRST.ravel(), _SECOND.ravel(), False, step=step)
            for contrast, (first, second) in enumerate(zip(_FIRST, _SECOND, strict=True)):
                rows = np.union1d(first, second)
                weights = [((first == row).sum() - (second == row).sum()) / N_SIZES for row in rows]
                tests.append(group_test(values[rows], weights, rows, step=step))
                tests.append(TTest(*(each[contrast * N_SIZES : (contrast + 1) * N_SIZES] for each in pairs)))
            of_dense = TTest(*(each[:N_SIZES] for each in pairs))
            p[FAMILY.chains[measure]] = np.minimum(1, 2 * not_inferior(of_dense, margin, "minimize")[::-1])
        whole = TTest(*(np.concatenate(each) for each in zip(*tests, strict=True)))
        m = len(whole.p)
        p[:m] = whole.p
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


def null_errors(seed: int, kind: str, n: int, n_studies: int) -> NDArray[np.bool_]:
    """In which studies without any difference something is called better or worse."""
    found = decide(seed, kind, n, np.zeros(N_ROWS), 1.0, n_studies)
    return (found.overall != 0).any(axis=(1, 2)) | (found.sizes != 0).any(axis=(1, 2, 3))


def mixed_errors(seed: int, kind: str, n: int, n_studies: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """In which studies with some differences a claim is false, and in which all simultaneous intervals hold.

    All sizes are worse than dense by the margin. Of the first pair of arms two sizes are better by two standard
    deviations, and two are alike. The second pair is alike.
    """
    losses = np.zeros(N_ROWS)
    losses[1:5], losses[5:7] = 1.0, -2.0
    found = decide(seed, kind, n, losses, 1.0, n_studies)
    worse = found.overall[:, :, 0] < 0, found.overall[:, :, 1] > 0, found.overall[:, :, 2] != 0
    wrong = np.any([each.any(axis=1) for each in worse], axis=0) | found.not_inferior.any(axis=(1, 2))
    of_sizes = (
        found.sizes[:, :, 0] < 0,
        found.sizes[:, :, 1] > 0,
        found.sizes[:, :, 1, 2:] != 0,
        found.sizes[:, :, 2] != 0,
    )
    return wrong | np.any([each.any(axis=(1, 2)) for each in of_sizes], axis=0), found.covered


def power(seed: int, kind: str, n: int, gap: float, n_studies: int) -> tuple[float, float]:
    """Shares of overall tests, and of sizes, that are found where one arm is better by a gap at every size."""
    losses = np.zeros(N_ROWS)
    losses[5:9] = -gap
    found = decide(seed, kind, n, losses, 1.0, n_studies)
    return float((found.overall[:, :, 1] < 0).mean()), float((found.sizes[:, :, 1] < 0).mean())


# The table ------------------------------------------------------------------------------------------------------------

HEADINGS = (
    *("noise", "seeds", "false verdict, nothing differs", "false claim, some differ", "all intervals hold"),
    *("arm found, gap of 2 sd", "each size found, 2 sd", "each size found, 4 sd"),
)


def rows(n_studies: int) -> Iterator[tuple[str, ...]]:
    for kind, n in product(KINDS, SEEDS):
        false, (claims, covered) = null_errors(1, kind, n, n_studies), mixed_errors(2, kind, n, n_studies)
        (whole, two), (_, four) = power(3, kind, n, 2.0, n_studies), power(4, kind, n, 4.0, n_studies)
        yield kind, str(n), *(f"{rate:.3f}" for rate in (false.mean(), claims.mean(), covered.mean(), whole, two, four))


def main() -> None:
    n_studies = 2000
    caption = (
        f"Shares of {n_studies:,} simulated studies for each row; the standard error of .050 is "
        f"{np.sqrt(0.05 * 0.95 / n_studies):.3f}. `python -m benchmarks.calibration` writes this table, and says what "
        "is simulated."
    )
    put_table("docs/analysis.md", "calibration", caption, HEADINGS, list(rows(n_studies)))


if __name__ == "__main__":
    main()
