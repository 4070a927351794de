"""Printing of plans, studies and their runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.run_schema import MIN_SEEDS
from analysis.runs.urls import hide_password
from study.commands.progress import say
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.spec.arms import KeptArm
from study.spec.comparable import not_compared, planned_gaps
from study.spec.config import StudyConfig
from study.spec.trial import Trial, TrialSpec

if TYPE_CHECKING:  # these need PyTorch, which takes seconds to import
    from study.commands.memory import UnitMemory
    from study.commands.plan import Plan
    from study.commands.run import Outcome
    from study.commands.status import StudyStatus


def show_plan(console: Console, config: StudyConfig, plan: Plan, slots: int, memory: UnitMemory | None) -> None:
    """Print every listed trial, what a search may choose, the cost on this machine, and what will not be compared.

    Args:
        slots: number of runs at a time.
        memory: that of the largest unit; None if it is not known.
    """
    table = _table(
        console,
        f"{config.name}: {plan.n_seeds} seeds for each trial; FLOPs and time are for one seed",
        left=("arm", "what"),
        right=("rate", "steps", "parameters", "of dense", "TFLOP", "time"),
    )
    rows = [(trial, "") for trial in plan.trials]
    rows += [(trial, f"{name} drawn: ") for search in plan.searches for name, trial in search.rows.items()]
    for trial, drawn in rows:
        spec, shape = trial.spec, trial.shape
        table.add_row(
            _cut(console, spec.arm),
            _cut(console, drawn + _what(spec)),
            "searched" if drawn else f"{spec.protocol.learning_rate:g}",
            f"{spec.protocol.steps:,}",
            f"{shape.n_params:,}",
            f"{shape.n_params / shape.n_params_dense:.1%}",
            f"{shape.flops / 1e12:.3g}",
            _duration(trial.seconds),
        )
    console.print(table)
    if plan.n_searched:
        say(console, f"and {plan.n_searched} searched trials, chosen by sampler {config.search.sampler}")
    for search in plan.searches:
        said = f"arm {search.arm}: about {search.larger_than_dense:.0%} of its space is larger than the dense model"
        if search.beyond_limits:
            said += f"; about {search.beyond_limits:.0%} is outside the limits of `search` and is never trained"
        say(console, said)
    runs = f"{len(plan.trials) * plan.n_seeds} runs listed: {plan.listed_seconds / 3600:.3g} hours"
    if plan.searches:
        runs += (
            f", and at most {plan.n_searched * plan.n_seeds} searched: about {plan.searched_seconds / 3600:.3g} hours"
        )
    console.print(
        f"{runs}, one run at a time; about {_duration(plan.unit_seconds / slots)} on this machine, {slots} at a time "
        f"(at {min(plan.rates) / 1e9:.3g} to {max(plan.rates) / 1e9:.3g} GFLOP/s each, measured on the CPU just now)."
    )
    if config.search.halving is not None:
        say(console, "note: `search.halving` ends some of the searched trials early, so the search takes less time")
    if any(isinstance(arm, KeptArm) for arm in config.arms):
        say(console, "note: the time of compression with `keep` is not included")
    say(console, "memory: not known for this model" if memory is None else memory.shown)
    _show_gaps(console, config)
    say_not_compared(partial(say, console), config)


def _show_gaps(console: Console, config: StudyConfig) -> None:
    """Print the gap that each declared contrast finds."""
    gaps = planned_gaps(config)
    if not gaps:
        return
    numbers = list(gaps[0].by_seeds)
    console.print()
    table = _table(
        console,
        "gaps that the declared contrasts find in 80 % of studies, in standard deviations over seeds",
        left=("contrast",),
        right=tuple(f"{n} seeds: {where}" for n in numbers for where in ("all sizes", "one size")),
    )
    for gap in gaps:
        found = (value for n in numbers for value in gap.by_seeds[n])
        table.add_row(
            f"{gap.arm} against {gap.against}", *("–" if value is None else f"{value:.2g}" for value in found)
        )
    console.print(table)


def say_not_compared(say: Callable[[str], None], config: StudyConfig) -> None:
    """Print the comparisons that the analysis will not make for this study file, with the reasons."""
    for line in not_compared(config):
        say(f"note: {line}")


def show_outcome(console: Console, outcome: Outcome, config: StudyConfig, folder: StudyDirectory) -> None:
    """Print how a run ended, what is wrong, and what to do next."""
    failed = f", {outcome.n_failed} failed" if outcome.n_failed else ""
    skipped = f", {outcome.n_skipped} skipped" if outcome.n_skipped else ""
    stopped = f", {outcome.n_stopped} stopped early" if outcome.n_stopped else ""
    say(
        console,
        f"{config.name}: {outcome.n_trials} trials{skipped}{stopped}, {outcome.n_complete} runs complete{failed}",
    )
    if outcome.search_ended is not None:
        say(console, outcome.search_ended)
    if outcome.aborted is not None:
        missing = f"stopped early with {outcome.n_missing} runs missing"
        say(console, f"{missing}: {outcome.aborted}; fix this, then give the same command again", is_trouble=True)
    if outcome.tracking_trouble is not None:
        what_next = f"fix this, then: mpo-study sync {folder.path}"
        say(console, f"some runs are not in MLflow: {outcome.tracking_trouble}; {what_next}", is_trouble=True)
    if outcome.backup_trouble is not None:
        say(
            console,
            f"the last backup of the study's databases failed: {outcome.backup_trouble}; fix this, then give the "
            "same command again",
            is_trouble=True,
        )
    nothing_succeeded = not outcome.n_complete and not outcome.n_missing
    uri = folder.tracking_uri()
    if uri is None and not nothing_succeeded:
        say(console, f"tracking is off; to write the runs to MLflow: mpo-study sync {folder.path}")
    elif uri is not None:
        where = folder.mlflow_database if uri == DEFAULT_TRACKING_URI else hide_password(uri)
        say(console, f"MLflow:  {where}  (to view it: mpo-study ui {folder.path})")
    if nothing_succeeded:
        why = f"all {outcome.n_failed} runs failed" if outcome.n_failed else "every trial was skipped"
        what_next = f"for the reasons: mpo-study status {folder.path}"
        say(console, f"nothing succeeded: {why}, so there is nothing to report; {what_next}", is_trouble=True)
    elif uri is not None:
        say(console, f"report:  mpo-analysis report {folder.path}")


def show_status(console: Console, now: StudyStatus, folder: StudyDirectory) -> None:
    """Print every trial, the failures with their reasons, the frontier so far, and the missing work."""
    table = _table(
        console,
        f"{now.name}: {len(now.seeds)} seeds for each trial",
        left=("trial", "arm", "what"),
        right=("rate", "parameters", "complete", "failed", "left", "val loss"),
    )
    for row in now.trials:
        trial = row.trial
        table.add_row(
            str(trial.number),
            _cut(console, trial.spec.arm),
            _cut(console, _what(trial.spec) + _note(trial)),
            f"{trial.spec.protocol.learning_rate:.3g}",
            f"{trial.shape.n_params:,}",
            str(len(row.complete)),
            str(len(row.failed)),
            str(len(row.missing)),
            (f"{row.val_loss:.4f}" if row.val_loss is not None else "–") + (" *" if row.on_frontier else "  "),
        )
    console.print(table)
    if now.frontier:
        _say_words(console, "* on the frontier so far: no trial with as many or fewer parameters has a lower mean loss")
    elif now.n_complete:
        _say_words(console, f"no frontier yet: no trial has {MIN_SEEDS} complete seeds and no failed seed")
    if now.n_unasked:
        _say_words(console, f"and {now.n_unasked} trials that have not begun")
    if now.search_ended is not None:
        _say_words(console, now.search_ended)
    for result in now.failures:
        step = f" (step {result.failure_step})" if result.failure_step is not None else ""
        _say_words(console, f"failed: trial {result.trial} seed {result.seed}{step}: {result.failure}")
    for silence in now.running:
        if silence.is_long:
            _say_words(console, str(silence), style="red")
    again = f"mpo-study run {folder.study_file} --dir {folder.path}"
    if any(result.failure_step is None for result in now.failures):
        _say_command(console, "to train failed runs again, except diverged ones", f"{again} --retry-failed")
    if now.n_missing:
        _say_what_is_left(console, now, again)
    elif not now.n_complete:
        _say_words(console, _nothing_succeeded(now))
    elif folder.tracking_uri() is None:
        _say_command(console, "complete; to write its runs to MLflow", f"mpo-study sync {folder.path}")
    else:
        _say_command(console, "complete; report", f"mpo-analysis report {folder.path}")


def _say_what_is_left(console: Console, now: StudyStatus, again: str) -> None:
    over = f"{now.n_complete + now.n_failed} runs done, {now.n_missing} missing"
    work = f", {_duration(now.run_seconds_left)} one after another" if now.run_seconds_left is not None else ""
    if now.driver is None:
        _say_command(console, f"{over}{work}; no driver is running. To continue", again)
        return
    who = f"process {now.driver.get('pid', 'unknown')} on {now.driver.get('host', 'some host')}"
    left = f"about {_duration(now.seconds_left)} left" if now.seconds_left is not None else "time left unknown"
    _say_words(console, f"{over}{work}; {who} is running the study: {left}")


def _say_words(console: Console, line: str, style: str | None = None) -> None:
    """Print a line, which a terminal gets wrapped between words."""
    console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)


def _say_command(console: Console, words: str, command: str) -> None:
    """Print what a command is for, and the command; the command gets its own line if a terminal is too narrow."""
    if console.is_terminal and len(words) + len(command) + 2 > console.width:
        _say_words(console, f"{words}:")
        say(console, f"  {command}")
    else:
        say(console, f"{words}: {command}")


def _nothing_succeeded(now: StudyStatus) -> str:
    """Advice for a study that ended without a successful run."""
    if not now.n_failed:
        why, what_next = "every trial was skipped", "widen the limits of the search in the study file"
    elif any(result.failure_step is None for result in now.failures):
        return f"nothing succeeded: all {now.n_failed} runs failed; fix the cause, then give the command above"
    else:
        why, what_next = f"all {now.n_failed} runs diverged", "lower the learning rates in the study file"
    return f"nothing succeeded: {why}; {what_next}, and run it in a new folder (--dir)"


def _table(console: Console, title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0 if console.width < 110 else 1),
    )
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _cut(console: Console, text: str) -> str | Text:
    """A cell that a terminal cuts to fit the row; elsewhere it is printed in full."""
    return Text(text, no_wrap=True, overflow="ellipsis") if console.is_terminal else text


def _what(spec: TrialSpec) -> str:
    own, width = spec.protocol.embedding_learning_rate, spec.protocol.rate_width
    rates = f", embeddings {own:g}" if own is not None else ""
    return _shape(spec) + rates + (f", rates of d_model={width}" if width is not None else "")


def _shape(spec: TrialSpec) -> str:
    healed = f", {spec.heal.shown}" if spec.heal is not None else ""
    if spec.family == "dense":
        size = f"d_model={spec.model.width}" if spec.model.width else spec.model.named
        return size + (f", from {spec.start}" if spec.start is not None else "") + healed
    if spec.keep is not None:
        narrow, gauge = (" fewer hidden units" if spec.narrow else "", " fixed gauge" if spec.gauge == "fixed" else "")
        own = f", {spec.options_shown}" if spec.options is not None else ""
        of = f"{spec.family}, {spec.size}{own}, {spec.metric}, {spec.spread}{gauge}{narrow}"
        return f"{of}, from {spec.start}{healed}"
    own = f" {spec.options_shown}" if spec.options is not None else ""
    sites = f" L={spec.n_sites}" if spec.n_sites is not None else ""
    size = f"χ={spec.chi}" if spec.family == "mpo" else f"{spec.family} as χ={spec.as_chi}"
    start = f"from {spec.start} ({spec.refinement})" if spec.start is not None else spec.init
    gauge = " fixed gauge" if spec.gauge == "fixed" else ""
    changing = f", bonds {spec.bonds.shown}" if spec.bonds is not None else ""
    changing += f", one core at a time for {spec.sweep.every} steps" if spec.sweep is not None else ""
    return f"{size} {spec.factorisation}{sites}{own}{gauge}, {start}{changing}{healed}"


def _note(trial: Trial) -> str:
    """Why not all seeds of a trial are trained."""
    if trial.duplicate_of is not None:
        return f" (repeats trial {trial.duplicate_of})"
    if trial.skipped is not None:
        return f" (skipped: {trial.skipped.reason})"
    return f" (stopped: {trial.stop.reason})" if trial.stop is not None else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
