"""`mpo-study winners`: the winners of a finished study become a study file, to be measured again on fresh seeds."""

from __future__ import annotations

import math
import sqlite3
import statistics

import pytest
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    TUNED,
    ledger_at,
    made_up,
    results_at,
    run_at,
    sign_results,
    write_search,
    write_study,
)

from study.commands.winners import parse_seeds, write_winners
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.snapshot import read_ledger
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.training.loading import load_corpus

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

SEEDS = [100, 101]
RATES = [0.001, 0.1, 0.01]


def tuning(tmp_path, **changes):
    """The folder of a study that was really trained."""
    settings = {"seeds": SEEDS, "name": "tuning"} | changes
    folder = tmp_path / "results"
    run_at(write_study(tmp_path / "files", **settings), folder)
    return folder


def give_losses(folder, loss_of, name="tuning"):
    """Let the ledger have these losses, by the trial's configuration, in place of those that were trained."""
    trials = read_ledger(StudyDirectory(folder).ledger_url, name).trials
    with sqlite3.connect(folder / "ledger.db") as connection:
        for trial in trials:
            connection.execute(
                "UPDATE mpo_result SET content = json_set(content, '$.final.\"final/val_loss\"', ?) WHERE trial = ?",
                (float(loss_of(trial.spec)), trial.number),
            )
    connection.close()
    sign_results(folder)


def written(folder, file, **options):
    new = write_winners(StudyDirectory(folder), file, **options)
    assert load_config(file).arms == new.arms
    return new


# What is selected -----------------------------------------------------------------------------------------------------


def test_rates_with_the_best_mean_win_at_each_size_and_the_new_study_runs(tmp_path, monkeypatch, command):
    arms = [
        DENSE | {"learning_rate": RATES},
        {"name": "plain", "family": "dense", "init": "variance"},
        MPO | {"learning_rate": RATES, "chi": [2, 4]},
        TUNED | {"start": "plain", "learning_rate": RATES[:2]},
        {"name": "low-rank", "family": "low_rank", "as_chi": [3, 4], "learning_rate": RATES},
    ]
    contrasts = [{"arm": "mpo", "against": "dense"}, {"arm": "mpo", "against": "low-rank"}]
    claims = {"margins": {"val_loss": 0.03}, "contrasts": contrasts}
    folder = tuning(tmp_path, arms=arms, claims=claims, rel_error_chi=[8], model={"d_model": 16})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    code, out, err = command("winners", "results", "configs/final.yaml", "--seeds", "2")
    assert (code, err) == (0, "")
    assert "configs/final.yaml: 7 arms, 14 runs." in out

    old, snapshot = load_config(folder / "study.yaml"), read_ledger(StudyDirectory(folder).ledger_url, "tuning")
    losses = {}
    for trial in snapshot.trials:
        own = [r.final["final/val_loss"] for r in snapshot.results if r.trial == trial.number]
        size = trial.spec.chi or trial.spec.as_chi
        losses.setdefault((trial.spec.arm, size), {})[trial.spec.protocol.learning_rate] = statistics.fmean(own)
    best = {key: min(of_rate, key=of_rate.get) for key, of_rate in losses.items()}

    new = load_config(tmp_path / "configs" / "final.yaml")
    specs = listed_specs(new)
    of_arm = {"mpo-chi2": "mpo", "mpo-chi4": "mpo", "low-rank-as-chi3": "low-rank", "low-rank-as-chi4": "low-rank"}
    assert {
        (of_arm.get(spec.arm, spec.arm), spec.chi or spec.as_chi): spec.protocol.learning_rate for spec in specs
    } == best
    assert len(specs) == len(best) == 7
    assert [(arm.name, arm.tuned_among) for arm in new.arms] == [
        ("dense", 3),
        ("plain", None),
        ("mpo-chi2", 3),
        ("mpo-chi4", 3),
        ("tuned", 2),
        ("low-rank-as-chi3", 3),
        ("low-rank-as-chi4", 3),
    ]
    assert [(contrast.arm, contrast.against) for contrast in new.claims.contrasts] == [
        ("mpo-chi2", "dense"),
        ("mpo-chi4", "dense"),
        ("mpo-chi2", "low-rank-as-chi3"),
        ("mpo-chi4", "low-rank-as-chi4"),
    ]
    assert (new.name, new.seed_list, new.arm("plain")) == ("final", (0, 1), old.arm("plain"))
    assert new.claims.margins == old.claims.margins
    kept = ("model", "protocol", "rel_error_chi", "objectives", "execution", "search")
    assert [getattr(new, key) for key in kept] == [getattr(old, key) for key in kept]
    assert load_corpus(new.corpus.path, new.corpus.sha256).sha256 == snapshot.corpus_sha256
    text = (tmp_path / "configs" / "final.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert comment.startswith(
        "Written by `mpo-study winners results configs/final.yaml --seeds 2`: the winners of study tuning (UUID "
    )
    assert snapshot.uuid in comment
    assert "on the seeds 100, 101, to" in comment
    assert str(tmp_path) not in text
    assert max(map(len, text.splitlines())) <= 120

    code, out, err = command("plan", "configs/final.yaml")
    assert (code, err) == (0, "")
    assert "14 runs listed" in out
    outcome = run_at(tmp_path / "configs" / "final.yaml", tmp_path / "again")
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (14, 0, 0)
    hashes = {trial.spec.arm: trial.budget_hash for trial in read_ledger(ledger_of(tmp_path / "again"), "final").trials}
    tuned = {trial.spec.arm: trial.budget_hash for trial in snapshot.trials}
    assert {of_arm.get(arm, arm): budget for arm, budget in hashes.items()} == tuned  # tuning counts, wherever it was
    assert hashes["dense"] == hashes["mpo-chi2"] == hashes["low-rank-as-chi4"]


