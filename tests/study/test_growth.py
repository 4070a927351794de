from __future__ import annotations

import shutil

import pytest
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    TUNED,
    cli,
    ledger_at,
    made_up,
    mlflow_template,  # noqa: F401 (a fixture)
    nothing_left_running,  # noqa: F401 (a fixture)
    optuna_states,
    printed_by_run,
    results_at,
    run_at,
    runs_in,
    sign_results,
    start_cli,
    substance,
    write_search,
    write_study,
)

from analysis import run_schema as schema
from analysis.results.comparisons import compare
from analysis.results.summary import VAL_LOSS, frontier_key, summarise
from analysis.runs.load import load_study, resolve_study
from study.commands.status import study_status
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth, grow, parse_more
from study.ledger.snapshot import read_ledger
from study.scheduler.inline import run_inline

pytestmark = pytest.mark.filterwarnings(
    "ignore::optuna.exceptions.ExperimentalWarning", "ignore:::mlflow", "ignore::DeprecationWarning"
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


@pytest.fixture
def interrupted(monkeypatch):
    """Presses Ctrl-C at that evaluation of a run of a study."""

    def run(after, file, folder, **options):
        n_evaluations = 0

        def stopping(queue, on_evaluation):
            def count(*evaluation):
                nonlocal n_evaluations
                n_evaluations += 1
                if n_evaluations == after:
                    raise KeyboardInterrupt
                on_evaluation(*evaluation)

            run_inline(queue, count)

        with monkeypatch.context() as patched:
            patched.setattr("study.commands.run.run_inline", stopping)
            with pytest.raises(KeyboardInterrupt):
                run_at(file, folder, **options)

    return run


def ledger_of(folder, name="tiny"):
    return read_ledger(StudyDirectory(folder).ledger_url, name)


# The options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5", "+0", "-5", "+", "+five", "+5.0", "", "++5"])
def test_parse_more_refuses_what_is_not_plus_and_a_number(text):
    with pytest.raises(StudyError, match=r"--seeds .*: must be \+ and a whole number"):
        parse_more("--seeds", text)


def test_parse_more_reads_plus_and_a_number():
    assert (parse_more("--seeds", "+12"), parse_more("--seeds", None)) == (12, 0)


# By searched trials ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_search_grown_is_the_search_begun_larger(tmp_path, folder, interrupted, sampler):
    small, large = (write_search(tmp_path / str(n), sampler=sampler, trials=n, seeds=1) for n in (6, 13))
    run_at(small, folder)
    growth = Growth(trials=7)
    interrupted(9, small, folder, growth=growth)
    interrupted(6, small, folder)  # the same command without the option keeps the grown size
    outcome, printed = printed_by_run(small, folder, tracking="off", growth=growth)
    assert "continuing: this study has already grown by --trials +7; " in printed
    assert (outcome.n_trials, outcome.n_missing) == (14, 0)

    run_at(large, tmp_path / "whole")
    grown, whole = (ledger_of(path, f"search-{sampler}") for path in (folder, tmp_path / "whole"))
    assert [trial.spec for trial in grown.trials] == [trial.spec for trial in whole.trials]
    urls = [StudyDirectory(path).ledger_url for path in (folder, tmp_path / "whole")]
    assert optuna_states(urls[0]) == optuna_states(urls[1])
    assert substance(folder, f"search-{sampler}") == substance(tmp_path / "whole", f"search-{sampler}")
    ledgers = [ledger_at(small, folder), ledger_at(large, tmp_path / "whole")]
    assert ledgers[0].trials == ledgers[1].trials  # budgets included, which count all that tuning chose from


def test_growth_by_trials_again_when_it_is_over_grows_again(tmp_path, folder):
    file = write_search(tmp_path, trials=1, seeds=1)
    for n_trials in (2, 4, 6):
        outcome = run_at(file, folder, growth=Growth(trials=2 if n_trials > 2 else 0))
        assert (outcome.n_trials, outcome.n_missing) == (n_trials, 0)
    assert StudyDirectory(folder).load_config().search.trials == 5


def test_growth_is_refused_where_nothing_is_searched_or_nothing_was_begun(tmp_path, folder):
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    with pytest.raises(
        StudyError, match=r"no study here that could grow by --trials \+5; run it without that option first"
    ):
        run_at(file, folder, growth=Growth(trials=5))
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(StudyError, match="no study here that could grow"):
        run_at(file, folder, growth=Growth(seeds=1))
    assert not list(folder.iterdir())
    run_at(file, folder)
    with pytest.raises(StudyError, match=r"--trials \+5: no arm of study tiny has searched values; add listed values"):
        run_at(file, folder, growth=Growth(trials=5))
    assert run_at(file, folder).n_trials == 1


# By seeds -------------------------------------------------------------------------------------------------------------

CLIPPED = {"name": "clipped", "family": "mpo", "chi": [500, 1000]}
"""At d_model 8 no bond reaches 500: the second one repeats the first."""


@pytest.mark.slow
def test_growth_by_seeds_with_starts_and_duplicates_reaches_ledger_and_mlflow(
    tmp_path,
    folder,
    interrupted,
    mlflow_template,  # noqa: F811
):
    arms = [DENSE, CLIPPED, TUNED]
    file = write_study(tmp_path, arms=arms)
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    run_at(file, folder, tracking=None)
    told = optuna_states(StudyDirectory(folder).ledger_url)
    means = parents(folder)
    interrupted(3, file, folder, tracking=None, growth=Growth(seeds=2))
    interrupted(6, file, folder, tracking=None)
    assert parents(folder)[0][:2] == ("KILLED", 3)  # of four: nothing trains the last one now
    outcome = run_at(file, folder, tracking=None)
    assert (outcome.n_trials, outcome.n_complete, outcome.n_missing) == (4, 12, 0)
    assert optuna_states(StudyDirectory(folder).ledger_url) == told  # the sampler keeps what it was told first

    run_at(write_study(tmp_path / "large", arms=arms, seeds=4), tmp_path / "whole")
    assert substance(folder) == substance(tmp_path / "whole")
    for number, (status, n_seeds, mean) in parents(folder).items():
        losses = [
            r.final["final/val_loss"] for (n, _), r in results_at(folder).items() if n == {2: 1}.get(number, number)
        ]
        assert (status, n_seeds, len(losses)) == ("FINISHED", 4, 4)
        assert mean == pytest.approx(sum(losses) / 4)
        assert mean != means[number][2]
    runs = runs_in(folder / "mlflow.db")
    assert {len(same) for same in runs.values()} == {1}
    assert len(runs) == 1 + 4 + 12


def parents(folder):
    """Status, number of seeds and mean loss of each trial's own run in MLflow."""
    found = {}
    for [run] in runs_in(folder / "mlflow.db").values():
        if run.data.tags[schema.KIND] == schema.KIND_TRIAL:
            metrics = run.data.metrics
            mean = metrics[schema.mean_key("final/val_loss")]
            found[int(run.data.params["trial"])] = (run.info.status, metrics[schema.N_SEEDS], mean)
    return dict(sorted(found.items()))


def test_growth_by_seeds_leaves_what_the_sampler_hears_alone(tmp_path, folder):
    """It hears the means over the first seeds, of trials that came before the growth and after."""
    file = write_search(tmp_path, sampler="tpe", trials=4, objectives=["val_loss"])
    ledger = ledger_at(file, folder)
    StudyDirectory(folder).write(ledger.config, ledger.uuid, None, "")
    ledger.ask()
    ledger.ask()
    ledger.record(made_up(1, 0, loss=1.0))
    assert grow(ledger, Growth(seeds=1), lambda line: None)
    ledger.close()
    ledger = ledger_at(file, folder)
    assert ledger.tally.missing_seeds(ledger.trials[1]) == [1, 2]
    ledger.record(made_up(1, 1, loss=3.0))
    url = StudyDirectory(folder).ledger_url
    assert optuna_states(url)[1] == ("COMPLETE", [2.0])
    ledger.record(made_up(1, 2, loss=50.0))
    ledger.ask()
    for seed in (0, 1, 2):
        ledger.record(made_up(2, seed, loss=seed))
    assert optuna_states(url)[1:] == [("COMPLETE", [2.0]), ("COMPLETE", [0.5])]


def test_growth_by_seeds_goes_on_after_the_largest_of_a_list(tmp_path, folder):
    file = write_study(tmp_path, seeds=[7, 3], arms=[DENSE])
    run_at(file, folder)
    run_at(file, folder, growth=Growth(seeds=2))
    assert sorted(results_at(folder)) == [(0, 3), (0, 7), (0, 8), (0, 9)]


def test_growth_beyond_what_a_study_file_may_say_is_refused_and_not_recorded(tmp_path, folder):
    file = write_study(tmp_path, seeds=[2147483646], arms=[DENSE])
    run_at(file, folder)
    with pytest.raises(StudyError, match=r"--seeds \+5: the study cannot grow this way: Input should be less than"):
        run_at(file, folder, growth=Growth(seeds=5))
    assert run_at(file, folder).n_complete == 1


def test_growth_goes_on_from_a_ledger_whose_folder_has_nothing_else(tmp_path, folder):
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    run_at(file, folder)
    for path in folder.iterdir():  # as a backup brings it back
        if path.is_file() and path.name != "ledger.db":
            path.unlink()
    assert run_at(file, folder, growth=Growth(seeds=1)).n_complete == 2


def test_cli_takes_one_way_to_grow_at_a_time(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_study(tmp_path)
    code, out, err = command("run", file, "--dir", "kept", "--extend", "--seeds", "+1")
    assert (code, out) == (2, "")
    assert (
        err
        == "mpo-study: --extend and --seeds +1: not allowed in one command; give one, then the other in a second run\n"
    )


# By what the file adds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_study_file_that_only_adds_extends_a_study_when_told_to(tmp_path, folder):
    run_at(write_study(tmp_path, arms=[DENSE, MPO]), folder)
    run_at(write_study(tmp_path, arms=[DENSE, MPO]), folder, growth=Growth(seeds=1))
    before = results_at(folder)
    # A longer list, a start whose weights were not kept, an arm of its own, and the seeds as the file had them.
    arms = [TUNED, DENSE, MPO | {"chi": [2, 3, 4]}, {"name": "narrow", "family": "dense", "d_model": 4}]
    file = write_study(tmp_path, arms=arms)
    with pytest.raises(StudyError) as error:
        run_at(file, folder)
    assert "it differs in arms.mpo.chi (was [2, 4], now [2, 3, 4]), arms.narrow (was null, now {" in str(error.value)
    assert "the file only adds to the study: give --extend to add that" in str(error.value)
    assert "\n" not in str(error.value)
    assert results_at(folder) == before

    outcome, printed = printed_by_run(file, folder, tracking="off", growth=Growth(extend=True))
    assert (outcome.n_trials, outcome.n_complete, outcome.n_missing) == (6, 18, 0)
    assert printed.count("arm dense, seed ") == printed.count("its weights are not in ") == 3
    assert {key: results_at(folder)[key].curve for key in before} == {key: r.curve for key, r in before.items()}
    assert run_at(file, folder) == outcome  # the file, and the one that it was before, are the study's now
    assert run_at(write_study(tmp_path / "old", arms=[DENSE, MPO]), folder) == outcome
    run_at(write_study(tmp_path / "large", seeds=3, arms=arms), tmp_path / "whole")
    assert substance(folder) == substance(tmp_path / "whole")


def test_study_file_that_takes_away_is_refused_even_to_extend(tmp_path, folder):
    ledger_at(write_study(tmp_path), folder).close()
    for override in ("seeds=1", "arms.tuned.chi=3", "protocol.steps=9"):
        with pytest.raises(StudyError, match="undo the change, or begin a new study"):
            run_at(write_study(tmp_path), folder, override, growth=Growth(extend=True))


def test_extended_search_rewrites_the_budgets_that_mlflow_has(tmp_path, folder, mlflow_template):  # noqa: F811
    arm = {"name": "mpo", "family": "mpo", "chi": 2, "learning_rate": [0.01, 0.02]}
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE, arm]), folder, tracking=None)
    before = {key: runs[0].info.run_id for key, runs in runs_in(folder / "mlflow.db").items()}
    file = write_study(tmp_path, seeds=1, arms=[DENSE, arm | {"learning_rate": [0.01, 0.02, 0.04]}])
    run_at(file, folder, tracking=None, growth=Growth(extend=True))
    runs = runs_in(folder / "mlflow.db")
    assert {len(same) for same in runs.values()} == {1}
    params = [run.data.params for [run] in runs.values() if "trial" in run.data.params]
    assert {(p["arm"], p["tuning_trials"]) for p in params} == {("dense", "1"), ("mpo", "3")}
    assert len({p["budget_hash"] for p in params if p["arm"] == "mpo"}) == 1
    assert len(params) == 2 * 4
    dense = schema.run_key(StudyDirectory(folder).uuid(), 0, 0)
    assert runs[dense][0].info.run_id == before[dense]  # its budget is as it was


