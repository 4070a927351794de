"""Arms of a study file: what is compared, each giving one trial or more.

An arm has listed or searched values beside its fixed ones, not both.
"""

from __future__ import annotations

from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from study.spec.values import (
    Choices,
    FixedOrBySize,
    FixedOrListed,
    Name,
    Number,
    NumberBySize,
    PositiveFloat,
    PositiveInt,
    Range,
    Sites,
    Steps,
    Strict,
    Value,
    WideInt,
    Width,
    options,
)

_BY_SIZE = "`{8: 3e-3, 16: 1e-3}`: by the trial's χ, or a dense one's d_model."


class _Arm(Strict):
    name: Name = Field(description="Unique in the study; what figures and tables call it.")
    learning_rate: NumberBySize[PositiveFloat] | None = Field(
        default=None, description=f"Overrides the protocol's. {_BY_SIZE}"
    )
    embedding_learning_rate: NumberBySize[PositiveFloat] | None = Field(
        default=None,
        description="Overrides the protocol's; the same value as `learning_rate` means no rate of their own. "
        + _BY_SIZE,
    )
    steps: Steps | None = Field(default=None, description="Overrides the protocol's.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Overrides the protocol's.")
    eval_every: PositiveInt | None = Field(default=None, description="Overrides the protocol's.")
    tuned_among: PositiveInt | None = Field(
        default=None,
        description="This arm's values were chosen among so many trials, for each of its sizes, of another study; "
        "`mpo-study winners` writes it. Arms are of one budget where they were tuned as much.",
    )

    def values(self) -> dict[str, Any]:
        """The fields that may be listed or searched and are given, in the order of the model."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if name in VALUE_FIELDS and getattr(self, name) is not None
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """χ of the trials of an arm without searched values, or the widths of its dense models; empty where that is the
        study's own."""
        given = next((value for key, value in self.values().items() if key in SIZE_FIELDS), ())
        return given if isinstance(given, tuple) else (given,)

    @property
    def is_searched(self) -> bool:
        return any(isinstance(value, Choices | Range) for value in self.values().values())

    @model_validator(mode="after")
    def _listed_or_searched(self) -> _Arm:
        listed = [name for name, value in self.values().items() if isinstance(value, tuple)]
        if listed and self.is_searched:
            raise ValueError(
                f"an arm has listed or searched values, not both; write `{listed[0]}: {{choices: [...]}}` "
                "to let the sampler choose"
            )
        by_size = [name for name in BY_SIZE_FIELDS if isinstance(getattr(self, name, None), dict)]
        if by_size and self.is_searched:
            raise ValueError(f"`{by_size[0]}` by size is not allowed beside searched values")
        for name, value in self.values().items():
            if isinstance(value, dict):
                continue
            given = options(value)
            if len(set(given)) != len(given):
                raise ValueError(f"`{name}` names a value twice: {shorten(str(list(given)), 80, placeholder=' ...')}")
        return self


class DenseArm(_Arm):
    """Plain linear layers: the reference, a narrower model as a control, or one that is trained further."""

    family: Literal["dense"] = Field(description="Which kind of arm this is.")
    init: Value[Literal["paper", "variance"]] | None = Field(
        default=None, description="Scale of the linear weights: `paper` (std 0.02) unless given, `variance` (1/√N_in)."
    )
    d_model: Number[Width] | None = Field(
        default=None, description="Overrides the model's; d_ff follows as 4 × d_model unless given."
    )
    d_ff: FixedOrBySize[WideInt] | None = Field(
        default=None,
        description="Overrides the model's. `{40: 146, 60: 228}`: by d_model, to come as near to a number of "
        "parameters as heads of equal width allow.",
    )
    teacher: Name | None = Field(
        default=None,
        description="A dense arm with one trial: train its trained model of the same seed further, with a schedule of "
        "its own, as the control of what is compressed and fine-tuned.",
    )

    @model_validator(mode="after")
    def _nothing_new_beside_a_teacher(self) -> DenseArm:
        given = [key for key in ("init", "d_model", "d_ff") if getattr(self, key) is not None]
        if self.teacher is not None and given:
            raise ValueError(f"`{given[0]}` has no meaning beside `teacher`: the model is the teacher's")
        return self


