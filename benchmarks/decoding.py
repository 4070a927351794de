"""Decoding with PicoGPT, token by token: MPO against dense, cached keys and values against none, and growth of both.

Every call is `mpo_core.generate`, greedily, from one token on. So all figures include the first pass, the choice of
each token and the forming of W. The model is the paper's, in float32, with untrained weights: the cost of a matrix
product does not depend on its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.measurement import Row, paired, run_alone
from mpo_core import GPTConfig, PicoGPT, compress, generate
from mpo_core.models import generation

SECTION = "decoding"
CHI = 8
N_NEW = 255
"""New tokens, after one, that fill the context of 256."""
BATCHES = (1, 16)

LIMITS = {
    SECTION: "Once W is formed, an MPO layer computes what a dense one does. Forming W, once for all tokens, is extra. "
    "With fewer tokens its share is larger."
}


def rows() -> list[Row]:
    """Only MPO against dense has a target: not slower."""
    dense, twin = model_of(None), model_of(None)
    mpo = model_of(CHI)
    found = []
    for batch in BATCHES:
        what, against = f"MPO χ={CHI}, batch {batch}", f"dense, batch {batch}"
        one, other = decoding(mpo, batch), decoding(dense, batch)
        found += [
            paired(SECTION, what, one, against, other, target=1.0, note="W is formed once for all tokens, here"),
            paired(SECTION, f"dense again, batch {batch}", decoding(twin, batch), against, other, note="noise alone"),
        ]
    found += [
        paired(SECTION, f"MPO χ={CHI}, mode {mode}, nothing held", unheld(model_of(CHI, mode)), "W held", decoding(mpo))
        for mode in ("cached", "reconstruct", "chain")
    ]
    for name, model in (("dense", dense), (f"MPO χ={CHI}", mpo)):
        for batch in BATCHES:
            uncached = decoding(model, batch, use_cache=False)
            what = f"{name}, batch {batch}, cached keys and values"
            found.append(paired(SECTION, what, decoding(model, batch), "computed anew", uncached, pairs=7))
    return found + growth(dense)


def growth(dense: PicoGPT) -> list[Row]:
    """Twice the tokens; the note has the exponent of the tokens that corresponds to the ratio."""
    found = []
    for n_new in (64, 128):
        for use_cache in (True, False):
            how = "cached" if use_cache else "computed anew"
            longer, shorter = (decoding(dense, n_new=n, use_cache=use_cache) for n in (2 * n_new - 1, n_new - 1))
            row = paired(SECTION, f"dense, {2 * n_new} tokens, {how}", longer, f"{n_new} tokens", shorter, pairs=7)
            found.append(row._replace(note=f"time ∝ tokens^{math.log2(row.ratio):.2f}"))
    return found


def model_of(chi: int | None, forward: str = "reconstruct") -> PicoGPT:
    """The paper's model, dense or as MPO, in that forward mode."""
    model = PicoGPT(GPTConfig())
    model.init_parameters(_drawn, "variance")
    if chi is None:
        return model
    size = {"chi": chi, "allow_growth": True, "factorisation": "paper"}
    return compress(model, **size, init="variance", generator_for=_drawn, forward=forward)[0]


def _drawn(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(0)


def decoding(model: PicoGPT, batch: int = 1, n_new: int = N_NEW, use_cache: bool = True) -> Callable[[], object]:
    tokens = torch.zeros(batch, 1, dtype=torch.int64)
    return lambda: generate(model, tokens, n_new, temperature=0, use_cache=use_cache)


def unheld(model: PicoGPT) -> Callable[[], object]:
    """Decoding in which W is not held: each MPO layer applies its forward mode at every token."""
    call = decoding(model)

    def run() -> None:
        with patch.object(generation, "_hold_matrices"):
            call()

    return run


if __name__ == "__main__":
    run_alone(rows)