def test_arm_that_others_start_from_is_trained_even_where_it_repeats_a_trial(tmp_path, folder):
    searched = {"name": "found", "family": "dense", "learning_rate": {"choices": [0.01]}}
    run_at(write_search(tmp_path, trials=1, seeds=1, arms=[searched]), folder)
    file = write_search(tmp_path, trials=1, seeds=1, arms=[searched, DENSE, TUNED])
    outcome = run_at(file, folder, growth=Growth(extend=True))
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (3, 0, 0)


def test_arm_that_repeats_a_trial_cannot_become_a_start_later(tmp_path, folder):
    searched = {"name": "found", "family": "dense", "learning_rate": {"choices": [0.01]}}
    arms = [searched]
    run_at(write_search(tmp_path, trials=1, seeds=1, arms=arms), folder)
    grown = write_search(tmp_path, trials=1, seeds=1, arms=[searched, DENSE])
    assert run_at(grown, folder, growth=Growth(extend=True)).n_missing == 0
    file = write_search(tmp_path, trials=1, seeds=1, arms=[searched, DENSE, TUNED])
    with pytest.raises(StudyError, match="arm dense cannot be a start: its trial 1 repeats trial 0"):
        run_at(file, folder, growth=Growth(extend=True))
    grown = write_search(tmp_path, trials=1, seeds=1, arms=[searched, DENSE])
    assert run_at(grown, folder).n_missing == 0  # and nothing of what was refused is on record


