"""How well TT-SVD can represent the weights of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mpo_core.models.dense_layers import linear_layers
from mpo_core.tensor_train.algebra import contract, rel_error, tt_svd
from mpo_core.tensor_train.factorisation import factorise


def rel_errors(
    model: nn.Module, chis: Sequence[int], *, factorisation: str = "balanced", n_sites: int | None = None
) -> dict[tuple[int, str], float]:
    """‖W − Ŵ‖_F / ‖W‖_F of the TT-SVD of every nn.Linear and Conv1D at every cap: {(chi, layer name): rel_error}.

    Computed in the dtype and on the device of the weights; the model is left as it is. Subclasses of nn.Linear, and
    layers whose weight is computed from other parameters, have no entry.

    Raises:
        ValueError: as `factorise` and `tt_svd`, with the name of the layer.
    """
    errors: dict[tuple[int, str], float] = {}
    for name, linear in linear_layers(model).items():
        W = linear.weight.detach()
        for chi in chis:
            try:
                d_out, d_in = factorise(*W.shape, method=factorisation, n_sites=n_sites, chi=chi)
                errors[chi, name] = rel_error(W, contract(tt_svd(W, d_out, d_in, chi)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return errors
