"""Whole studies of tokens: run, resumed, sampled, selected from, exported, imported and read by the analysis."""

from __future__ import annotations

import json
import shutil

import fsspec
import pytest
from study_fixtures import (
    DENSE,
    MPO,
    TUNED,
    changed_export,
    ledger_at,
    mlflow_template,  # noqa: F401 (a fixture)
    results_at,
    run_at,
    runs_in,
    substance,
    write_study,
)
from tokenizer_folders import byte_pairs

from analysis.errors import AnalysisError
from analysis.report.report import write_report
from analysis.runs.load import load_study, resolve_study
from analysis.runs.studies import join_studies
from study.commands.exchange import export_study, import_study
from study.commands.sample import sample
from study.commands.sync import sync
from study.commands.winners import write_winners
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.snapshot import read_ledger
from study.spec.cache import CACHE_VARIABLE
from study.spec.definition import definition
from study.spec.study_file import load_config
from study.spec.trial import json_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

DOCUMENTS = [f"the bond of core {number} is χ = {number * number % 17}" for number in range(60)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def write_token_study(folder, name="tokens", **changes):
    """A study of pairs of bytes, whose text is JSON lines; both lie beside the file."""
    corpus = {"path": "documents.jsonl", "tokenizer": "pairs"} | changes.pop("corpus", {})
    file = write_study(folder, name, corpus=corpus, **changes)
    rows = [json.dumps({"text": text}) for text in DOCUMENTS]
    (folder / "documents.jsonl").write_text("\n".join(rows), encoding="utf-8")
    byte_pairs(folder / "pairs", " ".join(DOCUMENTS))
    return file


# A study of characters ------------------------------------------------------------------------------------------------


def test_study_file_without_the_new_keys_is_the_study_that_it_was(tmp_path):
    """The literals are those of the version before there were tokenizers."""
    file = write_study(tmp_path, corpus={"validation_fraction": 0.2})
    config = load_config(file)
    assert json_hash(definition(config)) == "e5918d36cfb3a86f09b5ff619f23928731aefa9c4c26848302b2968002b51702"
    ledger = ledger_at(file, tmp_path / "results")
    trials = [ledger.ask() for _ in range(4)]
    assert [(trial.budget_hash, trial.shape.identity[:12]) for trial in trials] == [
        ("6d4630b2fbf9", "92c4350f74cd"),
        ("6d4630b2fbf9", "58271187faa9"),
        ("6d4630b2fbf9", "d583c995d8b6"),
        ("bc660eaaed42", "e0f8ef0f083d"),
    ]
    written = json.loads(config.model_dump_json())["corpus"]
    assert written.keys() == {"path", "sha256", "validation_fraction"}


# A study of tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_study_of_tokens_is_run_grown_sampled_and_selected_from(tmp_path, command):
    arms = [DENSE | {"learning_rate": [0.02, 0.001]}, MPO, TUNED | {"start": "fixed"}, DENSE | {"name": "fixed"}]
    file, folder = write_token_study(tmp_path, arms=arms, execution={"keep_weights": True}), tmp_path / "results"
    assert command("plan", file)[::2] == (0, "")
    assert run_at(file, folder).n_missing == 0
    shutil.move(tmp_path / "pairs", tmp_path / "moved")  # the checksum of the corpus tells that it is the same
    assert run_at(file, folder, "corpus.tokenizer=moved", growth=Growth(seeds=1)).n_complete == 18
    assert command("status", folder)[::2] == (0, "")
    shutil.rmtree(tmp_path / "moved")
    run, text = sample(StudyDirectory(folder), prompt="the χ", n_new=20)
    assert text.startswith("the χ")
    assert sample(StudyDirectory(folder), prompt="the χ", n_new=20) == (run, text)
    new = write_winners(StudyDirectory(folder), tmp_path / "winners.yaml")
    assert (tmp_path / "winners.yaml").read_text().count("tokenizer: ./moved") == 1
    assert new.corpus.sha256 == read_ledger(StudyDirectory(folder).ledger_url, "tokens").corpus_sha256
    byte_pairs(tmp_path / "moved", " ".join(DOCUMENTS))
    assert run_at(tmp_path / "winners.yaml", tmp_path / "again").n_missing == 0


@pytest.mark.parametrize("other", ["bytes", "characters", "other"])
def test_another_tokenizer_is_another_study_with_another_budget(tmp_path, other):
    file, folder = write_token_study(tmp_path, arms=[DENSE], seeds=1), tmp_path / "results"
    byte_pairs(tmp_path / "other", " ".join(DOCUMENTS), 270)
    ledger = ledger_at(file, folder)
    own = ledger.ask().budget_hash
    ledger.close()
    with pytest.raises(StudyError, match=r"it differs in corpus or tokenizer \(SHA-256 was"):
        ledger_at(file, folder, f"corpus.tokenizer={other}")
    assert ledger_at(file, tmp_path / "new", f"corpus.tokenizer={other}").ask().budget_hash != own
    configs = [load_config(file, [f"corpus.tokenizer={name}"]) for name in ("pairs", other)]
    assert (definition(configs[0]) == definition(configs[1])) is (other == "other")  # whose checksum differs


def test_bits_per_byte_can_be_an_objective(tmp_path):
    search = {"sampler": "tpe", "trials": 3}
    searched = MPO | {"chi": {"low": 1, "high": 4}}
    file = write_token_study(
        tmp_path,
        arms=[searched],
        search=search,
        objectives=["n_params", "bits_per_byte"],
        corpus={"tokenizer": "bytes"},
    )
    assert run_at(file, tmp_path / "results").n_missing == 0
    results = results_at(tmp_path / "results", "tokens").values()
    assert all(result.final["final/bits_per_byte"] > 0 for result in results)


def test_workers_of_a_remote_storage_use_their_own_copy(tmp_path):
    file = write_token_study(tmp_path, arms=[DENSE, MPO])
    run_at(file, tmp_path / "local")
    try:
        url = f"memory://{tmp_path.name}"
        assert run_at(file, tmp_path / "remote", storage_url=url).n_missing == 0
    finally:
        fsspec.filesystem("memory").store.clear()
    assert substance(tmp_path / "remote", "tokens") == substance(tmp_path / "local", "tokens")
    sha256 = read_ledger(StudyDirectory(tmp_path / "local").ledger_url, "tokens").corpus_sha256
    assert (tmp_path / "cache" / f"{sha256}.safetensors").is_file()


# Elsewhere ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("has_files", [True, False])
def test_export_takes_tokens_and_tokenizer_along(tmp_path, monkeypatch, has_files):
    file, folder = write_token_study(tmp_path / "work", arms=[DENSE, MPO]), tmp_path / "a"
    run_at(file, folder)
    said = []
    export_study(StudyDirectory(folder), tmp_path / "a.xz", said.append)
    assert said == []
    if not has_files:
        shutil.rmtree(tmp_path / "work")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "of another machine"))
    import_study(tmp_path / "a.xz", StudyDirectory(tmp_path / "b"))
    study_file = tmp_path / "b" / "study.yaml"
    assert run_at(study_file, tmp_path / "b", growth=Growth(seeds=1)).n_complete == 9
    assert (load_config(study_file).corpus.path == str(tmp_path / "work" / "documents.jsonl")) is has_files
    export_study(StudyDirectory(tmp_path / "b"), tmp_path / "again.xz", said.append)
    import_study(tmp_path / "again.xz", StudyDirectory(tmp_path / "c"))
    assert run_at(tmp_path / "c" / "study.yaml", tmp_path / "c").n_missing == 0
    assert substance(tmp_path / "c", "tokens") == substance(tmp_path / "b", "tokens")