# Where the frontier is undecided --------------------------------------------------------------------------------------


def decide(file, folder, losses):
    """Record these losses for the trials of a study, seed by seed, and give its folder a manifest."""
    ledger = ledger_at(file, folder)
    while ledger.ask() is not None:
        pass
    for number, of_seeds in enumerate(losses):
        for seed, loss in enumerate(of_seeds):
            ledger.record(made_up(number, seed, loss=loss))
    StudyDirectory(folder).write(ledger.config, ledger.uuid, None, StudyDirectory(folder).storage_url())
    ledger.close()


@pytest.mark.slow
def test_refine_adds_seeds_near_the_frontier_and_to_starts_alone(tmp_path, folder, interrupted):
    arms = [{"name": "small", "family": "mpo", "chi": 1}, DENSE, MPO | {"chi": [2, 3]}, TUNED | {"chi": 4}, CLIPPED]
    file = write_study(tmp_path, arms=arms, seeds=3)
    # By size: small (chi 1), mpo 2, mpo 3, tuned 4, dense and the clipped ones; trials in the order of the file.
    run_at(file, folder)
    with_losses(folder, [(n, n + 0.01, n) for n in (9.0, 4.0, 3.0, 5.0)] + [(2.5, 3.6, 3.0), (8.0, 8.01, 8.0)])
    growth = Growth(refine=2)
    interrupted(3, file, folder, growth=growth)
    with pytest.raises(StudyError, match=r"study tiny is not finished: \d runs are missing, .*; run it again first"):
        run_at(file, folder, growth=Growth(refine=3))
    outcome, printed = printed_by_run(file, folder, tracking="off", growth=growth)
    assert "continuing: this study has already grown by refine --on frontier --seeds +2" in printed
    assert (outcome.n_complete, outcome.n_missing) == (18 + 8, 0)
    seeds = {number: sorted(seed for n, seed in results_at(folder) if n == number) for number in range(6)}
    few, more = [0, 1, 2], [0, 1, 2, 3, 4]
    assert seeds == {0: more, 1: more, 2: more, 3: few, 4: more, 5: few}
    ledger = ledger_at(file, folder)
    assert [len(ledger.tally.seeds_of(trial)) for trial in ledger.trials.values()] == [5, 5, 5, 3, 5, 3, 3]
    assert ledger.config.seeds == 3
    ledger.close()

    # All others get the same seeds when the whole study grows: results stay comparable seed by seed.
    outcome = run_at(file, folder, growth=Growth(seeds=1))
    assert (outcome.n_complete, outcome.n_missing) == (26 + 2, 0)
    assert sorted(seed for n, seed in results_at(folder) if n == 3) == [0, 1, 2, 3]


