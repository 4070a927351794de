"""Comparisons of pairs as the figures take them, made from a simulated study with the kernels of `analysis.statistics`.

Which pairs there are is set by the test; the numbers are those of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from simulated_study import N_PARAMS_MPO, Configuration

from analysis.figures.forest import DECLARED, EQUAL_PARAMETERS, REFERENCE
from analysis.runs import StudyRuns
from analysis.statistics.contrasts import contrasts, headline, non_inferiority
from analysis.statistics.multiplicity import benjamini_hochberg, holm
from analysis.summary import MEASURES, MIN_SEEDS, VAL_ACC, VAL_LOSS

COLUMNS = (
    *("measure", "trial", "label", "group", "n_params", "total_tokens", "against", "against_label", "against_group"),
    *("against_n_params", "against_total_tokens", "relation", "declared", "same_budget", "n", "difference"),
    *("half_width", "p", "block_half_width", "block_p", "margin", "bound", "non_inferior"),
)
MARGINS = {VAL_LOSS.name: 0.02, VAL_ACC.name: 0.5}
LEVEL = 0.05


def with_controls() -> list[Configuration]:
    """Dense, MPO of both starts, and controls of the size of an MPO, each as large as it or a little smaller."""
    found = [Configuration("dense", 808_448, 1.575, family="dense")]
    for chi, size in N_PARAMS_MPO.items():
        found.append(Configuration("mpo", size, 1.55 + 1.9 / chi, chi=chi))
        found.append(
            Configuration(
                "mpo-tuned", size, 1.50 + 2.4 / chi, start="teacher", chi=chi, steps=500, budget_hash="0ddba11e"
            )
        )
        for family, loss in (("low_rank", 1.60 + 1.8 / chi), ("monarch", 1.56 + 2.2 / chi)):
            found.append(Configuration(family, size - 37 * chi, loss, family=family, extra={"as_chi": chi}))
        found.append(Configuration(f"narrow-{chi}", size - 11 * chi, 1.59 + 2.1 / chi, "dense", d_model=3 * chi + 16))
    return found


def reference_pairs(summary: pd.DataFrame) -> list[tuple[int, int]]:
    """Every trial with the reference."""
    against = summary.loc[summary["is_reference"], "trial"].item()
    return [(trial, against) for trial in summary["trial"] if trial != against]


def equal_pairs(summary: pd.DataFrame) -> list[tuple[int, int]]:
    """Every MPO trained from scratch with the controls that have 97 % of its parameters or more, and no more."""
    mpo = summary[(summary["family"] == "mpo") & (summary["start"] == "scratch")]
    others = summary[(summary["family"] != "mpo") & (summary["start"] == "scratch")]
    return [
        (trial, against)
        for trial, size in zip(mpo["trial"], mpo["n_params"], strict=True)
        for against in others.loc[others["n_params"].between(0.97 * size, size), "trial"]
    ]


def compared(
    runs: StudyRuns,
    summary: pd.DataFrame,
    pairs: Mapping[str, Sequence[tuple[int, int]]],
    declared: Sequence[tuple[int, int]] = (),
) -> pd.DataFrame:
    """One row per measure and pair, with the columns of `comparisons.compare`; `pairs` by their relation."""
    named = summary.set_index("trial")
    rows = []
    for measure in MEASURES:
        values = (measure.scale * runs.seeds.set_index(["trial", "seed"])[measure.key]).unstack("trial")
        for relation, own in pairs.items():
            for trial, against in own:
                shared = values[[trial, against]].dropna()
                found = contrasts([shared[trial]], shared[against])
                test = headline(found)
                margin = MARGINS[measure.name] if relation == REFERENCE else float("nan")
                bound, holds = float("nan"), False
                if margin > 0:
                    limit = non_inferiority(found.difference, test, margin, measure.direction)
                    bound, holds = limit.bound.item(), limit.holds.item()
                sides = {f"{side}{key}": named.loc[number, key] for side, number in (("", trial), ("against_", against))
                         for key in ("label", "group", "n_params", "total_tokens")}  # fmt: skip
                rows.append(
                    {
                        "measure": measure.name, "trial": trial, "against": against, **sides, "relation": relation,
                        "declared": relation == DECLARED or (trial, against) in declared,
                        "same_budget": named.loc[trial, "budget_hash"] == named.loc[against, "budget_hash"],
                        "n": found.n, "difference": found.difference.item(), "half_width": test.half_width.item(),
                        "p": test.p.item(), "block_half_width": found.block.half_width.item(),
                        "block_p": found.block.p.item(), "margin": margin, "bound": bound, "non_inferior": holds,
                    }
                )  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*COLUMNS])
    frame["p_adjusted"] = float("nan")
    for (_, _, planned), own in frame.dropna(subset="p").groupby(["measure", "relation", "declared"]):
        frame.loc[own.index, "p_adjusted"] = (holm if planned else benjamini_hochberg)(own["p"])
    frame["adjustment"] = frame["declared"].map({True: "Holm", False: "BH"})
    frame["verdict"] = [_verdict(row) for row in frame.to_dict("records")]
    return frame


def simulated_comparisons(runs: StudyRuns, summary: pd.DataFrame) -> pd.DataFrame:
    """Every trial with the reference, where there is one, and every MPO with the controls of its size."""
    pairs = {EQUAL_PARAMETERS: equal_pairs(summary)}
    if summary["is_reference"].any():
        pairs = {REFERENCE: reference_pairs(summary), **pairs}
    return compared(runs, summary, pairs)


def _verdict(row: dict) -> str:
    if row["n"] < MIN_SEEDS:
        return "too few seeds"
    if row["p_adjusted"] < LEVEL:
        return "better" if (row["difference"] < 0) == (row["measure"] == VAL_LOSS.name) else "worse"
    return "not inferior" if row["non_inferior"] else "undecided"
