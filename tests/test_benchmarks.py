"""The benchmarks' arithmetic and document, and that their rivals compute what ours does."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as bench
from benchmarks import measurement, report
from benchmarks.measurement import MIN_PAIRS, PAIRS, fastest, paired, quantity, rate, within
from benchmarks.plain_gpt import PlainTraining
from study.commands.opening import study_corpus
from study.commands.run import run_study
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.spec.config import StudyConfig
from study.spec.models import PicoGPTModel as Model
from study.spec.protocol import Protocol
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.spec.trial import TrialSpec
from study.training.corpus import CharacterCorpus
from study.training.train import Training


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in calls that say so; each is taken by `clock(seconds)`."""
    now = [0.0]

    def call_of(seconds):
        def call():
            now[0] += seconds

        return call

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    return call_of


# Measuring ------------------------------------------------------------------------------------------------------------


def test_ratio_is_ours_over_the_rivals(clock):
    row = paired("s", "ours", clock(0.2), "theirs", clock(0.1), target=1.9)
    assert (row.ratio, row.low, row.high) == pytest.approx((2, 2, 2))
    assert (row.seconds, row.rival_seconds) == pytest.approx((0.2, 0.1))
    assert row.is_met is False
    assert row.n_pairs == PAIRS
    assert paired("s", "ours", clock(0.2), "theirs", clock(0.1), target=1.9, at_most=False).is_met
    assert paired("s", "ours", clock(0.2), "theirs", clock(0.1)).is_met is None


def test_short_calls_are_repeated_and_long_ones_are_few(clock):
    short = paired("s", "ours", clock(1e-5), "theirs", clock(1e-6))
    assert short.seconds == pytest.approx(1e-5)
    assert short.ratio == pytest.approx(10)
    assert paired("s", "ours", clock(100.0), "theirs", clock(100.0)).n_pairs == MIN_PAIRS
    assert paired("s", "ours", clock(100.0), "theirs", clock(100.0), pairs=2).n_pairs == 2


def test_pairs_alternate_in_order(monkeypatch):
    order = []
    monkeypatch.setattr(measurement, "repeats_of", lambda call: 1)
    paired("s", "a", lambda: order.append("a"), "b", lambda: order.append("b"), pairs=4)
    assert "".join(order) == "baabbaab"


def test_spread_is_the_middle_half():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    row = rate("s", "ours", values, "theirs", [1.0] * 7, unit="bytes", target=5)
    assert (row.low, row.ratio, row.high) == (2, 4, 6)
    assert row.is_met
    one = within("s", "ours", [3.0], 2.0)
    assert (one.ratio, one.low, one.high, one.is_met) == (1.5, 1.5, 1.5, False)


def test_fastest_of_several(clock):
    assert fastest({"a": clock(0.2), "b": clock(0.1), "c": clock(3.0)}) == "b"
    assert fastest({"a": clock(0.2)}) == "a"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (2.5e-6, "s", "2.5 µs"),
        (5e-8, "s", "0.05 µs"),
        (130.4, "s", "130 s"),
        (3 * 2**20, "bytes", "3 MiB"),
        (1.5e11, "FLOP/s", "150 GFLOP/s"),
        (7.0, "runs", "7 runs"),
    ],
)
def test_quantity_in_a_unit_that_suits_it(value, unit, text):
    assert quantity(value, unit) == text


# The document ---------------------------------------------------------------------------------------------------------


def entry_of(rows, **limits):
    return {
        "about": "What is measured.\n\nAnd how.",
        "limits": limits,
        "ended": "2026-01-01T00:00:00+00:00",
        "took_seconds": 1.0,
        "machine": {"cpu": "x", "cores": 2, "threads": 2, "torch": "2"},
        "rows": [row._asdict() for row in rows],
    }


def row_of(section, ratio, **options):
    return rate(section, f"at {ratio}", [ratio] * 3, "rival", [1.0] * 3, **options)


def test_document_has_every_row_and_why_one_is_missed(tmp_path):
    rows = [row_of("speed", 0.5, target=1), row_of("speed", 1.5, target=1, note="a note"), row_of("other", 3.0)]
    path = tmp_path / "benchmarks.json"
    bench.write(path, "layers", entry_of(rows, speed="because"))
    text = report.render(json.loads(path.read_text()))
    assert "| speed | 1 of 2 | at 1.5 | 1.5 | 1.5 to 1.5 | ≤ 1 |" in text
    assert "| at 0.5 | rival | 500 ms | 1 s | 0.5 | 0.5 to 0.5 | ≤ 1 | yes |" in text
    assert "| at 3.0 | rival | 3 s | 1 s | 3 | 3 to 3 |" in text
    assert "Why targets are missed: because" in text
    assert text.count("Why targets are missed") == 1
    assert "## What is measured\n\nAnd how." in text


def test_measuring_one_again_keeps_the_others(tmp_path):
    path = tmp_path / "results" / "benchmarks.json"
    for name, ratio in (("layers", 1.0), ("training_step", 1.0), ("layers", 2.0)):
        bench.write(path, name, entry_of([row_of(name, ratio)]))
    entries = json.loads(path.read_text())
    assert list(entries) == ["training_step", "layers"]
    assert [report.rows_of(entry)[0].ratio for entry in entries.values()] == [1.0, 2.0]


def test_many_cells_become_a_grid():
    rows = [
        row_of("grid", width / tokens * chi, target=5, sizes={"width": width, "tokens": tokens, "χ": chi})
        for width in (2, 4)
        for tokens in (1, 2)
        for chi in (1, 2)
    ]
    text = report.grid(rows)
    assert "| width | tokens | χ = 1 | χ = 2 |" in text
    assert "| 4 | 1 | 4 | **8** |" in text
    assert "met in 7 of 8 cells" in text


