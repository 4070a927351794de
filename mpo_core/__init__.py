"""Matrix product operators (tensor-train matrices) as weights of neural networks, and the models studied with them.

Needs torch alone. Names used throughout: `chi` is the cap on the bonds that was asked for, `bonds` the actual
(1, χ_1, ..., χ_{L-1}, 1), and core l has the shape (bonds[l], d_out[l], d_in[l], bonds[l+1]).
"""

from mpo_core.compress import CompressedLayer, CompressionReport, compress, n_params, n_params_compressed, rel_errors
from mpo_core.factorisation import FACTORISATIONS, factorise
from mpo_core.initialisation import INITS
from mpo_core.linear import MPOLinear
from mpo_core.picogpt import GPTConfig, PicoGPT, flops_per_token, reconstruct_flops
from mpo_core.tensor_train import clip_bonds, contract, largest_bonds, rel_error, tt_svd

__all__ = [
    "FACTORISATIONS",
    "INITS",
    "CompressedLayer",
    "CompressionReport",
    "GPTConfig",
    "MPOLinear",
    "PicoGPT",
    "clip_bonds",
    "compress",
    "contract",
    "factorise",
    "flops_per_token",
    "largest_bonds",
    "n_params",
    "n_params_compressed",
    "reconstruct_flops",
    "rel_error",
    "rel_errors",
    "tt_svd",
]
