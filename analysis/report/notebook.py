"""A study's results in a notebook or a script.

`load_study("results/quick")` gives a `Study`. docs/notebook.md shows its use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import get_args

import pandas as pd
from matplotlib.figure import Figure

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.figures import data, style
from analysis.figures.curves import learning_curves_figure
from analysis.figures.frontier import frontier_figure
from analysis.report.answers import answers
from analysis.results.findings import Findings
from analysis.results.numbers import counted
from analysis.results.sizes import SIZES, Size
from analysis.results.summary import MEASURES, Measure, summarise, with_frontier
from analysis.results.uncertainty import FrontierUncertainty, frontier_uncertainty
from analysis.runs import load
from analysis.runs.curves import load_curves
from analysis.runs.studies import join_studies
from analysis.runs.study_runs import FRAMES, StudyAddress, StudyRuns

_SHORT = {measure.short: measure.name for measure in MEASURES}
_LEAST_WIDTH, _MOST_WIDTH = 2.5, 20.0


def load_study(*places: str | Path, experiment: str | None = None) -> Study:
    """Read a study.

    Args:
        places: the study's folder, as `mpo-study run` wrote it; or an MLflow tracking URI, with `experiment`. Several
            folders are read as one study, if their runs may be compared.
        experiment: name of the MLflow experiment at a tracking URI.
    Raises:
        AnalysisError: there is no such study, or its runs are incomplete; the message is one line.
    """
    if experiment is not None:
        if len(places) != 1:
            raise AnalysisError("give one tracking URI with `experiment`")
        return Study(load.load_study(StudyAddress(str(places[0]), experiment)))
    uris = [place for place in map(str, places) if "://" in place]
    if uris:
        raise AnalysisError(f"{uris[0]} is a tracking URI; name the study there: load_study(URI, experiment=NAME)")
    folders = [Path(place) for place in places]
    return Study(join_studies([load.load_study(load.resolve_study(path), cache=path / "cache") for path in folders]))


class Study:
    """The results of one study, or of several that were read as one.

    Values of `measure` are names of metrics, such as `val_loss` and `bits_per_byte`; `loss` and `accuracy` are short
    for `val_loss` and `val_acc`. Values of `size` are `parameters`, `bytes`, `flops`, `decode_ms` and `prefill_ms`.
    Methods raise an `AnalysisError` for names that do not exist.
    """

    def __init__(self, runs: StudyRuns) -> None:
        self._runs = runs

    @property
    def name(self) -> str:
        return self._runs.name

    @cached_property
    def _findings(self) -> Findings:
        return Findings.of(self._runs)

    # Frames -------------------------------------------------------------------------------------------------------

    @property
    def trials(self) -> pd.DataFrame:
        """One row for each configuration: its settings, counts, means over complete seeds with half-widths of 95 % t
        intervals, and whether it is on a frontier (`analysis.results.summary.summarise`)."""
        return self._findings.summary.copy()

    @property
    def runs(self) -> pd.DataFrame:
        """One row for each complete seed of each configuration, with its final metrics."""
        return self._runs.seeds.copy()

    @property
    def failures(self) -> pd.DataFrame:
        """One row for each failed seed, with its step and reason."""
        return self._runs.failures.copy()

    def curves(self, *metrics: str, arms: Sequence[str] | None = None) -> pd.DataFrame:
        """Learning curves, one row for each evaluation of each complete seed.

        Args:
            metrics: names of curves, such as `val_loss` and `train_loss`. Default: `val_loss` and `tokens`.
            arms: arms of the study file. Default: all.
        """
        known = [field.key for field in schema.CURVES]
        for metric in metrics:
            _check("metric", metric, known)
        runs = self._of_arms(arms)
        return load_curves(runs, runs.trials["trial"].tolist(), metrics or ("val_loss", "tokens"))

    def frontier(
        self, measure: str = "loss", size: str = "parameters", arms: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """The configurations on the frontier of the means, from the smallest to the largest.

        Columns: trial, arm, label, the size, n_seeds, mean, half_width (95 % t interval), probability (that it is on
        the frontier of the true means), near_probability (that it is within the margin of it).
        """
        points = self._points(*_axes(measure, size), arms)[0]
        of = SIZES[size].name
        columns = ["trial", "arm", "group", "label", of, "n_seeds", "mean", "half_width", "probability"]
        on = points[points["on_frontier"]].sort_values(of, ignore_index=True)
        return on[[*columns, "near_probability"]]

    def compare(self, *, declared: bool | None = None) -> pd.DataFrame:
        """One row for each comparison and measure: difference, intervals, adjusted p and verdict.

        Args:
            declared: only comparisons that the study file declares (True), or only others (False). Default: all.
        Source: `analysis.results.comparisons.compare`, whose docstring names the columns.
        """
        compared = self._findings.compared
        return compared if declared is None else compared[compared["declared"] == declared].reset_index(drop=True)

    # Figures ------------------------------------------------------------------------------------------------------

    def plot_frontier(
        self,
        measure: str = "loss",
        size: str = "parameters",
        arms: Sequence[str] | None = None,
        *,
        width: float = style.WIDTH,
        look: style.Look = "screen",
    ) -> Figure:
        """The frontier, with its probabilities and its band. `figure.get_label()` is the caption.

        Args:
            arms: arms of the study file; the frontier is that of their configurations. Default: all.
            width: in inches; a column of a paper has about 3.3.
            look: `screen`, or `paper` for a serif font.
        """
        _check_look(width, look)
        of_measure, of_size = _axes(measure, size)
        points, seeds, uncertainty = self._points(of_measure, of_size, arms)
        note = self._note(len(points), of_size, arms)
        return frontier_figure(points, seeds, uncertainty, of_measure, note, size=of_size, width=width, look=look)

    def plot_curves(
        self, arms: Sequence[str] | None = None, *, width: float = style.WIDTH, look: style.Look = "screen"
    ) -> Figure:
        """Learning curves of the validation loss, one panel for each family; see `plot_frontier`."""
        _check_look(width, look)
        runs = self._of_arms(arms)
        summary = summarise(runs)
        shown = data.curve_trials(summary)
        if shown.empty:
            raise AnalysisError(f"study {self.name}: no configuration was trained to the end, so there are no curves")
        curves = load_curves(runs, shown["trial"].tolist())
        note = data.curves_left_out(summary)
        return learning_curves_figure(data.curve_means(shown, curves), curves, note, width=width, look=look)

    def _repr_html_(self) -> str:
        """HTML for a notebook: the study's runs, and its frontier."""
        parts = [f"<h3>Study {escape(self.name)}</h3>"]
        for answer in answers(self._findings)[:2]:
            parts.append(f"<p><b>{escape(answer.question)}</b></p>{answer.rows.to_html(index=False, border=0)}")
        return "".join(parts)

    def __repr__(self) -> str:
        seeds, failed = len(self._runs.seeds), len(self._runs.failures)
        return f"Study({self.name!r}: {len(self._runs.trials)} trials, {seeds} complete seeds, {failed} failed)"

    # Parts --------------------------------------------------------------------------------------------------------

    def _of_arms(self, arms: Sequence[str] | None) -> StudyRuns:
        """The runs of these arms alone."""
        if arms is None:
            return self._runs
        if isinstance(arms, str):
            arms = [arms]
        known = self._runs.trials["arm"].unique().tolist()
        for arm in arms:
            _check("arm", arm, known)
        trials = self._runs.trials[self._runs.trials["arm"].isin(arms)]
        frames = {name: getattr(self._runs, name) for name in FRAMES if name != "trials"}
        kept = {name: frame[frame["trial"].isin(trials["trial"])] for name, frame in frames.items()}
        return replace(self._runs, trials=trials.reset_index(drop=True), **kept)

    def _note(self, n_shown: int, size: Size, arms: Sequence[str] | None) -> str:
        """Sentences for the caption about configurations that the figure leaves out, and about measured sizes."""
        runs = self._of_arms(arms)
        n = runs.seeds["trial"].nunique() - n_shown
        left_out = f"Left out for lack of these values: {counted(n, 'configuration')}." if n else ""
        noise = "" if size.name in runs.trials else "Times are means over seeds; their noise is in no interval."
        return f"{left_out} {noise}".strip()

    def _points(
        self, measure: Measure, size: Size, arms: Sequence[str] | None
    ) -> tuple[pd.DataFrame, pd.DataFrame, FrontierUncertainty]:
        """The points of a frontier, those of its seeds, and its uncertainty."""
        runs = self._of_arms(arms)
        if runs.seeds.empty:
            raise AnalysisError(f"study {self.name}: no seed of these arms is complete")
        summary = with_frontier(runs, summarise(runs), measure, size)
        if summary.empty:
            raise AnalysisError(
                f"study {self.name}: no configuration has {measure.name} and {size.name}; "
                "older studies lack newer metrics"
            )
        seeds = runs.seeds[runs.seeds["trial"].isin(summary["trial"])]
        uncertainty = frontier_uncertainty(replace(runs, seeds=seeds), summary, measure, size=size)
        points = data.frontier_points(summary, measure, uncertainty.chances, size)
        return points, data.seed_points(summary, seeds, measure), uncertainty


def _check_look(width: float, look: str) -> None:
    if not isinstance(width, int | float) or not _LEAST_WIDTH <= width <= _MOST_WIDTH:
        raise AnalysisError(f"the width must be {_LEAST_WIDTH:g} to {_MOST_WIDTH:g} inches, but is {width!r}")
    _check("look", look, get_args(style.Look))


def _axes(measure: str, size: str) -> tuple[Measure, Size]:
    """The measure and the size of these names."""
    name = _SHORT.get(measure, measure)
    known = [metric.name for metric in schema.OBJECTIVES.values() if "count" not in metric.recorded]
    _check("measure", name, [*_SHORT, *known])
    _check("size", size, SIZES)
    return next((each for each in MEASURES if each.name == name), Measure(name, name)), SIZES[size]


def _check(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise AnalysisError(f"there is no {what} {name}; choose among {', '.join(known)}")
