"""Matrix product operators (tensor-train matrices) as weights of neural networks, and the models studied with them.

Needs only torch, and safetensors to save a model. Names used throughout: `chi` is the requested cap on the bonds, and
`bonds` are the actual bonds (1, χ_1, ..., χ_{L-1}, 1). Core l has the shape (bonds[l], d_out[l], d_in[l], bonds[l+1]).
"""

from mpo_core.compression.budget import spread_budget
from mpo_core.compression.compress import compress, decompress, n_params, n_params_compressed, rel_errors
from mpo_core.compression.report import CompressedLayer, CompressionReport
from mpo_core.compression.saving import load, save
from mpo_core.fitting.calibration import Gram, collect_grams, output_error
from mpo_core.fitting.fit import fit_cores, low_rank_svd, whitened_tt_svd
from mpo_core.fitting.least_squares import als
from mpo_core.layers.cost_model import Calibration, calibrate, set_calibration
from mpo_core.layers.low_rank import LowRankLinear, MonarchLinear, PrunedLinear
from mpo_core.layers.mpo import FORWARD_MODES, MPOLinear
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.generation import generate
from mpo_core.models.picogpt import GPTConfig, KeyValueCache, PicoGPT, flops_per_token, reconstruct_flops
from mpo_core.param_groups import param_groups
from mpo_core.tensor_train.algebra import (
    balance_cores,
    contract,
    frobenius_norm,
    inner_product,
    orthogonalize,
    rel_error,
    round_cores,
    tt_svd,
)
from mpo_core.tensor_train.bonds import clip_bonds, largest_bonds, largest_chi
from mpo_core.tensor_train.contraction import Cost, chain
from mpo_core.tensor_train.factorisation import FACTORISATIONS, factorisations, factorise, why_not
from mpo_core.tensor_train.initialisation import FRESH_INITS, INITS, init_cores_, spectral_norm

__all__ = [
    "FACTORISATIONS",
    "FORWARD_MODES",
    "FRESH_INITS",
    "INITS",
    "Calibration",
    "CompressedLayer",
    "CompressionReport",
    "Cost",
    "GPTConfig",
    "Gram",
    "KeyValueCache",
    "LowRankLinear",
    "MPOLinear",
    "MonarchLinear",
    "PicoGPT",
    "PrunedLinear",
    "StructuredLinear",
    "als",
    "balance_cores",
    "calibrate",
    "chain",
    "clip_bonds",
    "collect_grams",
    "compress",
    "contract",
    "decompress",
    "factorisations",
    "factorise",
    "fit_cores",
    "flops_per_token",
    "frobenius_norm",
    "generate",
    "init_cores_",
    "inner_product",
    "largest_bonds",
    "largest_chi",
    "load",
    "low_rank_svd",
    "n_params",
    "n_params_compressed",
    "orthogonalize",
    "output_error",
    "param_groups",
    "reconstruct_flops",
    "rel_error",
    "rel_errors",
    "round_cores",
    "save",
    "set_calibration",
    "spectral_norm",
    "spread_budget",
    "tt_svd",
    "whitened_tt_svd",
    "why_not",
]
