"""All results of a study's runs, computed once: the report writes them, the command prints them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.results.comparisons import compare, declared_against_reference
from analysis.results.summary import MEASURES, summarise
from analysis.results.uncertainty import FrontierUncertainty, frontier_uncertainty
from analysis.runs.study_runs import StudyRuns


@dataclass(frozen=True)
class Findings:
    """summary: `summary.summarise`. compared, arms: `comparisons.compare`. uncertainties: by measure, by its name."""

    runs: StudyRuns
    summary: pd.DataFrame
    compared: pd.DataFrame
    arms: pd.DataFrame
    uncertainties: dict[str, FrontierUncertainty]

    @classmethod
    def of(cls, runs: StudyRuns) -> Findings:
        summary = summarise(runs)
        compared = compare(runs, summary)
        declared = declared_against_reference(compared.pairs)
        uncertainties = {measure.name: frontier_uncertainty(runs, summary, measure, declared) for measure in MEASURES}
        return cls(runs, summary, compared.pairs, compared.arms, uncertainties)
