"""The published numbers: the only numbers in this package that are typed in.

Source: Javanmard, Pandit, Mardani 2026, Tables 2, 3 and 4 and the text. The figures print no numbers: of their curves
only the ends are known (Table 4). A number that is read off a figure is marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass

N_HEADLINE = 16
"""χ at which the abstract claims that most of the dense accuracy is retained."""
RETAINED_ACCURACY = 97.7
"""Per cent of the dense accuracy at that χ (abstract, Figure 4)."""
PARAMS_SHARE = 18.8
"""Per cent of the dense parameters at that χ (conclusion)."""
BLOCK_CHI, BLOCK_RATIO_THERE = 4, 13.0
"""χ, and compression ratio of a transformer block at that χ (abstract)."""
EVAL_EVERY = 100
"""Steps between evaluations (section 4.2)."""
EVALUATED = (20, 8, 256)
"""Batches, sequences and tokens of one evaluation (section 4.2)."""
LOW_LOSS, LOW_ACCURACY = 3.29, 7.0
"""Nats and per cent of one early evaluation, read off Figures 3 and 4."""
DENSE_STD = 0.02
"""Standard deviation of dense weights at initialisation, in the reference code that the paper names."""


@dataclass(frozen=True)
class PublishedLayer:
    """A row of Table 2: a kind of linear layer, its sizes per site, and its parameters dense and at χ = 8.

    name: as the paper writes it. n_in_block: how many of them a block has; 0 for the one outside the blocks. modules:
    how the module names of these layers end in recorded runs.
    """

    name: str
    n_in_block: int
    d_out: tuple[int, ...]
    d_in: tuple[int, ...]
    n_dense: int
    n_mpo: int
    modules: tuple[str, ...]

    @property
    def n_sites(self) -> int:
        return len(self.d_out)


@dataclass(frozen=True)
class PublishedModel:
    """A row of Tables 3 and 4. chi: None for dense. Losses in nats, accuracies and gaps in per cent and points."""

    chi: int | None
    n_params: int
    ratio: float
    val_loss: float
    val_acc: float
    acc_gap: float | None
    acc_per_root_n: float
    max_rel_error: float | None = None
    mean_rel_error: float | None = None

    @property
    def name(self) -> str:
        return "dense" if self.chi is None else f"MPO χ = {self.chi}"


TABLE_2_CHI = 8
_ATTENTION = tuple(f"attention.{name}" for name in ("query", "key", "value", "output"))
LAYERS = (
    PublishedLayer("W_Q, W_K, W_V, W_O", 4, (8, 16), (8, 16), 16_384, 2_560, _ATTENTION),
    PublishedLayer("W_1", 1, (8, 8, 8), (4, 4, 8), 65_536, 4_864, ("feed_forward.up",)),
    PublishedLayer("W_2", 1, (4, 4, 8), (8, 8, 8), 65_536, 2_816, ("feed_forward.down",)),
    PublishedLayer("W_LM", 0, (5, 13), (8, 16), 8_320, 1_984, ("lm_head",)),
)
BLOCK_DENSE = 196_608
BLOCK_MPO = 17_920
BLOCK_RATIO = 11.0

MODELS = (
    PublishedModel(None, 1_020_224, 1.0, 1.860, 52.8, None, 1.65e-3),
    PublishedModel(4, 78_336, 13.0, 2.220, 36.8, -16.0, 4.15e-3, 0.421, 0.337),
    PublishedModel(8, 110_592, 9.2, 1.950, 46.8, -6.0, 4.45e-3, 0.283, 0.216),
    PublishedModel(16, 191_872, 5.3, 1.850, 51.6, -1.2, 3.72e-3, 0.148, 0.107),
    PublishedModel(32, 408_832, 2.5, 1.850, 52.4, -0.4, 2.59e-3, 0.072, 0.051),
)

SIZES = {"vocab_size": 65, "d_model": 128, "n_heads": 4, "n_layers": 4, "context": 256, "d_ff": 512}
"""Params of a run of the paper's model (Table 1)."""

PROTOCOL = {"steps": 2000, "warmup_steps": 100, "batch_size": 32, "learning_rate": 3e-4, "weight_decay": 0.1}
"""Params of a run under the paper's protocol (section 4)."""

CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
"""SHA-256 of Tiny Shakespeare, the paper's corpus."""

FINE_TUNED = {"steps": 500, "batch_size": 32, "weight_decay": 0.1}
"""Params of a run that fine-tunes a compressed dense model (section 4.3); its learning rate is not published."""
