"""The fit of a chain of two sites of which one has a whole side of the matrix: a matrix in parts with one row space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.descent import minimise
from mpo_core.fitting.metric import Metric, solve_root
from mpo_core.fitting.whitening import kronecker_factors
from mpo_core.tensor_train.algebra import balance_cores
from mpo_core.values import error_ratio, times_power, to_unit

STEPS = 4
"""A step does about as much as that many of `descend`, so a quick fit takes a STEPS-th of the steps."""
UNSEEN = 1e-6
"""Inputs of which some have less than this share of the mean square are a reason to try a second start."""
LEAST = 1e-3
"""Singular values count as at least this share of the largest, as in `chain_fit`."""


class SharedSpace:
    """W (m, n) in k parts of p columns, approximated by [A_1 B, …, A_k B] with A_j (m, χ) and one B (χ, p).

    This is a chain of two sites with all outputs in one; W is transposed if all inputs are in one. The metric of the
    whole side is met exactly. For a given B the best A_j are the solution of linear equations, so B alone is fitted by
    steps. Their coordinates make this converge in about ten steps: the parts of the metric at the columns have the mean
    identity, and each row of B has the norm of its component.

    Args:
        W: (prod(d_out), prod(d_in)). metric: of W, on its device, not the Frobenius norm.
        d_out, d_in: two sizes each, see `is_for`.
    Source: variable projection, Golub & Pereyra 1973.
    """

    def __init__(self, W: Tensor, metric: Metric, d_out: Sequence[int], d_in: Sequence[int]) -> None:
        self._is_turned = 1 not in d_out
        rows, columns, M = d_out, d_in, W
        moments = (metric.gram, metric.input_root), (metric.sensitivity, metric.output_root)
        if self._is_turned:
            rows, columns, M, moments = d_in, d_out, W.T, moments[::-1]
        (gram, gram_root), (_, of_rows) = moments
        self._first = 0 if rows[1] == 1 else 1  # the site of A
        self._k, self._p = columns[self._first], columns[1 - self._first]
        self._W, self._of_rows, n = W.clone(), of_rows, self._k * self._p
        M, exponent = to_unit(M.double())
        if gram is None or gram_root is None:
            G = R = torch.eye(n, dtype=M.dtype, device=M.device)
        else:  # its scale changes no relative error
            size = torch.frexp(gram.diagonal().amax()).exponent // 2
            G, R = times_power(gram, -2 * size), times_power(gram_root, -size)
        is_definite = gram_root is None or not gram_root.triu(1).any()  # see `root`
        if self._first == 1:  # part by part
            order = torch.arange(n, device=M.device).reshape(self._p, self._k).T.reshape(-1)
            M, G, R = M[:, order], G[order][:, order], R[order]
        M, more = to_unit(M if of_rows is None else of_rows.T @ M)
        self._exponent = exponent + more
        of_parts, of_columns = kronecker_factors(G, (self._k, self._p))
        of_columns = of_columns * of_parts.diagonal().mean()
        # Any definite matrix is only a change of coordinates; the floor makes sure that it can be undone.
        floor = 1e-8 * float(of_columns.diagonal().max())
        L = torch.linalg.cholesky(of_columns + floor * torch.eye(self._p, dtype=G.dtype, device=G.device))
        self._of_columns = L
        half = G if is_definite else R
        half = torch.linalg.solve_triangular(L, half.reshape(self._k, self._p, n), upper=False).reshape(n, n)
        if is_definite:
            whitened = torch.linalg.solve_triangular(L, half.T.reshape(self._k, self._p, n), upper=False).reshape(n, n)
        else:  # by a root, because rounding in a singular G itself would cause negative directions
            whitened = half @ half.T
        M = (M.reshape(-1, self._p) @ L).reshape(len(M), self._k, self._p)
        moment = M.reshape(-1, self._p).T @ (of_parts @ M).reshape(-1, self._p)
        values, vectors = torch.linalg.eigh(moment)
        self._values = values.flip(0).clamp(min=0)
        V = M.reshape(len(M), n) @ whitened
        self._total = max(float(torch.sum(M.reshape(V.shape) * V)), 0.0)
        exact = whitened.reshape(self._k, self._p, n), M.transpose(0, 1).contiguous(), V
        self._precision = torch.promote_types(W.dtype, torch.float32)
        self._given = {torch.float64: exact, self._precision: tuple(each.to(self._precision) for each in exact)}
        self._start = vectors.flip(1).T.to(self._precision)
        if (G.diagonal() < UNSEEN * G.diagonal().mean()).any():  # the parts may matter by other shares than `of_parts`
            vectors = torch.linalg.eigh(M.reshape(-1, self._p).T @ M.reshape(-1, self._p))[1]
            starts = self._start, vectors.flip(1).T.to(self._precision)
            self._start = min(starts, key=lambda start: self._evaluated(start[: -(-self._p // 4)])[0])

    @staticmethod
    def is_for(d_out: Sequence[int], d_in: Sequence[int]) -> bool:
        """Whether the chain has two sites, one of them with a whole side."""
        return len(d_out) == 2 and (1 in d_out or 1 in d_in)

    @classmethod
    def of(cls, W: Tensor, metric: Metric, d_out: Sequence[int], d_in: Sequence[int]) -> SharedSpace:
        """As the constructor; the metric keeps it, because many sizes of one matrix are tried in turn."""
        known: dict[object, SharedSpace] = metric.__dict__.setdefault("_shared_spaces", {})
        sizes = tuple(d_out), tuple(d_in)
        if sizes not in known or known[sizes]._W.dtype != W.dtype or not torch.equal(known[sizes]._W, W):
            known[sizes] = cls(W, metric, d_out, d_in)
        return known[sizes]

    def squared_tail(self) -> list[float]:
        """Entry χ: the share of the squared norm beyond the χ leading directions, which are a start of the fit."""
        total = float(self._values.sum())
        if total == 0:
            return [0.0] * (self._p + 1)
        return [*(self._values.flip(0).cumsum(0).flip(0) / total).tolist(), 0.0]

    def error(self, chi: int, max_steps: int, tolerance: float) -> float:
        """The relative error in the metric of the fit with that χ; max_steps and tolerance as for `descend`."""
        _, value = self._fit(chi, max_steps, tolerance)
        return error_ratio(math.sqrt(2 * max(value, 0.0)), math.sqrt(self._total))

    def cores(self, chi: int, max_steps: int, tolerance: float) -> list[Tensor]:
        """The cores of that fit, float64, with equal norms."""
        B, _ = self._fit(chi, max_steps, tolerance)
        B = B.double()  # the equations for A may be ill-conditioned
        A = self._best(B)[0].reshape(self._k * chi, -1)
        B = torch.linalg.solve_triangular(self._of_columns, B, upper=False, left=False)
        A = A.T if self._of_rows is None else solve_root(self._of_rows, A.T)  # (m, k·χ)
        A = times_power(A, self._exponent).reshape(len(A), self._k, chi)
        if self._first == 0:
            first, last = A[None], B.reshape(chi, 1, self._p, 1)
        else:
            first, last = B.T.reshape(1, 1, self._p, chi), A.permute(2, 0, 1)[..., None]
        cores = [core.transpose(1, 2) if self._is_turned else core for core in (first, last)]
        return balance_cores([core.contiguous() for core in cores])

    def _fit(self, chi: int, max_steps: int, tolerance: float) -> tuple[Tensor, float]:
        """B (χ, p), and half the squared error."""
        B = self._start[:chi]
        A = self._best(B)[0].double()
        # Seen from the components, B is a rotation.
        values, vectors = torch.linalg.eigh((A @ A.mT).sum(0))
        scales = values.clamp(min=0).sqrt()
        scales = scales.clamp(min=LEAST * float(scales[-1]) or 1.0).to(B)[:, None]
        B = vectors.T.to(B) @ B

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            value, gradient = self._evaluated(x.reshape(B.shape) / scales)
            return value, (gradient / scales).reshape(-1)

        x, value = minimise(
            evaluate,
            (B * scales).reshape(-1),
            max_steps=max_steps,
            tolerance=tolerance,
            first_scale=1.0,
        )
        return x.reshape(B.shape) / scales, value

    def _best(self, B: Tensor) -> tuple[Tensor, Tensor]:
        """The best A (k, χ, m) for B (χ, p), and B times the parts of the metric (k·χ, n)."""
        (G, _, V), k, p, chi = self._given[B.dtype], self._k, self._p, len(B)
        BG = (B @ G).reshape(k * chi, k * p)
        H = (BG.reshape(k * chi * k, p) @ B.T).reshape(k * chi, k * chi)
        # Parts of B that the metric does not see make H singular. If all shifts fail, B is out of range, and the value
        # is NaN or far too large, so that the step is refused.
        unit, factor = torch.finfo(H.dtype).eps * float(H.diagonal().max()) or 1.0, H
        for shift in (1e1, 1e3, 1e5):
            shifted = H + shift * unit * torch.eye(len(H), dtype=H.dtype, device=H.device)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                break
        seen = B @ V.reshape(-1, k, p).permute(1, 2, 0)
        return torch.cholesky_solve(seen.reshape(k * chi, -1), factor).reshape(k, chi, -1), BG

    def _evaluated(self, B: Tensor) -> tuple[float, Tensor]:
        """Half the squared error with the best A for B (χ, p), and its gradient with respect to B."""
        _, M, V = self._given[B.dtype]
        A, BG = self._best(B)
        weighted = torch.addmm(V, A.reshape(len(BG), -1).T, BG, alpha=-1)  # E G
        weighted = weighted.reshape(-1, self._k, self._p).transpose(0, 1)
        value = float(torch.sum((M - A.mT @ B) * weighted)) / 2
        # A is the best for B, so that the error has no slope along it.
        return value, -(A @ weighted).sum(0)
