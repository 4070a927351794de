"""Generators by name: the same names give the same numbers, everywhere and for ever."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import torch

from study.training.randomness import generator


def draw(*names, n=1000):
    return torch.rand(n, generator=generator(*names))


def test_equal_names_give_equal_streams():
    assert torch.equal(draw(3, "init", "lm_head.weight"), draw(3, "init", "lm_head.weight"))


def test_streams_do_not_change_between_versions():
    # Results on record name their seeds; these values must stay what they were when they were recorded.
    drawn = torch.randint(1000, (5,), generator=generator(0, "data"))
    assert drawn.tolist() == [115, 324, 868, 865, 296]


def test_different_names_give_unrelated_streams():
    names = [(0, "init", ""), (1, "init", ""), (10, "init", ""), (0, "data", ""), (0, "init", "a"), (0, "init", "b")]
    for one, two in combinations([draw(*each) for each in names], 2):
        correlation = np.corrcoef(one.numpy(), two.numpy())[0, 1]
        assert abs(correlation) < 5 / 1000**0.5


def test_seeds_in_a_row_seed_the_twister_differently():
    assert len({generator(seed, "init").initial_seed() for seed in range(10_000)}) == 10_000


def test_generator_is_on_the_cpu_and_leaves_global_state_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    made = generator(0, "init")
    torch.rand(10, generator=made)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert made.device.type == "cpu"
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