def test_growth_has_its_exponent():
    rows = [row_of("growth over width: ours", float(n**2), sizes={"width": n}) for n in (2, 4, 8)]
    text = "\n".join(report.section_parts(rows[0].section, rows))
    assert "| 8 | 64 s | 1 s | 64 |" in text
    assert "ours 2.00 over all, 2.00 between the last two; rival 0.00 over all" in text


# Rivals ---------------------------------------------------------------------------------------------------------------


def test_plain_loop_trains_the_same_model():
    corpus = CharacterCorpus("To be, or not to be, that is the question. " * 40, "")
    spec = TrialSpec.model_validate(
        {
            "arm": "benchmark",
            "family": "dense",
            "model": Model(d_model=16, n_heads=2, n_layers=2, context=8),
            "protocol": Protocol(steps=20, warmup_steps=2, batch_size=4, learning_rate=1e-2),
        }
    )
    ours = Training(spec, 0, corpus)
    plain = PlainTraining(ours)
    for _ in range(10):
        ours.optimiser_step()
        plain.optimiser_step()
    theirs = plain.model.state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_bare_loop_trains_what_a_study_did(tmp_path):
    from benchmarks.engine import bare_loop

    study = {
        "name": "tiny",
        "corpus": {"validation_fraction": 0.01},
        "model": {"d_model": 8, "n_heads": 2, "n_layers": 1, "context": 64},
        "protocol": {"steps": 2, "warmup_steps": 1, "batch_size": 2, "eval_every": 2},
        "seeds": 2,
        "arms": [
            {"name": "dense", "family": "dense"},
            {"name": "tuned", "family": "mpo", "chi": 2, "start": "dense"},
        ],
    }
    config, directory = StudyConfig.model_validate_json(json.dumps(study)), StudyDirectory(tmp_path)
    run_study(config, directory, Console(file=io.StringIO()), executor="inline", tracking="off")
    trained = read_ledger(directory.ledger_url, config.name)
    assert len(trained.results) == 4
    corpus = study_corpus(config)
    assert bare_loop(config, corpus, trained) > 0
    trained.results[-1].final["final/val_loss"] += 1e-6
    with pytest.raises(RuntimeError, match="did not train what the study did"):
        bare_loop(config, corpus, trained)


def test_what_a_gpu_is_measured_by_runs_on_any_device(monkeypatch):
    from benchmarks import gpu

    def called(section, what, run, against, rival, **options):
        run()
        rival()
        return row_of(section, 1.0)

    monkeypatch.setattr(gpu, "paired", called)
    corpus, device = gpu.random_corpus(600), torch.device("cpu")
    assert corpus.vocab_size == gpu.VOCABULARY
    model = {"d_model": 16, "n_heads": 2, "n_layers": 1, "context": 8}
    protocol = {"steps": 40, "warmup_steps": 2, "batch_size": 2, "eval_every": 10}
    spec = gpu.spec_of(gpu.mpo(2), Model(**model), Protocol(**protocol))
    assert gpu.stacked("tiny", spec, corpus, device, n_seeds=2).section == gpu.STACKED
    assert len(gpu.captured("tiny", spec, corpus, device, n_seeds=2)) == 2
    assert len(gpu.precisions("tiny", spec, corpus, device, n_seeds=2)) == 2
    assert gpu.layer(64, 4, 3, device).section == gpu.LAYER
    study = {"model": model, "protocol": protocol, "seeds": 2, "arms": [{}, {"chi": [2, 3], "init": "paper"}]}
    row = gpu.paper(study, corpus, device, rounds=2)
    assert (row.what, row.n_pairs) == ("3 trials of 2 seeds, stacked and captured", 2)
    with pytest.raises(ValueError, match=r"seed 1: .*losses 1\.5 and 1\.6"):
        gpu.check([1.0, 1.5], [1.0, 1.6])


def test_the_gpu_benchmark_counts_the_trials_of_the_paper_study():
    from benchmarks import gpu

    study = load_config(gpu.PAPER_FILE)
    _, *listed = listed_specs(study)
    counted = [
        gpu.spec_of(gpu.mpo(chi, init=study.arms[1].init), study.model, study.protocol) for chi in (4, 8, 16, 32)
    ]
    for key in ("family", "model", "protocol", "chi", "factorisation", "init", "forward"):
        assert [getattr(spec, key) for spec in counted] == [getattr(spec, key) for spec in listed]


def test_the_document_is_what_the_json_gives():
    entries = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.render(entries)


def test_benchmarks_without_a_gpu_say_what_they_leave_out(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main()
    assert "left out: gpu, because PyTorch finds no CUDA device" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", ["forward, nothing kept", "forward in evaluation", "forward+backward"])
def test_a_cell_of_layers_checks_and_measures(use, monkeypatch):
    from benchmarks import layers

    monkeypatch.setattr(layers, "paired", lambda section, what, run, *_, **options: row_of(section, 1.0, **options))
    rows = layers.cell(use, 64, 3, 4)
    assert [row.section.partition(":")[0] for row in rows] == [
        "MPOLinear against tensorly-torch",
        "auto against our best mode",
    ]
    assert all(row.sizes == {"width": 64, "tokens": 3, "χ": 4} for row in rows)


# minilm needs a package of the extra `bench`.
FILES = [path for path in sorted(Path(bench.__file__).parent.glob("*.py")) if path.stem != "minilm"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's tables
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path):
    importlib.import_module(f"benchmarks.{path.stem}")