SURE = (0.0, 0.001, 0.002)


def fill(ledger, means, spread=SURE, failed=()):
    """Record made-up results: the mean of each trial plus the spread over its seeds; a first seed may have failed."""
    while ledger.ask() is not None:
        pass
    for number, mean in enumerate(means):
        for seed, off in zip(ledger.tally.missing_seeds(ledger.trials[number]), spread, strict=False):
            failure = "lost" if number in failed and seed == 0 else None
            ledger.record(made_up(number, seed, loss=mean + off, failure=failure))


@pytest.mark.parametrize(
    ("failed", "more"),
    [
        ((), {0: [3], 1: [3], 2: [3], 3: [3], 5: [3]}),  # no control stands for chi 4: the nearest one
        ((0,), {1: [3], 2: [3], 3: [3], 5: [3]}),  # of a reference that failed nothing is claimed
    ],
)
def test_refine_brings_along_what_a_trial_is_compared_with(tmp_path, folder, failed, more):
    arms = [DENSE, {"name": "control", "family": "low_rank", "as_chi": [2, 3]}, MPO | {"chi": [2, 3, 4]}]
    claims = {"contrasts": [{"arm": "mpo", "against": "control"}]}
    ledger = ledger_at(write_study(tmp_path, arms=arms, seeds=3, claims=claims), folder)
    fill(ledger, [9.0, 9.0, 9.0, 2.0, 9.0, 1.9], failed=failed)
    lines = []
    assert grow(ledger, Growth(refine=1), lines.append)
    assert ledger_of(folder).growths.more_seeds == more
    assert "which these are compared with or start from" in lines[0]
    ledger.close()


