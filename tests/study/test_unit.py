from __future__ import annotations

import pytest
import torch

from study.spec.search_space import listed_specs
from study.spec.study_file import validate
from study.training.model import build_model
from study.training.storage import Storage
from study.training.unit import Starts, run_unit


def test_run_unit_gives_a_result_for_each_seed_and_says_what_it_ran_on(unit_of):
    rows = []
    results = run_unit(unit_of(), lambda seed, row: rows.append((seed, row["step"])))
    assert [(result.trial, result.seed, result.state) for result in results] == [(3, 0, "complete"), (3, 1, "complete")]
    assert rows == [(seed, step) for step in (0, 4, 8, 12) for seed in (0, 1)]  # trained as one model
    assert results[0].ran_on["mpo.torch"] == torch.__version__
    assert results[0].ran_on["mpo.threads"] == "1"


def test_run_unit_without_the_gpu_it_asks_for_is_no_failure_of_the_seed(unit_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OSError, match=r"asks for execution\.gpus=1, but PyTorch finds no CUDA device"):
        run_unit(unit_of(gpus=1), lambda seed, row: None)


def test_run_unit_without_a_gpu_refuses_tf32(unit_of, spec_of):
    spec = spec_of()
    spec = spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"precision": "tf32"})})
    with pytest.raises(OSError, match=r"protocol\.precision=tf32, which only GPUs have, but execution\.gpus is 0"):
        run_unit(unit_of(spec=spec), lambda seed, row: None)


def test_run_unit_with_a_damaged_start_is_no_failure_of_the_seed(unit_of, spec_of):
    unit = unit_of()
    Storage(unit.storage).write("start", b"cut sho")
    spec = spec_of(chi=2, start="dense")
    unit = unit_of(spec=spec, starts=Starts(weights={0: "start", 1: "start"}, tokens=5))
    with pytest.raises(
        OSError, match=r"storage/start: not a whole safetensors file: .*it was removed and will be trained again"
    ):
        run_unit(unit, lambda seed, row: None)


def test_dense_arm_can_start_at_the_scale_of_mpo(small_study, corpus):
    arms = [{"name": "dense", "family": "dense", "init": "variance"}]
    [spec] = listed_specs(validate(small_study(arms=arms), "here"))
    model, _ = build_model(spec, corpus.vocab_size, lambda name: torch.Generator().manual_seed(1))
    assert float(model.blocks[0].feed_forward.down.weight.detach().std()) == pytest.approx(32**-0.5, rel=0.25)
