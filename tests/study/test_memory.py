"""The estimated memory of a unit: sizes of real tensors, a measured peak, and what `plan` and `run` say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from study_fixtures import printed_by_run, write_study

from study.commands import memory
from study.commands.memory import UnitMemory, unit_memory
from study.spec.search_space import listed_specs
from study.spec.study_file import validate
from study.training.memory import _LiveBytes, _peak_of_a_step, _peak_of_an_evaluation, unit_bytes
from study.training.model import build_model
from study.training.train import Training, evaluate

LLAMA = {
    "architecture": "huggingface",
    "config": "llama",
    "context": 128,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
PICOGPT = {"d_model": 128, "n_heads": 4, "n_layers": 4, "context": 128}


@pytest.fixture
def healed_of(small_study):
    """The trial of an arm that starts from a dense one."""

    def make(protocol=None, model=None, **arm):
        kind = {} if "family" in arm else {"family": "mpo", "chi": 3}
        arm = {"name": "further", "start": "dense"} | kind | arm
        arms = [{"name": "dense", "family": "dense"}, arm]
        study = small_study(arms=arms, protocol={"batch_size": 8, "weight_decay": 0.0} | (protocol or {}))
        return listed_specs(validate({**study, "model": model or {**PICOGPT, "context": 16}}, "here"))[-1]

    return make


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [PICOGPT, LLAMA], ids=["picogpt", "llama"])
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"recompute": True}], ids=str)
def test_bytes_of_shapes_are_those_of_real_tensors(healed_of, corpus, model, changes):
    spec = healed_of(changes, {**model, "context": 16}, start=None)
    training = Training(spec, 0, corpus)
    inputs, targets = training.training_windows.batch(0)
    with _LiveBytes() as live:
        training._gradients(inputs.clone(), targets)
    shapes, _ = build_model(spec, corpus.vocab_size, None)
    assert _peak_of_a_step(training.spec, _with(shapes, spec), None) == pytest.approx(live.peak, rel=0.02)
    context = spec.model.context
    tokens = torch.zeros(8192 // context, context, dtype=torch.int64)
    training.model.eval()
    for parameter in training.model.parameters():
        parameter.grad = None
    with _LiveBytes() as live:
        evaluate(training.model, iter([(tokens.clone(), tokens)]))
    shapes, _ = build_model(spec, corpus.vocab_size, None)
    assert _peak_of_an_evaluation(spec, shapes, corpus.vocab_size) == pytest.approx(live.peak, rel=0.1)


def _with(model, spec):
    if spec.protocol.recompute:
        from mpo_core import recompute_blocks

        recompute_blocks(model)
    return model


@pytest.mark.slow
def test_what_saves_memory_is_seen_and_what_takes_it(healed_of):
    plain = unit_bytes(healed_of({"batch_size": 512}), 65)
    assert unit_bytes(healed_of({"batch_size": 512, "gradient_accumulation": 8}), 65) < plain - 50e6
    assert unit_bytes(healed_of({"batch_size": 512, "recompute": True}), 65) < plain - 50e6
    assert unit_bytes(healed_of({"batch_size": 1024}), 65) > plain + 50e6
    assert unit_bytes(healed_of({"batch_size": 512}), 65, n_seeds=3) > 2 * plain - 350e6


def test_weights_gradients_and_moments_count(healed_of):
    wide = {**PICOGPT, "d_model": 512, "context": 16}

    def bytes_of(**arm):
        return unit_bytes(healed_of({"batch_size": 1, "sampled_eval_batch_size": 1}, wide, **arm), 65)

    n_dense = 4 * 12 * 512**2  # parameters of the blocks
    plain = bytes_of(family="dense")
    assert bytes_of(family="dense", heal={"loss": "distillation"}) - plain == pytest.approx(4 * n_dense, rel=0.1)
    # Muon has one moment of a matrix instead of two.
    assert plain - bytes_of(family="dense", optimiser="muon") > 0.9 * 4 * n_dense
    compressed = bytes_of(chi=4)
    assert compressed < plain - 4 * 4 * n_dense


MEASURE = r"""
import re, sys
from pathlib import Path
import torch
from study.spec.trial import TrialSpec
from study.training.loading import load_corpus
from study.training.seed_run import train_seed
torch.set_num_threads(1)
result, _ = train_seed(TrialSpec.model_validate_json(sys.argv[1]), 0, load_corpus(sys.argv[2]))
assert result.state == "complete", result.failure
# `ru_maxrss` would start from the peak of the process that started this one.
print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", [PICOGPT, LLAMA], ids=["picogpt", "llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_estimate_is_near_the_measured_peak(healed_of, tmp_path, corpus, small_text, model, recompute):
    text = tmp_path / "long.txt"
    text.write_text(small_text.read_text(encoding="utf-8") * 3, encoding="utf-8")
    steps = {"steps": 3, "warmup_steps": 1, "batch_size": 64, "recompute": recompute}
    spec = healed_of(steps, model, start=None)
    command = [sys.executable, "-c", MEASURE, spec.model_dump_json(), str(text)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    measured, estimated = int(ended.stdout), unit_bytes(spec, corpus.vocab_size)
    assert 0.7 < estimated / measured < 1.5, f"estimated {estimated:,}, measured {measured:,}"


# What is said ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_machine(tmp_path, monkeypatch):
    """A container that may use 100 MB."""
    limit = tmp_path / "memory.max"
    limit.write_text("100000000\n", encoding="ascii")
    monkeypatch.setattr(memory, "_LIMIT", limit)


def test_plan_shows_the_memory_of_the_largest_unit(tmp_path, command):
    arms = [{"name": "dense", "family": "dense"}, {"name": "wide", "family": "dense", "d_model": [64, 512]}]
    file = write_study(tmp_path, arms=arms)
    code, out, _ = command("plan", file)
    assert code == 0
    assert "GB for each unit (trial 2, wide); this machine has" in out
    assert "warning" not in out
    plan = json.loads(command("plan", file, "--json")[1])
    assert (plan["largest_unit"], plan["machine_bytes"]) == ("trial 2, wide", memory.machine_bytes())
    assert 0.3e9 < plan["unit_bytes"] < 2e9


@pytest.mark.usefixtures("small_machine")
def test_too_much_memory_is_a_warning_before_anything_runs(tmp_path, command):
    assert memory.machine_bytes() == 100_000_000
    file = write_study(tmp_path, seeds=1)
    line = (
        "GB of memory, but this machine has 0.1 GB; a larger `protocol.gradient_accumulation`, or `protocol.recompute"
    )
    code, out, _ = command("plan", file)
    assert code == 0
    assert "".join(out.split("\n")).count(line) == 1
    assert out.startswith("warning: a unit (trial ")
    outcome, printed = printed_by_run(file, tmp_path / "study", tracking="off")
    assert outcome.n_missing == 0
    assert printed.count(line) == 1
    assert printed.index(line) < printed.index("1/4")
    _, printed = printed_by_run(file, tmp_path / "study", tracking="off")
    assert line not in printed  # the study has begun


def test_run_says_nothing_where_there_is_enough(tmp_path):
    _, printed = printed_by_run(write_study(tmp_path, seeds=1), tmp_path / "study", tracking="off")
    assert "memory" not in printed


def test_memory_of_other_machines_is_a_warning_alone():
    unit = UnitMemory(41_000_000_000, "trial 4, mpo", 23_000_000_000, is_on_gpu=False)
    assert unit.shown == "memory: about 41 GB for each unit (trial 4, mpo); this machine has 23 GB"
    assert "needs about 41 GB of memory, but this machine has 23 GB;" in unit.warning(is_cluster=False)
    assert "41 GB of memory, which a node of the cluster must have;" in unit.warning(is_cluster=True)
    on_gpu = UnitMemory(41_000_000_000, "trial 4, mpo", 23_000_000_000, is_on_gpu=True)
    assert on_gpu.shown == "memory: about 41 GB for each unit (trial 4, mpo) on its GPU"
    assert "41 GB of memory, which a GPU must have;" in on_gpu.warning(is_cluster=False)
    assert UnitMemory(3_100_000_000, "trial 4, mpo", 23_000_000_000, is_on_gpu=False).warning(False) is None


def test_searched_arms_and_stacked_seeds_count(small_study):
    arms = [
        {"name": "dense", "family": "dense"},
        {"name": "wide", "family": "dense", "d_model": {"low": 2, "high": 64}},
    ]
    arms[1]["d_model"] = {"choices": [8, 128]}
    study = small_study(arms=arms, search={"sampler": "random", "trials": 3}, seeds=3)
    alone = unit_memory(validate(study, "here"), 65)
    assert alone.trial == "largest of arm wide"
    together = unit_memory(validate({**study, "execution": {"seeds_per_unit": 3}}, "here"), 65)
    assert together.n_bytes > alone.n_bytes + 20e6


VALUES = """
from torch import nn

class Chooses(nn.Module):
    def __init__(self, vocab_size, context):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab_size, 8)
        self.lm_head = nn.Linear(8, vocab_size, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.lm_head(x if float(x.detach().sum()) > 0 else 2 * x)

    def init_parameters(self, generator_for):
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, generator=generator_for(name))

    def other_flops_per_token(self, context):
        return 0
"""


def test_a_model_that_needs_values_has_no_estimate_but_runs(small_study, tmp_path, monkeypatch, command):
    (tmp_path / "choosing_models.py").write_text(VALUES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    study = small_study(arms=[{"name": "dense", "family": "dense"}], seeds=1)
    path = tmp_path / "study.yaml"
    model = {"architecture": "choosing_models:Chooses", "context": 8}
    path.write_text(yaml.safe_dump({**study, "model": model}), encoding="utf-8")
    code, out, err = command("plan", path)
    assert (code, err) == (0, "")
    assert "memory: not known for this model" in out
    how = ("run", path, "--dir", tmp_path / "out", "--executor", "inline", "--tracking", "off")
    assert command(*how)[0] == 0