def test_a_trial_that_a_refinement_left_out_does_not_come_back(tmp_path, folder):
    file = write_study(tmp_path, arms=[MPO | {"chi": [2, 3, 4]}], seeds=3)
    ledger = ledger_at(file, folder)
    fill(ledger, [3.0, 4.0, 2.0])
    assert grow(ledger, Growth(refine=1), lambda line: None)
    assert ledger_of(folder).growths.more_seeds == {0: [3], 2: [3]}
    ledger.close()
    ledger = ledger_at(file, folder)
    fill(ledger, [3.0, 4.0, 50.0])
    ledger.close()
    ledger = ledger_at(file, folder)
    assert grow(ledger, Growth(refine=2), lambda line: None)
    assert ledger_of(folder).growths.more_seeds == {0: [3, 4, 5], 2: [3, 4, 5]}  # trial 1 is nearer now
    ledger.close()


# Until contrasts are decided ------------------------------------------------------------------------------------------

LOOKS = {"contrasts": [{"arm": "mpo", "against": "control"}], "looks": {3: 0.01, 5: 0.04}}
TWO_ARMS = [{"name": "control", "family": "low_rank", "as_chi": [2, 3]}, MPO | {"chi": [2, 3]}]


def opened_with(tmp_path, folder, losses, **changes):
    """A ledger with these losses of each trial, by seed."""
    file = write_study(tmp_path, **{"arms": TWO_ARMS, "seeds": 3, "claims": LOOKS} | changes)
    ledger = ledger_at(file, folder)
    while ledger.ask() is not None:
        pass
    for number, of_seeds in enumerate(losses):
        for seed in ledger.tally.missing_seeds(ledger.trials[number]):
            ledger.record(made_up(number, seed, loss=of_seeds[seed]))
    return ledger


