"""What the documents tell a reader to type, typed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import language_models
import pytest
import torch

from benchmarks.document import put_table
from mpo_core.commands.compress import main
from study.commands.opening import study_corpus
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.training.model import trial_shape

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_PYTHON = (
    "extending.md",
    "findings.md",
    "running.md",
    "study.md",
    "cluster.md",
    "analysis.md",
    "glossary.md",
    "api.md",
    "index.md",
    "notebook.md",  # of a study: see test_site.py
    "performance.md",
    "private_interfaces.md",
)
WITH_PYTHON = [path for path in DOCUMENTS if path.name not in WITHOUT_PYTHON]


@pytest.fixture
def _model_and_text(tmp_path, monkeypatch):
    """The model and text of docs/mpo_core.md, with another model under its name."""
    model = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    model.parent.mkdir()
    language_models.write(language_models.llama(context=512), model)
    lines = [json.dumps({"text": language_models.text(550, seed)}) for seed in range(50)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_model_and_text")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:the predicted loss")
@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.name)
def test_python_of_a_document_runs(path, capsys):
    commands = re.findall(r"^mpo-compress .*--text texts.jsonl$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [main(shlex.split(command)[1:]) for command in commands] == [0] * (path.name == "mpo_core.md")
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    printed = capsys.readouterr().out
    assert "MPOLinear(" in printed
    if path.name == "mpo_core.md":
        assert "parameters" in printed
        model, small, dense, batch = (names[name] for name in ("model", "small", "dense", "batches"))
        torch.testing.assert_close(small(batch[0]), dense(batch[0]))
        n_before, n_after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
        assert n_after < 0.33 * n_before


def test_places_of_tables_in_a_document_are_filled():
    places = [
        (path.name, name, table)
        for path in DOCUMENTS
        if path.name not in ("README.md", "findings.md")  # whose places test_results.py fills
        for name, table in re.findall(r"<!-- begin (\S+) -->(.*?)<!-- end \1 -->", path.read_text("utf-8"), re.DOTALL)
    ]
    assert places
    for document, name, table in places:
        rows = [line for line in table.splitlines() if line.startswith("| ")]
        assert len(rows) > 2, f"{document}: {name}"


def anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_a_document_lead_somewhere():
    for path in [*DOCUMENTS, ROOT / "docs/results/README.md"]:
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            to = path.parent / target if target else path
            assert to.exists(), f"{path.name}: {link}"
            assert not anchor or anchor in anchors(to), f"{path.name}: {link}"


def test_put_table_replaces_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.document.ROOT", tmp_path)
    (tmp_path / "a.md").write_text("before\n<!-- begin x -->\nold\n<!-- end x -->\nafter\n")
    for _ in range(2):
        put_table("a.md", "x", "How it was made.", ["a", "b"], [["1", "2"]])
    assert (tmp_path / "a.md").read_text() == (
        "before\n<!-- begin x -->\nHow it was made.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end x -->\nafter\n"
    )
    with pytest.raises(ValueError, match="must have a place <!-- begin y -->"):
        put_table("a.md", "y", "", [], [])


@pytest.mark.usefixtures("_model_and_text")
def test_whole_study_files_in_the_documents_can_be_planned(tmp_path):
    """With a model and texts of these names beside them."""
    document = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    (tmp_path / "SmolLM2-135M").symlink_to(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    names = []
    for block in re.findall(r"```yaml\n(?:#[^\n]*\n)?(name: .*?)```", document, re.DOTALL):
        (tmp_path / "study.yaml").write_text(block, encoding="utf-8")
        config = load_config(tmp_path / "study.yaml")
        corpus = study_corpus(config)
        for spec in listed_specs(config):
            shape = trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model)
            assert shape.n_params <= shape.n_params_dense * (1.5 if spec.chi or spec.as_chi else 1)
        names.append(config.name)
    assert names == ["first", "paper", "compress", "llama-scratch", "tuning"]