def ledger_of(folder):
    return StudyDirectory(folder).ledger_url


def test_of_equal_means_the_first_rate_wins(tmp_path):
    folder = tuning(tmp_path, arms=[DENSE, MPO | {"learning_rate": RATES}])
    give_losses(folder, lambda spec: 1.0)
    assert [arm.learning_rate for arm in written(folder, tmp_path / "new.yaml").arms] == [None, RATES[0], RATES[0]]
    give_losses(folder, lambda spec: abs(spec.protocol.learning_rate - (0.1 if spec.chi == 2 else 0.01)))
    assert [arm.learning_rate for arm in written(folder, tmp_path / "other.yaml").arms] == [None, 0.1, 0.01]


def test_seeds_that_single_trials_were_given_more_count_in_what_is_selected(tmp_path):
    file, folder = write_study(tmp_path, seeds=SEEDS, arms=[DENSE | {"learning_rate": [0.001, 0.1]}]), tmp_path / "kept"
    for more in (None, {0: [102], 1: [102]}):
        ledger = ledger_at(file, folder)
        if more is not None:
            ledger.record_growth("refine --seeds +1", more_seeds=more)
        while ledger.ask() is not None:
            pass
        for trial, seed, loss in [(0, 100, 1.0), (0, 101, 1.0), (1, 100, 1.1), (1, 101, 1.1)]:
            ledger.record(made_up(trial, seed, loss=loss))
        if more is not None:  # they turn it over
            ledger.record(made_up(0, 102, loss=5.0))
            ledger.record(made_up(1, 102, loss=1.1))
        StudyDirectory(folder).write(ledger.config, ledger.uuid, None, StudyDirectory(folder).storage_url())
        ledger.close()
        new = written(folder, tmp_path / f"{more is None}.yaml")
        assert new.arm("dense").learning_rate == (0.001 if more is None else 0.1)