def test_contrasts_that_are_undecided_get_the_seeds_of_the_next_look(tmp_path, folder):
    sure, wide = (2.0, 2.0001, 1.9999, 2.0, 2.0), (1.9, 2.1, 2.0, 2.05, 1.95)
    # Trials 0 and 2 are of χ 2, and decided at once; trials 1 and 3 are alike; their mean over sizes is decided too.
    losses = [sure, wide, [loss + 90 for loss in sure], [loss + 0.01 for loss in wide]]
    ledger, lines = opened_with(tmp_path, folder, losses), []
    assert grow(ledger, Growth(contrasts=True), lines.append)
    assert lines == ["1 pair of trials undecided; seeds for the next look: trials 1, 3; in total 4 runs"]
    assert ledger_of(folder).growths.more_seeds == {1: [3, 4], 3: [3, 4]}
    ledger.close()
    ledger = opened_with(tmp_path, folder, losses)
    assert not grow(ledger, Growth(contrasts=True), lines.append)
    assert lines[1:] == ["nothing to refine: 1 pair of trials undecided, and this was the last look"]
    ledger.close()


def test_undecided_mean_over_sizes_takes_all_sizes_and_their_starts(tmp_path, folder):
    wide = (1.0, 3.0, 2.0)
    arms = [DENSE, *({**arm, "start": "dense", "steps": 3} for arm in TWO_ARMS)]
    ledger = opened_with(tmp_path, folder, [wide] * 5, arms=arms)
    lines = []
    assert grow(ledger, Growth(contrasts=True), lines.append)
    assert ledger_of(folder).growths.more_seeds == {number: [3, 4] for number in range(5)}
    assert lines[0].endswith("trials 1, 2, 3, 4; also for trial 0, which these start from; in total 10 runs"), lines
    ledger.close()


@pytest.mark.slow
def test_refine_runs_the_next_look_and_the_report_shows_it(tmp_path, folder, mlflow_template, command):  # noqa: F811
    claims = LOOKS | {"looks": {3: 0.01, 4: 0.04}}
    file = write_study(tmp_path, arms=TWO_ARMS, seeds=3, claims=claims)
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    run_at(file, folder, tracking=None)
    wide = (2.0, 3.0, 2.5)
    with_losses(folder, [(2.0, 2.0001, 2.0002), wide, (50.0, 50.0001, 50.0002), wide])
    code, out, err = command("refine", folder, "--on", "contrasts", "--executor", "inline")
    assert (code, err) == (0, "")
    assert "seeds for the next look: trials " in out
    assert command("sync", folder)[0] == 0
    runs = load_study(resolve_study(folder))
    compared = compare(runs, summarise(runs)).pairs
    of_loss = compared[compared["declared"] & (compared["measure"] == "val_loss")].set_index("trial")
    assert of_loss["verdict"].to_dict() == {2: "worse", 3: "undecided"}
    assert of_loss["n"].to_dict() == {2: 3, 3: 4}


def test_contrasts_that_are_decided_get_no_seeds(tmp_path, folder):
    ledger, lines = opened_with(tmp_path, folder, [(n, n + 0.001, n + 0.002) for n in (1, 1, 50, 60)]), []
    assert not grow(ledger, Growth(contrasts=True), lines.append)
    assert lines == ["nothing to refine: no declared contrast is undecided"]
    ledger.close()


