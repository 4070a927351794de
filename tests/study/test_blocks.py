"""Units of several seeds: how the queue forms them, and that a study does not depend on their size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from study_fixtures import DENSE, MPO, TUNED, ledger_at, made_up, printed_by_run, results_at, run_at, write_study

from study.commands.opening import study_corpus
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.scheduler.inline import run_inline
from study.scheduler.queue import Queue
from study.spec.study_file import load_config
from study.training.corpus_storage import store_corpus
from study.training.seed_run import train_seed, train_seeds
from study.training.storage import Storage
from study.training.unit import Unit, checkpoints_of, run_unit


@pytest.fixture
def open_queue(tmp_path):
    """Opens a queue over the study of a file, each time over the same ledger and with its corpus in storage."""

    def make(file, **options):
        config = load_config(file)
        corpus = study_corpus(config)
        storage = Storage(str(tmp_path / "storage"))
        store_corpus(storage, corpus)
        return Queue(config, ledger_at(file, tmp_path / "study"), storage, corpus.sha256, **options)

    return make


def finish(queue, unit, failures=None):
    results = []
    for seed in unit.seeds:
        failure = (failures or {}).get(seed)
        weights = None if failure else f"{unit.trial}-{seed}"
        results.append(replace(made_up(unit.trial, seed, failure=failure), weights=weights))
    queue.complete(results)


def blocks(queue):
    """Arm and seeds of every unit that can be issued now."""
    found = []
    while isinstance(unit := queue.next_unit(), Unit):
        found.append((unit.spec.arm, unit.seeds))
    return found


# Forming blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("execution", "expected"),
    [
        ({}, [(0,), (1,), (2,), (3,), (4,)]),
        ({"seeds_per_unit": "auto", "gpus": 0.5}, [(0, 1, 2, 3, 4)]),
        ({"seeds_per_unit": 1, "gpus": 1}, [(0,), (1,), (2,), (3,), (4,)]),
        ({"seeds_per_unit": 2}, [(0, 1), (2, 3), (4,)]),
        ({"seeds_per_unit": 100}, [(0, 1, 2, 3, 4)]),
    ],
)
def test_queue_forms_blocks_of_the_size_asked_for(tmp_path, open_queue, execution, expected):
    queue = open_queue(write_study(tmp_path, seeds=5, arms=[DENSE], execution=execution))
    assert blocks(queue) == [("dense", seeds) for seeds in expected]


def test_queue_forms_a_block_of_what_is_missing(tmp_path, open_queue):
    file = write_study(tmp_path, seeds=5, arms=[DENSE])
    queue = open_queue(file)
    first, second = queue.next_unit(), queue.next_unit()
    finish(queue, second)
    queue.ledger.close()
    again = open_queue(write_study(tmp_path, seeds=5, arms=[DENSE], execution={"seeds_per_unit": 3}))
    assert first.seeds == (0,)
    assert blocks(again) == [("dense", (0, 2, 3)), ("dense", (4,))]


@pytest.mark.slow
def test_queue_forms_a_block_of_those_whose_starts_are_ready(tmp_path, open_queue):
    file = write_study(tmp_path, seeds=5, arms=[DENSE, TUNED], execution={"seeds_per_unit": 2})
    queue = open_queue(file)
    taught = [queue.next_unit() for _ in range(3)]
    assert queue.next_unit() is None
    finish(queue, taught[1])
    tuned = queue.next_unit()
    assert (tuned.spec.arm, tuned.seeds) == ("tuned", (2, 3))
    assert tuned.starts.weights == {2: "0-2", 3: "0-3"}
    finish(queue, taught[2])
    assert blocks(queue) == [("tuned", (4,))]
    finish(queue, taught[0], failures={1: "no"})
    assert blocks(queue) == [("tuned", (0,))]
    assert queue.ledger.results[1, 1].failure == "its start (arm dense, seed 1) failed: no"


def test_queue_records_a_block_and_removes_its_checkpoints(tmp_path, open_queue):
    told = []
    file = write_study(tmp_path, seeds=3, arms=[DENSE], execution={"seeds_per_unit": 3})
    queue = open_queue(file, on_result=lambda result: told.append(result.seed))
    unit = queue.next_unit()
    folders = [checkpoints_of(queue.storage, unit.study_uuid, unit.trial, seed) for seed in unit.seeds]
    for folder in folders:
        folder.save(3, {"x": torch.ones(1)}, {})
    finish(queue, unit, failures={1: "diverged: far off"})
    assert told == [0, 1, 2]
    assert [queue.ledger.results[0, seed].state for seed in unit.seeds] == ["complete", "failed", "complete"]
    assert [folder.steps() for folder in folders] == [[], [], []]
    assert queue.next_unit() == "finished"


def test_queue_issues_again_a_block_that_is_put_back(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=3, arms=[DENSE], execution={"seeds_per_unit": 2}))
    first, second = queue.next_unit(), queue.next_unit()
    assert queue.next_unit() is None
    queue.put_back(first)
    assert queue.next_unit() == first
    queue.put_back(second)
    assert queue.next_unit() == second


# Deaths ---------------------------------------------------------------------------------------------------------------


def test_queue_fails_every_seed_of_a_block_that_dies_three_times_without_progress(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=3, arms=[DENSE], execution={"seeds_per_unit": 2}))
    unit, other = queue.next_unit(), queue.next_unit()
    for _ in range(3):
        queue.note_begin(unit)
        queue.note_progress(unit, 0, 0)
        queue.note_progress(unit, 1, 0)
        queue.note_death(unit, "killed")
        queue.next_unit()
    assert [queue.ledger.results[0, seed].failure for seed in (0, 1)] == [
        "its worker died 3 times without progress: killed"
    ] * 2
    assert (0, 2) not in queue.ledger.results
    finish(queue, other)
    assert queue.next_unit() == "finished"


def test_queue_does_not_count_deaths_of_a_block_with_its_node(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=3, arms=[DENSE], execution={"seeds_per_unit": 3}))
    for _ in range(5):
        unit = queue.next_unit()
        assert unit.seeds == (0, 1, 2)
        queue.note_begin(unit)
        queue.note_death(unit, "gone")
        queue.forgive_death(unit)
    assert queue.ledger.results == {}


def test_queue_takes_progress_of_one_seed_for_its_block(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=2, arms=[DENSE], execution={"seeds_per_unit": 2}))
    unit = queue.next_unit()
    for step in range(5):
        for _ in range(2):
            queue.note_begin(unit)
            queue.note_progress(unit, 1, step)
            queue.note_death(unit, "killed")
            assert queue.next_unit() == unit
    assert queue.ledger.results == {}


def test_queue_counts_deaths_by_seed_where_blocks_change(tmp_path, open_queue):
    file = write_study(tmp_path, seeds=2, arms=[DENSE, TUNED], execution={"seeds_per_unit": 2})
    queue = open_queue(file)
    taught = queue.next_unit()
    queue.complete([replace(made_up(taught.trial, 0), weights="w")])
    unit = queue.next_unit()
    assert (unit.spec.arm, unit.seeds) == ("tuned", (0,))
    for _ in range(2):
        queue.note_begin(unit)
        queue.note_death(unit, "killed")
        assert queue.next_unit() == unit
    queue.put_back(unit)
    queue.complete([replace(made_up(taught.trial, 1), weights="w")])
    both = queue.next_unit()
    assert both.seeds == (0, 1)
    queue.note_begin(both)
    queue.note_death(both, "killed")
    assert (1, 0) in queue.ledger.results
    assert (1, 1) not in queue.ledger.results
    assert queue.next_unit().seeds == (1,)


def test_queue_leaves_a_block_that_no_worker_begins(tmp_path, open_queue):
    file = write_study(tmp_path, seeds=2, arms=[DENSE], execution={"seeds_per_unit": 2})
    queue = open_queue(file)
    for _ in range(3):
        queue.note_death(queue.next_unit(), "no module named study")
    assert queue.next_unit() == "finished"
    assert queue.aborted == "2 runs given up after 3 workers for each died before they began: no module named study"
    assert queue.ledger.results == {}


def test_queue_halves_a_block_that_does_not_fit_and_fails_only_what_never_does(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=5, arms=[DENSE], execution={"gpus": 1}))
    sizes = []
    while isinstance(unit := queue.next_unit(), Unit):
        sizes.append(len(unit.seeds))
        queue.note_begin(unit)
        if len(unit.seeds) > 1 or unit.seeds == (3,):
            queue.note_out_of_memory(unit, "out of memory: no room")
        else:
            finish(queue, unit)
    assert sizes == [5, 2, 1, 1, 1, 1, 1, 1, 1]
    states = {seed: queue.ledger.results[0, seed].state for seed in range(5)}
    assert states == {0: "complete", 1: "complete", 2: "complete", 3: "failed", 4: "complete"}


# Running blocks -------------------------------------------------------------------------------------------------------


def losses(folder):
    return {key: (r.state, [row["val_loss"] for row in r.curve]) for key, r in results_at(folder).items()}


def assert_same_study(folder, other):
    """Equal results to what float32 allows; the same weights kept."""
    found, expected = results_at(folder), results_at(other)
    assert found.keys() == expected.keys()
    for key, result in found.items():
        assert result.state == expected[key].state == "complete"
        assert (result.weights is None) == (expected[key].weights is None)
        assert result.rel_errors == pytest.approx(expected[key].rel_errors, abs=1e-5)
        final = {name: value for name, value in result.final.items() if name != "train_seconds"}
        assert final == pytest.approx({name: expected[key].final[name] for name in final}, abs=1e-5)


def stop_at(file, folder, n_evaluations):
    """Run a study in this process, and press Ctrl-C at that evaluation."""
    config = load_config(file)
    corpus = study_corpus(config)
    ledger = ledger_at(file, folder)
    storage = Storage(StudyDirectory(folder).storage_url())
    store_corpus(storage, corpus)
    left = [n_evaluations]

    def on_evaluation(unit, seed, row):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inline(Queue(config, ledger, storage, corpus.sha256), on_evaluation)
    ledger.close()


@pytest.mark.slow
def test_study_does_not_depend_on_the_size_of_its_blocks(tmp_path, monkeypatch):
    alone = write_study(tmp_path, seeds=3)
    run_at(alone, tmp_path / "alone")
    monkeypatch.setattr("study.training.unit.train_seed", None)  # nothing is trained alone from here on
    outcome = run_at(alone, tmp_path / "stacked", "execution.seeds_per_unit=3")
    assert (outcome.n_complete, outcome.n_failed) == (12, 0)
    assert_same_study(tmp_path / "stacked", tmp_path / "alone")
    assert {r.ran_on["mpo.stacked"] for r in results_at(tmp_path / "stacked").values()} == {"3"}
    assert {r.ran_on["mpo.stacked"] for r in results_at(tmp_path / "alone").values()} == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1), (2, 3)])
def test_study_begun_with_one_block_size_is_finished_with_another(tmp_path, first, then):
    run_at(write_study(tmp_path, seeds=3), tmp_path / "alone")
    for n_seeds, evaluations in ((first, 6), (then, 13), (first, 9)):
        execution = {"seeds_per_unit": n_seeds, "checkpoint_seconds": 0}
        stop_at(write_study(tmp_path, seeds=3, execution=execution), tmp_path / "study", evaluations)
    outcome = run_at(write_study(tmp_path, seeds=3, execution={"seeds_per_unit": then}), tmp_path / "study")
    assert (outcome.n_complete, outcome.n_missing) == (12, 0)
    assert_same_study(tmp_path / "study", tmp_path / "alone")


@pytest.mark.slow
def test_study_of_blocks_interrupted_ends_bit_identical(tmp_path):
    file = write_study(tmp_path, seeds=3, execution={"checkpoint_seconds": 0, "seeds_per_unit": 3})
    for evaluations in (2, 8, 5, 14):
        stop_at(file, tmp_path / "study", evaluations)
    assert run_at(file, tmp_path / "study").n_complete == 12
    run_at(file, tmp_path / "undisturbed")
    assert losses(tmp_path / "study") == losses(tmp_path / "undisturbed")


def test_study_of_blocks_records_a_start_that_diverges_and_what_depends_on_it(tmp_path):
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    arms = [wild, TUNED | {"start": "wild"}, MPO]
    file = write_study(tmp_path, seeds=2, arms=arms, execution={"seeds_per_unit": 2})
    outcome, printed = printed_by_run(file, tmp_path / "study", tracking="off")
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (4, 4, 0)
    for seed in (0, 1):
        failed = results_at(tmp_path / "study")[0, seed]
        assert failed.failure.startswith("diverged: ")
        assert failed.failure_step >= 1
    assert printed.count("failed: trial ") == 4


def test_out_of_memory_of_a_stack_trains_half_of_it_at_a_time(tmp_path, monkeypatch):
    sizes = []

    def train(spec, seeds, *args, **kwargs):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("tried to allocate a lot")
        return train_seeds(spec, seeds, *args, **kwargs)

    monkeypatch.setattr("study.training.unit.train_seeds", train)
    file = write_study(tmp_path, seeds=4, arms=[DENSE], execution={"seeds_per_unit": 4})
    assert run_at(file, tmp_path / "study").n_complete == 4
    assert sizes == [4, 2, 2]


def test_what_goes_wrong_in_one_seed_of_a_stack_fails_that_seed_alone(tmp_path, monkeypatch, open_queue, capfd):
    def train(spec, seed, *args, **kwargs):
        if seed == 1:
            raise ValueError("this one cannot be trained")
        return train_seed(spec, seed, *args, **kwargs)

    def stack(*args, **kwargs):
        raise ValueError("one of these cannot be trained")

    monkeypatch.setattr("study.training.unit.train_seed", train)
    monkeypatch.setattr("study.training.unit.train_seeds", stack)
    queue = open_queue(write_study(tmp_path, seeds=3, arms=[DENSE], execution={"seeds_per_unit": 3}))
    results = run_unit(queue.next_unit(), lambda seed, row: None)
    assert [result.state for result in results] == ["complete", "failed", "complete"]
    assert results[1].failure == "ValueError: this one cannot be trained"
    out, err = capfd.readouterr()
    assert "trial 0: its stack of seeds failed; they are trained one after another" in out
    assert "ValueError: one of these cannot be trained" in err


def test_study_keeps_the_weights_of_every_seed_of_a_block(tmp_path):
    file = write_study(tmp_path, seeds=2, arms=[MPO], execution={"seeds_per_unit": 2, "keep_weights": True})
    run_at(file, tmp_path / "study")
    storage = Storage(StudyDirectory(tmp_path / "study").storage_url())
    results = read_ledger(StudyDirectory(tmp_path / "study").ledger_url, "tiny").results
    assert len({result.weights for result in results}) == 4
    assert all(storage.exists(result.weights) for result in results)
