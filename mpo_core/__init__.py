"""Matrix product operators (tensor-train matrices) as weights of neural networks, and the models studied with them.

Needs only torch, and safetensors to save a model. Names used throughout: `chi` is the requested cap on the bonds, and
`bonds` are the actual bonds (1, χ_1, ..., χ_{L-1}, 1). Core l has the shape (bonds[l], d_out[l], d_in[l], bonds[l+1]).
"""

from mpo_core.calibration.collecting import collect_statistics, next_token_losses
from mpo_core.calibration.collection_folder import digest_of, digest_of_model
from mpo_core.calibration.moments import UnusableValues
from mpo_core.calibration.statistics import Statistics
from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params, n_params_compressed
from mpo_core.compression.decompress import decompress
from mpo_core.compression.perplexity import Perplexity, paired_difference, perplexity
from mpo_core.compression.rel_errors import rel_errors
from mpo_core.compression.report import CompressionReport
from mpo_core.compression.saving import load, save
from mpo_core.fitting.chain_fit import improve_cores
from mpo_core.fitting.metric import Metric
from mpo_core.layers.block_train import BlockTrainLinear
from mpo_core.layers.cost_model import DeviceRates, set_rates
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.layers.mpo import FORWARD_MODES, MPOLinear
from mpo_core.layers.pruned import PrunedLinear
from mpo_core.layers.registry import kind_called, kinds
from mpo_core.layers.structured import StructuredLinear
from mpo_core.layers.tree import TreeLinear
from mpo_core.models.building import build_language_model, code_of
from mpo_core.models.dense_layers import replaceable_layers
from mpo_core.models.generation import generate
from mpo_core.models.hugging_face import hub_folder, pretrained_sha256
from mpo_core.models.language_model import (
    cache_of,
    check_causal,
    check_flops,
    check_trainable,
    draw_parameters,
    flops_per_token,
    head_of,
    logits_of,
    parameters_by_role,
    reconstruct_flops,
)
from mpo_core.models.picogpt import GPTConfig, PicoGPT
from mpo_core.models.recomputing import recompute_blocks
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
from mpo_core.tensor_train.contraction import chain
from mpo_core.tensor_train.factorisation import factorisations, factorise
from mpo_core.tensor_train.initialisation import spectral_norm

__all__ = [
    "FORWARD_MODES",
    "BlockTrainLinear",
    "CompressionReport",
    "DeviceRates",
    "GPTConfig",
    "LowRankLinear",
    "MPOLinear",
    "Metric",
    "MonarchLinear",
    "Perplexity",
    "PicoGPT",
    "PrunedLinear",
    "Statistics",
    "StructuredLinear",
    "TreeLinear",
    "UnusableValues",
    "balance_cores",
    "build_language_model",
    "cache_of",
    "chain",
    "check_causal",
    "check_flops",
    "check_trainable",
    "code_of",
    "collect_statistics",
    "compress",
    "contract",
    "decompress",
    "digest_of",
    "digest_of_model",
    "draw_parameters",
    "factorisations",
    "factorise",
    "flops_per_token",
    "frobenius_norm",
    "generate",
    "head_of",
    "hub_folder",
    "improve_cores",
    "inner_product",
    "kind_called",
    "kinds",
    "load",
    "logits_of",
    "n_params",
    "n_params_compressed",
    "next_token_losses",
    "orthogonalize",
    "paired_difference",
    "param_groups",
    "parameters_by_role",
    "perplexity",
    "pretrained_sha256",
    "recompute_blocks",
    "reconstruct_flops",
    "rel_error",
    "rel_errors",
    "replaceable_layers",
    "round_cores",
    "save",
    "set_rates",
    "spectral_norm",
    "tt_svd",
]