def test_contrasts_at_different_looks_go_on_each_to_its_own(tmp_path, folder):
    """Trial 0 is the rival of both: it needs the larger number of seeds."""
    looks = {3: 0.005, 5: 0.015, 8: 0.03}
    claims = {"contrasts": [{"arm": "mpo", "against": "dense"}], "looks": looks}
    wide = (1.9, 2.1, 2.0, 2.05, 1.95)
    ledger = opened_with(tmp_path, folder, [wide] * 2, arms=[DENSE, MPO | {"chi": [2]}], claims=claims)
    assert grow(ledger, Growth(contrasts=True), lambda line: None)
    ledger.close()
    arms = [DENSE, MPO | {"chi": [2, 3]}]
    file = write_study(tmp_path, arms=arms, seeds=3, claims=claims)
    ledger = ledger_at(file, folder, extend=True)
    ledger.close()
    ledger, lines = opened_with(tmp_path, folder, [wide] * 3, arms=arms, claims=claims), []
    assert {number: ledger.tally.seeds_of(trial) for number, trial in ledger.trials.items()} == {
        0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4], 2: [0, 1, 2],
    }  # fmt: skip
    assert grow(ledger, Growth(contrasts=True), lines.append)
    ledger.close()
    ledger = ledger_at(file, folder)
    assert {number: len(ledger.tally.seeds_of(trial)) for number, trial in ledger.trials.items()} == {0: 8, 1: 8, 2: 5}
    ledger.close()


def test_contrasts_of_a_study_whose_seeds_all_failed_are_not_refined(tmp_path, folder):
    ledger, lines = ledger_at(write_study(tmp_path, arms=TWO_ARMS, seeds=3, claims=LOOKS), folder), []
    while ledger.ask() is not None:
        pass
    for number in range(4):
        for seed in range(3):
            ledger.record(made_up(number, seed, failure="lost"))
    assert not grow(ledger, Growth(contrasts=True), lines.append)
    assert lines == ["nothing to refine: no declared contrast is undecided"]
    assert not grow(ledger, Growth(refine=1), lines.append)
    assert lines[1:] == ["nothing to refine: no trial has complete seeds"]
    ledger.close()


@pytest.mark.parametrize("why", ["claims.looks take the first seeds", "refine has added seeds to some trials"])
def test_seeds_that_would_not_be_the_last_ones_are_refused(tmp_path, folder, why):
    """Which seeds are a trial's first ones would change."""
    losses = [(1.0, 2.0, 3.0, 1.5, 2.5)] * 4
    claims = LOOKS if "looks" in why else {"contrasts": LOOKS["contrasts"]}
    ledger = opened_with(tmp_path, folder, losses, claims=claims)
    if "refine" in why:
        assert grow(ledger, Growth(refine=1), lambda line: None)
    ledger.close()
    file = write_study(tmp_path, arms=TWO_ARMS, seeds=[0, 1, 2, 10, 11], claims=claims)
    with pytest.raises(StudyError, match=rf"^seeds: new ones must be 3 and following, since {why}; use --seeds \+2$"):
        ledger_at(file, folder, extend=True)
    ledger_at(write_study(tmp_path, arms=TWO_ARMS, seeds=5, claims=claims), folder, extend=True).close()


def test_contrasts_without_looks_are_not_refined(tmp_path, folder):
    ledger = opened_with(tmp_path, folder, [(1.0, 2.0, 3.0)] * 4, claims={"contrasts": LOOKS["contrasts"]})
    with pytest.raises(StudyError, match=r"^study tiny declares no `claims.looks`: .* refine --on frontier$"):
        grow(ledger, Growth(contrasts=True), lambda line: None)
    ledger.close()


def test_study_with_looks_grows_to_a_look_alone(tmp_path, folder):
    ledger = opened_with(tmp_path, folder, [(1.0, 2.0, 3.0)] * 4)
    with pytest.raises(StudyError, match=r"--seeds \+1: .*`seeds` must be as many as one of `claims.looks` \(3, 5\)"):
        grow(ledger, Growth(seeds=1), lambda line: None)
    assert grow(ledger, Growth(seeds=2), lambda line: None)
    ledger.close()


def with_losses(folder, losses):
    """Let the ledger have these losses in place of those that were trained."""
    import sqlite3

    with sqlite3.connect(folder / "ledger.db") as connection:
        for number, of_seeds in enumerate(losses):
            for seed, loss in enumerate(of_seeds):
                connection.execute(
                    "UPDATE mpo_result SET content = json_set(content, '$.final.\"final/val_loss\"', ?) "
                    "WHERE trial = ? AND seed = ?",
                    (loss, number, seed),
                )
    connection.close()
    sign_results(folder)