class CompressedArm(_Arm):
    """Every linear layer has fewer parameters."""

    n_sites: Number[Sites] | None = Field(
        default=None, description="Number of sites L of an MPO, 1 to 6; not with factorisation `paper`."
    )
    factorisation: Value[Literal["paper", "balanced", "min_params"]] = Field(
        default="paper",
        description="How the sizes of an MPO split over sites; `paper` falls back to `balanced` where it has no entry, "
        "`min_params` has the fewest parameters at its χ.",
    )
    teacher: Name | None = Field(
        default=None,
        description="A dense arm with one trial: compress its trained model of the same seed, then fine-tune.",
    )
    lr_rule: Value[Literal["uniform", "mup"]] | None = Field(
        default=None, description="Learning rates of the factors: `uniform` unless given; `mup` by each one's fan-in."
    )
    decay: Value[Literal["parameter", "matrix"]] | None = Field(
        default=None,
        description="What weight decay shrinks: each factor (`parameter`, unless given), or W as if it were dense.",
    )
    refinement: Any = None

    @model_validator(mode="after")
    def _sites_and_refinement(self) -> CompressedArm:
        if self.teacher is None and self.refinement is not None:
            raise ValueError("`refinement` has no meaning without `teacher`: there are no trained weights to fit")
        if self.n_sites is not None and "paper" in options(self.factorisation):
            raise ValueError("`n_sites` is not allowed with `factorisation: paper`, which has its own")
        return self


class MPOArm(CompressedArm):
    """Every linear layer is an MPO."""

    family: Literal["mpo"] = Field(description="Which kind of arm this is.")
    chi: Number[PositiveInt] = Field(description="Cap on every bond dimension.")
    init: Value[Literal["paper", "variance", "orthogonal", "spectral", "tt_svd", "tt_svd_fresh"]] | None = Field(
        default=None,
        description="Init mode of an arm trained from scratch; `variance` unless given. `tt_svd` decomposes a dense "
        "draw of the paper's scale (std 0.02), `tt_svd_fresh` one of the scale of `variance`.",
    )
    refinement: Value[Literal["tt_svd", "whitened", "als"]] | None = Field(
        default=None,
        description="How the teacher's weights become cores: `tt_svd` unless given; the others fit the outputs over "
        "protocol.calibration_batches.",
    )
    forward: Value[Literal["reconstruct", "chain"]] | None = Field(
        default=None,
        description="How a layer is applied: W formed in every forward (`reconstruct`, unless given), or never. "
        "The same function, to rounding.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> MPOArm:
        _refuse_beside_teacher(self)
        return self


class ControlArm(CompressedArm):
    """Every linear layer is of another kind, with at most the parameters that an MPO would have in its place."""

    family: Literal["low_rank", "monarch", "pruned"] = Field(
        description="Which kind of arm this is: two factors of low rank; Monarch's two block-diagonal ones; or a dense "
        "weight most of whose entries are 0 and stay so."
    )
    as_chi: FixedOrListed[PositiveInt] = Field(
        description="χ of that MPO, layer by layer. A layer stays dense where the MPO's would not be smaller."
    )
    init: Value[Literal["variance", "svd_fresh"]] | None = Field(
        default=None,
        description="Init mode of an arm trained from scratch; `variance` unless given. `svd_fresh`, of low_rank "
        "alone: the truncated SVD of a dense draw of that scale.",
    )
    refinement: Value[Literal["weights", "outputs"]] | None = Field(
        default=None,
        description="What of the teacher's layers is kept best: their `weights`, unless given; or their `outputs` over "
        "protocol.calibration_batches.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ControlArm:
        _refuse_beside_teacher(self)
        if "svd_fresh" in options(self.init) and self.family != "low_rank":
            raise ValueError(f"`init: svd_fresh` is of family `low_rank` alone, not of `{self.family}`")
        return self


def _refuse_beside_teacher(arm: MPOArm | ControlArm) -> None:
    if arm.teacher is not None and arm.init is not None:
        raise ValueError("`init` has no meaning beside `teacher`: the layers come from the teacher's weights")


Arm = Annotated[DenseArm | MPOArm | ControlArm, Field(discriminator="family")]
RATES = ("learning_rate", "embedding_learning_rate")
BY_SIZE_FIELDS = (*RATES, "d_ff")
VALUE_FIELDS = (
    *(*RATES, "d_model", "chi", "as_chi", "n_sites", "factorisation", "init", "refinement", "lr_rule"),
    *("decay", "forward"),
)
SIZE_FIELDS = ("d_model", "chi", "as_chi")