def test_best_rate_at_an_end_of_those_tried_is_told(tmp_path):
    folder = tuning(tmp_path, arms=[DENSE | {"learning_rate": RATES}, MPO | {"learning_rate": RATES}])
    best = {None: 0.01, 2: 0.001, 4: 0.1}
    give_losses(folder, lambda spec: abs(spec.protocol.learning_rate - best[spec.chi]))
    lines = []
    written(folder, tmp_path / "new.yaml", say=lines.append)
    found = [("arm mpo, chi=2", "0.001, is the lowest"), ("arm mpo, chi=4", "0.1, is the highest")]
    assert [line.partition(" of those tried;")[0] for line in lines] == [
        f"{where}: the best learning rate, {end}" for where, end in found
    ]


def test_each_winner_is_an_arm_with_a_name_of_its_own(tmp_path):
    listed = {"chi": [2, 3, 4], "init": ["paper", "variance"], "learning_rate": [0.01, 0.1]}
    arms = [
        DENSE,
        MPO | listed,
        {"name": "mpo-chi2-paper", "family": "mpo", "chi": 2, "decay": "matrix"},
        {"name": "low-rank", "family": "low_rank", "as_chi": [3, 4]},
    ]
    contrasts = [("mpo", "dense"), ("low-rank", "mpo"), ("mpo-chi2-paper", "mpo")]
    claims = {"contrasts": [{"arm": arm, "against": against} for arm, against in contrasts]}
    folder = tuning(tmp_path, arms=arms, claims=claims, model={"d_model": 16}, seeds=[100])
    best = {2: ("paper", 0.1), 3: ("variance", 0.1), 4: ("variance", 0.01)}

    def loss(spec):
        return 1 if (spec.init, spec.protocol.learning_rate) == best.get(spec.chi) else 2

    give_losses(folder, loss)
    new = written(folder, tmp_path / "new.yaml", name="chosen", seeds=range(3))
    assert (new.name, new.seeds) == ("chosen", 3)
    assert [
        (arm.name, getattr(arm, "chi", None) or getattr(arm, "as_chi", None), arm.init, arm.learning_rate)
        for arm in new.arms
    ] == [
        ("dense", None, None, None),
        ("mpo-chi2-paper-2", 2, "paper", 0.1),
        ("mpo-chi3-variance", 3, "variance", 0.1),
        ("mpo-chi4-variance", 4, "variance", 0.01),
        ("mpo-chi2-paper", 2, None, None),
        ("low-rank-as-chi3", 3, None, None),
        ("low-rank-as-chi4", 4, None, None),
    ]
    assert [arm.tuned_among for arm in new.arms] == [None, 4, 4, 4, None, None, None]
    assert [(contrast.arm, contrast.against) for contrast in new.claims.contrasts] == [
        ("mpo-chi2-paper-2", "dense"),
        ("mpo-chi3-variance", "dense"),
        ("mpo-chi4-variance", "dense"),
        ("low-rank-as-chi3", "mpo-chi3-variance"),
        ("low-rank-as-chi4", "mpo-chi4-variance"),
        ("mpo-chi2-paper", "mpo-chi2-paper-2"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("of_larger", [2.0, 0.2])
def test_rate_of_the_embeddings_is_tuned_with_that_of_the_layers(tmp_path, of_larger):
    rates = {"learning_rate": [0.01, 0.1], "embedding_learning_rate": [0.02, 0.2, 2.0]}
    folder = tuning(tmp_path, arms=[DENSE | rates, MPO | rates | {"chi": [2, 4]}], seeds=[100])
    best = {None: (0.01, 0.2), 2: (0.1, 2.0), 4: (0.01, of_larger)}

    def loss(spec):
        protocol = spec.protocol
        return 1 if (protocol.learning_rate, protocol.embedding_learning_rate) == best[spec.chi] else 2

    give_losses(folder, loss)
    said = []
    new = written(folder, tmp_path / "new.yaml", say=said.append)
    assert {
        spec.chi: (spec.protocol.learning_rate, spec.protocol.embedding_learning_rate) for spec in listed_specs(new)
    } == best
    assert [(arm.name, arm.tuned_among) for arm in new.arms] == [("dense", 6), ("mpo-chi2", 6), ("mpo-chi4", 6)]
    ends = sum("the best embedding learning rate, 2, is the highest of those tried" in line for line in said)
    assert ends == (2 if of_larger == 2 else 1)


def test_rates_of_the_embeddings_that_go_by_size_and_are_not_tuned_stay_as_they_are(tmp_path):
    given = {"learning_rate": [0.01, 0.1], "embedding_learning_rate": {2: 0.2, 4: 0.3}}
    folder = tuning(tmp_path, arms=[DENSE, MPO | given | {"chi": [2, 4]}], seeds=[100])
    give_losses(folder, lambda spec: spec.protocol.learning_rate)
    new = written(folder, tmp_path / "new.yaml")
    assert [(arm.learning_rate, arm.embedding_learning_rate, arm.tuned_among) for arm in new.arms] == [
        (None, None, None),
        (0.01, 0.2, 2),
        (0.01, 0.3, 2),
    ]


def test_each_combination_of_untuned_values_has_its_winner(tmp_path):
    tuned = TUNED | {"chi": [2, 4], "refinement": ["tt_svd", "whitened"], "learning_rate": [0.01, 0.1]}
    folder = tuning(tmp_path, arms=[DENSE, tuned], seeds=[100])
    best = {("tt_svd", 2): 0.1, ("tt_svd", 4): 0.01, ("whitened", 2): 0.1, ("whitened", 4): 0.1}
    give_losses(folder, lambda spec: spec.protocol.learning_rate != best.get((spec.refinement, spec.chi)))
    new = written(folder, tmp_path / "new.yaml")
    rates = {(s.refinement, s.chi): s.protocol.learning_rate for s in listed_specs(new) if s.start is not None}
    assert rates == best
    assert [arm.name for arm in new.arms][:3] == ["dense", "tuned-tt_svd-chi2", "tuned-tt_svd-chi4"]


def test_each_gauge_has_its_winner(tmp_path):
    arm = {"name": "mpo", "family": "mpo", "chi": 4, "gauge": ["free", "fixed"], "learning_rate": [0.01, 0.1]}
    folder = tuning(tmp_path, arms=[arm], seeds=[100])
    best = {"free": 0.01, "fixed": 0.1}
    give_losses(folder, lambda spec: spec.protocol.learning_rate != best[spec.gauge])
    new = written(folder, tmp_path / "new.yaml")
    assert {spec.gauge: spec.protocol.learning_rate for spec in listed_specs(new)} == best
    assert [arm.name for arm in new.arms] == ["mpo-free", "mpo-fixed"]


def test_feed_forward_sizes_go_with_the_widths_that_won(tmp_path):
    narrow = {"name": "narrow", "family": "dense", "d_model": [4, 8], "d_ff": {4: 10, 8: 20}, "learning_rate": RATES}
    folder = tuning(tmp_path, arms=[narrow | {"init": ["paper", "variance"]}], model={"d_model": 16}, seeds=[100])
    give_losses(folder, lambda spec: (spec.init == "paper") == (spec.model.d_model == 4))
    new = written(folder, tmp_path / "new.yaml", seeds=range(2))
    assert [(arm.init, arm.d_model, arm.d_ff) for arm in new.arms] == [("variance", 4, 10), ("paper", 8, 20)]


def test_trial_with_a_failed_seed_cannot_win(tmp_path):
    rates = [1e30, 0.01, 0.001]
    file = write_study(tmp_path / "files", name="tuning", seeds=SEEDS, arms=[DENSE | {"learning_rate": rates}])
    folder = tmp_path / "results"
    run_at(file, folder, "protocol.grad_clip=1e30")
    failed = {number for (number, _), result in results_at(folder, "tuning").items() if result.state == "failed"}
    assert failed == {0}
    assert written(folder, tmp_path / "new.yaml").arm("dense").learning_rate in rates[1:]

    run_at(file, tmp_path / "all", "protocol.grad_clip=1e30", "arms.dense.learning_rate=[1e30, 1e31]")
    with pytest.raises(StudyError, match=r"^arm dense: each trial has a failed seed, so none can win"):
        write_winners(StudyDirectory(tmp_path / "all"), tmp_path / "none.yaml")
    assert not (tmp_path / "none.yaml").exists()


# Searches -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_frontier_of_a_search_becomes_arms_of_fixed_values(tmp_path):
    searched = SEARCHED | {"factorisation": "balanced", "n_sites": {"choices": [1, 2]}, "chi": {"low": 1, "high": 9}}
    dense = {"name": "dense-tuned", "family": "dense", "learning_rate": {"low": 0.001, "high": 0.1}}
    contrasts = [{"arm": "found", "against": "dense"}, {"arm": "found", "against": "dense-tuned"}]
    file = write_search(
        tmp_path / "files", "random", 12, seeds=SEEDS, arms=[DENSE, dense, searched], claims={"contrasts": contrasts}
    )
    folder = tmp_path / "results"
    run_at(file, folder)
    give_losses(folder, lambda spec: 2 - 0.01 * spec.chi if spec.chi else 3, "search-random")  # dense is on no frontier
    snapshot = read_ledger(ledger_of(folder), "search-random")
    own = [trial for trial in snapshot.trials if trial.spec.arm == "found" and trial.duplicate_of is None]
    loss = {trial.number: 2 - 0.01 * trial.spec.chi for trial in own}
    better = {
        trial.number
        for trial in own
        if not any(
            (other.shape.n_params <= trial.shape.n_params and loss[other.number] < loss[trial.number])
            or (other.shape.n_params < trial.shape.n_params and loss[other.number] <= loss[trial.number])
            for other in own
        )
    }
    assert 1 < len(better) < len(own)

    new = written(folder, tmp_path / "new.yaml")
    expected = {(t.spec.chi, t.spec.n_sites, t.spec.protocol.learning_rate) for t in own if t.number in better}
    found = [arm for arm in new.arms if arm.name.startswith("found")]
    assert {(arm.chi, arm.n_sites, arm.learning_rate) for arm in found} == expected
    assert len({arm.name for arm in found}) == len(better)
    assert all(f"chi{arm.chi}" in arm.name for arm in found)
    assert {arm.tuned_among for arm in found} == {len(own)}  # of the search's 12, what was tried of this arm
    assert len(own) < 12
    assert new.arm("dense") == load_config(file).arm("dense")
    # What the sampler may choose for dense stays to be compared with, if on no frontier.
    [first] = [trial for trial in snapshot.trials if trial.spec.arm == "dense-tuned"][:1]
    assert new.arm("dense-tuned").learning_rate == first.spec.protocol.learning_rate
    assert {(c.arm, c.against) for c in new.claims.contrasts} == {
        (arm.name, against) for arm in found for against in ("dense", "dense-tuned")
    }
    assert (new.search.sampler, new.search.trials, new.seed_list) == ("grid", 0, (0, 1, 2, 3, 4))
    outcome = run_at(tmp_path / "new.yaml", tmp_path / "again")
    assert (outcome.n_complete, outcome.n_failed) == (5 * (len(better) + 2), 0)


@pytest.mark.slow
def test_what_a_search_found_is_compared_with_the_nearest_it_found_of_the_rivals(tmp_path):
    dense = {
        "name": "dense-tuned", "family": "dense",
        "d_model": {"choices": [8, 12, 16]}, "learning_rate": {"low": 0.001, "high": 0.1},
    }  # fmt: skip
    claims = {"contrasts": [{"arm": "found", "against": "dense-tuned"}]}
    arms = [DENSE, dense, SEARCHED | {"chi": {"choices": [1, 40]}}]
    file = write_search(tmp_path / "files", "random", 16, seeds=SEEDS, arms=arms, claims=claims)
    folder = tmp_path / "results"
    run_at(file, folder)
    trials = read_ledger(ledger_of(folder), "search-random").trials
    sizes = {(trial.spec.chi, trial.spec.model.d_model): trial.shape.n_params for trial in trials}
    # Of each size one is on the frontier.
    give_losses(folder, lambda spec: 1 / sizes[spec.chi, spec.model.d_model], "search-random")

    new = written(folder, tmp_path / "new.yaml")
    size_of = {spec.arm: sizes[spec.chi, spec.model.d_model] for spec in listed_specs(new)}
    rivals = [name for name in size_of if name.startswith("dense-tuned")]
    assert len(rivals) > 1
    own = [name for name in size_of if name.startswith("found")]

    def distance(name, rival):
        return abs(math.log(size_of[rival] / size_of[name]))

    assert {(c.arm, c.against) for c in new.claims.contrasts} == {
        (name, rival)
        for name in own
        for rival in rivals
        if distance(name, rival) == min(distance(name, other) for other in rivals)
    }
    assert len({c.against for c in new.claims.contrasts}) > 1


@pytest.mark.slow
def test_what_a_search_found_is_compared_with_the_nearest_of_listed_rivals_whatever_their_caps(tmp_path):
    low_rank = {"name": "low-rank", "family": "low_rank", "as_chi": [2, 8], "init": ["variance", "svd_fresh"]}
    claims = {"contrasts": [{"arm": "found", "against": "low-rank"}]}
    # χ = 3 has no control of its own; χ = 8 of four sites is no measure for one that is meant for two.
    searched = SEARCHED | {"factorisation": "balanced", "n_sites": 4, "chi": {"choices": [3, 8]}}
    file = write_search(
        tmp_path / "files", "random", 8, seeds=SEEDS, arms=[DENSE, low_rank, searched], claims=claims
    )  # fmt: skip
    folder = tmp_path / "results"
    run_at(file, folder)
    best = {2: "variance", 8: "svd_fresh"}
    trials = read_ledger(ledger_of(folder), "search-random").trials
    sizes = {(trial.spec.chi, trial.spec.as_chi): trial.shape.n_params for trial in trials}

    def loss(spec):
        return 1 / sizes[spec.chi, spec.as_chi] + (spec.as_chi is not None and spec.init != best[spec.as_chi])

    give_losses(folder, loss, "search-random")
    new = written(folder, tmp_path / "new.yaml")
    low, high = "low-rank-as-chi2-variance", "low-rank-as-chi8-svd_fresh"
    assert (new.arm(low).as_chi, new.arm(high).as_chi) == (2, 8)
    expected = {}
    for arm in new.arms:
        if arm.name.startswith("found"):
            rivals = {low: sizes[None, 2], high: sizes[None, 8]}
            expected[arm.name] = min(rivals, key=lambda name: abs(math.log(rivals[name] / sizes[arm.chi, None])))
    assert len(expected) > 1
    assert {contrast.arm: contrast.against for contrast in new.claims.contrasts} == expected
    assert len(new.claims.contrasts) == len(expected)


@pytest.mark.slow
def test_bonds_that_grow_are_compared_with_the_size_that_they_may_have(tmp_path):
    arms = [
        DENSE,
        {"name": "mpo", "family": "mpo", "chi": [1, 3], "learning_rate": RATES},
        {"name": "grown", "family": "mpo", "chi": 1, "bonds": {"every": 1, "max_params": 1500}, "learning_rate": RATES},
    ]
    claims = {"contrasts": [{"arm": "grown", "against": "mpo"}]}
    folder = tuning(tmp_path, arms=arms, claims=claims)
    sizes = {trial.spec.chi: trial.shape.n_params for trial in read_ledger(ledger_of(folder), "tuning").trials
             if trial.spec.arm == "mpo"}  # fmt: skip
    assert sizes[1] < sizes[3]
    new = written(folder, tmp_path / "new.yaml")
    assert [(contrast.arm, contrast.against) for contrast in new.claims.contrasts] == [("grown", "mpo-chi3")]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """Gives the one line with which a file is refused, and sees that none is written."""

    def call(folder, file=None, **options):
        file = file or tmp_path / "new.yaml"
        before = file.read_bytes() if file.exists() else None
        with pytest.raises(StudyError) as caught:
            write_winners(StudyDirectory(folder), file, **options)
        assert (file.read_bytes() if file.exists() else None) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


def test_winners_need_seeds_and_a_name_of_their_own_and_a_new_file(tmp_path, refused):
    folder = tuning(tmp_path, arms=[DENSE | {"learning_rate": RATES}])
    said = refused(folder, seeds=range(102))
    assert said.startswith("--seeds: study tuning already used the seeds 100, 101, ")
    assert "is the name of the finished study" in refused(folder, tmp_path / "tuning.yaml")
    assert "is the name of the finished study" in refused(folder, name="tuning")
    assert "name: must match" in refused(folder, name="no name")
    file = tmp_path / "there.yaml"
    file.write_text("mine", encoding="utf-8")
    assert refused(folder, file) == f"{file}: exists already; give another file, or remove it"
    assert "cannot write there: No such file or directory" in refused(folder, tmp_path / "no" / "folder.yaml")
    written(folder, tmp_path / "new.yaml")
    run_at(tmp_path / "files" / "tuning.yaml", folder, growth=Growth(seeds=1))
    (tmp_path / "new.yaml").unlink()
    assert "used the seeds 102, " in refused(folder, seeds=[102, 7])


def test_winners_of_seeds_from_0_on_get_fresh_ones_or_those_that_are_given(tmp_path, refused):
    folder = tuning(tmp_path, arms=[DENSE | {"learning_rate": RATES}], seeds=[0, 1, 4])
    assert written(folder, tmp_path / "new.yaml").seeds == (2, 3, 5, 6, 7)
    assert "--seeds" not in (tmp_path / "new.yaml").read_text(encoding="utf-8")
    assert written(folder, tmp_path / "given.yaml", seeds=parse_seeds("100,101")).seeds == (100, 101)
    assert "--seeds 100,101`" in " ".join((tmp_path / "given.yaml").read_text(encoding="utf-8").split("\n# "))
    (tmp_path / "new.yaml").unlink()
    assert "study tuning already used the seeds 0, 1, 4, " in refused(folder, seeds=range(5))
    assert "more than once" in refused(folder, seeds=[7, 7])


@pytest.mark.parametrize(("text", "seeds"), [(None, None), ("3", (0, 1, 2)), ("7,", (7,)), ("100,101", (100, 101))])
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "five", "1;2", ",", "1,,2", "99999999999", "1,b"])
def test_seeds_that_are_neither_are_refused(text):
    with pytest.raises(StudyError, match=r"^--seeds .*: must be a number of seeds, such as 5, or a list"):
        parse_seeds(text)


def test_study_that_tuned_nothing_has_no_winners(tmp_path, refused):
    assert "study tuning has nothing to select" in refused(tuning(tmp_path))


def test_unfinished_study_is_refused_with_what_it_lacks(tmp_path, refused):
    folder = tuning(tmp_path, arms=[DENSE | {"learning_rate": RATES}])
    with sqlite3.connect(folder / "ledger.db") as connection:
        connection.execute("DELETE FROM mpo_result WHERE trial = 2 OR (trial = 0 AND seed = 101)")
    connection.close()
    lacking = "trial 0 (dense) seeds 101; trial 2 (dense) seeds 100, 101"
    assert f"3 runs are missing ({lacking}); run it again first" in refused(folder)