@pytest.mark.slow
def test_analysis_learns_what_was_over_when_a_study_grew(tmp_path, folder, mlflow_template):  # noqa: F811
    file = write_study(tmp_path, arms=[DENSE, MPO])
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    run_at(file, folder, tracking=None)
    assert load_study(resolve_study(folder)).growths == ()
    run_at(file, folder, tracking=None, growth=Growth(seeds=1))
    run_at(
        write_study(tmp_path, arms=[DENSE, MPO | {"chi": [2, 3, 4]}]), folder, tracking=None, growth=Growth(extend=True)
    )
    decide(file, folder, [(3.0, 3.001, 3.0), (1.0, 8.0, 1.0), (4.0, 4.0, 4.0), (9.0, 9.0, 9.0)])
    run_at(file, folder, tracking=None, growth=Growth(refine=2))
    assert load_study(resolve_study(folder)).growths == (
        ("tiny", "--seeds +1", 2, 3, 6),
        ("tiny", "--extend", 3, 3, 9),
        ("tiny", "refine --on frontier --seeds +2", 3, 3, 12),
    )


@pytest.mark.slow
def test_refined_trials_have_their_own_number_of_seeds_in_mlflow(tmp_path, folder, mlflow_template):  # noqa: F811
    file = write_study(tmp_path, arms=[MPO | {"chi": [2, 3, 4]}], seeds=3)
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    decide(file, folder, [(3.0, 3.001, 3.0), (4.0, 4.001, 4.0), (1.0, 1.2, 1.0)])
    run_at(file, folder, tracking=None, growth=Growth(refine=1))
    n_seeds = {number: one[:2] for number, one in parents(folder).items()}
    assert n_seeds == {0: ("FINISHED", 4), 1: ("FINISHED", 3), 2: ("FINISHED", 4)}
    # What is on the frontier, status and report agree on.
    summary = summarise(load_study(resolve_study(folder))).set_index("trial")
    on = [point.trial for point in study_status(StudyDirectory(folder)).frontier]
    assert sorted(on) == sorted(summary.index[summary[frontier_key(VAL_LOSS)]])
    assert on


# By the command line --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cli_grows_a_study(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_search(tmp_path, trials=2, seeds=1)
    inline = ("--dir", "kept", "--executor", "inline", "--tracking", "off")
    assert command("run", file, *inline)[0] == 0
    code, out, err = command("run", file, *inline, "--trials", "+1", "--seeds", "+1")
    assert (code, err) == (0, "")
    assert "grown by --trials +1 --seeds +1: 3 searched trials, 2 seeds, was 2 searched trials, 1 seeds" in out
    assert "4 trials, 8 runs complete" in out
    code, out, err = command("refine", "kept", "--seeds", "+1", *inline[2:])
    assert (code, err) == (0, "")
    code, _, err = command("refine", "kept", "--seeds", "3")
    assert code == 2
    assert err == "mpo-study: --seeds 3: must be + and a whole number, for example --seeds +5\n"
    code, _, err = command("refine", "kept")
    assert (code, err) == (2, "mpo-study: --seeds: needed with --on frontier, for example --seeds +5\n")
    code, _, err = command("refine", "kept", "--on", "contrasts", "--seeds", "+5")
    assert code == 2
    assert err.startswith("mpo-study: --seeds: not with --on contrasts, ")


@pytest.mark.fault
def test_growth_of_a_killed_driver_goes_on_with_the_same_command(tmp_path):
    file = write_search(tmp_path, trials=2, seeds=1, arms=[DENSE, SEARCHED])
    inline = ("--dir", "kept", "--executor", "inline", "--tracking", "off")
    assert cli("run", file, *inline, cwd=tmp_path)[0] == 0
    grown = ("run", file, *inline, "--trials", "+4")
    driver = start_cli(*grown, cwd=tmp_path)
    lines = [driver.stdout.readline() for _ in range(3)]
    driver.kill()
    driver.communicate()
    assert lines[0].startswith("grown by --trials +4")
    code, out, err = cli(*grown, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "continuing" in out
    assert "7 trials, 7 runs complete" in out
    run_at(write_search(tmp_path / "large", trials=6, seeds=1), tmp_path / "whole")
    assert substance(tmp_path / "kept", "search-random") == substance(tmp_path / "whole", "search-random")