@pytest.mark.slow
def test_mlflow_and_analysis_know_the_tokenizer(tmp_path, mlflow_template):  # noqa: F811
    files = {
        "tokens": write_token_study(tmp_path, arms=[DENSE, MPO], seeds=3),
        "bytes": write_token_study(tmp_path, "bytes", arms=[DENSE], seeds=3, corpus={"tokenizer": "bytes"}),
    }
    for name, file in files.items():
        (tmp_path / f"of-{name}").mkdir()
        shutil.copy(mlflow_template, tmp_path / f"of-{name}" / "mlflow.db")
        run_at(file, tmp_path / f"of-{name}", tracking=None)
    folder = tmp_path / "of-tokens"
    [run] = runs_in(folder / "mlflow.db", "tokens")[f"{StudyDirectory(folder).uuid()}/0"]
    assert run.data.params["tokenizer"].startswith("folder ")
    assert run.data.params["vocab_size"] == "280"
    runs = [load_study(resolve_study(tmp_path / f"of-{name}")) for name in files]
    assert runs[0].seeds["final/bits_per_byte"].notna().all()
    assert runs[0].trials["corpus_sha256"].unique() == runs[1].trials["corpus_sha256"].unique()
    write_report(runs[0], folder / "report", light=True)
    with pytest.raises(AnalysisError, match=r"cannot be compared: tokenizer is folder \w+ in the first and bytes in"):
        join_studies(runs)
    config, directory = load_config(files["tokens"]), StudyDirectory(folder)
    shutil.rmtree(tmp_path / "pairs")
    (tmp_path / "documents.jsonl").unlink()
    assert sync(config, directory, None, None) == 3


def test_damaged_tokens_in_an_export_are_refused(tmp_path):
    file, folder = write_token_study(tmp_path, arms=[DENSE], seeds=1), tmp_path / "a"
    run_at(file, folder)
    export_study(StudyDirectory(folder), tmp_path / "a.xz", lambda line: None)
    update = "UPDATE mpo_export_tokens SET content ="
    changes = {
        f"{update} substr(content, 1, length(content) - 1)": "not a whole token file",
        f"{update} CAST(substr(content, 1, length(content) - 2) || x'0100' AS BLOB)": "its checksum is wrong",
        f"{update} 7": "a part has another type",
        "ALTER TABLE mpo_export_tokens ADD COLUMN more TEXT": "table mpo_export_tokens differs",
    }
    for number, (change, said) in enumerate(changes.items()):
        changed = changed_export(tmp_path / "a.xz", tmp_path / f"{number}.xz", lambda one, sql=change: one.execute(sql))
        with pytest.raises(StudyError, match=said):
            import_study(changed, StudyDirectory(tmp_path / "b"))
        assert not (tmp_path / "b").exists()
