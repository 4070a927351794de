"""Arms of a study file: what is compared. Each arm gives at least one trial.

An arm has fixed values, and either listed or searched ones.
"""

from __future__ import annotations

from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from study.spec.bonds import Bonds
from study.spec.heal import Heal, is_plain
from study.spec.sweep import Sweep
from study.spec.values import (
    Choices,
    DecayFraction,
    FixedOrBySize,
    FixedOrListed,
    Name,
    Number,
    NumberBySize,
    OptimiserName,
    PositiveFloat,
    PositiveInt,
    Range,
    ScheduleName,
    Share,
    Sites,
    Steps,
    Strict,
    Value,
    WideInt,
    Width,
    options,
)

PRETRAINED = "pretrained"
"""The start of an arm that begins from the pretrained weights of the study's model."""

AUTO = "auto"
"""Family and factorisation for which each matrix takes what has the least error."""

_Pattern = Annotated[str, Field(max_length=200)]
_BY_SIZE = "`{8: 3e-3, 16: 1e-3}` sets it by χ, or by d_model for a dense arm; not allowed with `keep`."


class _Arm(Strict):
    name: Name = Field(description="Name of the arm in figures and tables. It must be unique.")
    learning_rate: NumberBySize[PositiveFloat] | None = Field(
        default=None, description=f"Overrides the protocol's. {_BY_SIZE}"
    )
    embedding_learning_rate: NumberBySize[PositiveFloat] | None = Field(
        default=None,
        description=f"Overrides the protocol's. The value of `learning_rate` means no separate rate. {_BY_SIZE}",
    )
    steps: Steps | None = Field(default=None, description="Overrides the protocol's.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Overrides the protocol's.")
    schedule: ScheduleName | None = Field(
        default=None,
        description="Overrides the protocol's.",
        exclude_if=lambda value: value is None,  # a file without it is recorded as before there was a choice
    )
    decay_fraction: DecayFraction | None = Field(
        default=None, description="Overrides the protocol's.", exclude_if=lambda value: value is None
    )
    eval_every: PositiveInt | None = Field(default=None, description="Overrides the protocol's.")
    optimiser: Value[OptimiserName] | None = Field(
        default=None, description="Overrides the protocol's.", exclude_if=lambda value: value is None
    )
    tuned_among: PositiveInt | None = Field(
        default=None,
        description="Number of trials of another study, for each size, among which this arm's values were chosen. "
        "`mpo-study winners` writes it. Arms with equal budgets were tuned over equally many trials.",
    )
    heal: Heal | None = Field(
        default=None,
        description="How an arm with a `start` is trained, see [below](#healing).",
        exclude_if=is_plain,
    )

    @property
    def start_arm(self) -> str | None:
        """The arm that this one waits for."""
        start = getattr(self, "start", None)
        return None if start == PRETRAINED else start

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

    @model_validator(mode="after")
    def _healed_from_a_start(self) -> _Arm:
        if self.heal is not None and getattr(self, "start", None) is None:
            raise ValueError("`heal` has no meaning without `start`: there is no trained model to heal")
        return self


class DenseArm(_Arm):
    """Dense linear layers: the reference, a narrower model as a control, or one that is trained further."""

    family: Literal["dense"] = Field(description="Kind of layer.")
    init: Value[Literal["paper", "variance"]] | None = Field(
        default=None,
        description="Scale of the linear weights: `paper` (std 0.02) or `variance` (1/√N_in). Default: `paper`.",
    )
    d_model: Number[Width] | None = Field(
        default=None, description="Overrides the model's. Then d_ff is 4 × d_model by default."
    )
    d_ff: FixedOrBySize[WideInt] | None = Field(
        default=None,
        description="Overrides the model's. `{40: 146, 60: 228}` sets it by d_model, to come close to a given number "
        "of parameters.",
    )
    model: dict[str, bool | int | float | str | None] | None = Field(
        default=None,
        description="Settings of a model that is not PicoGPT which this arm changes, such as `{hidden_size: 96}`: a "
        "narrower or shallower model as a control. Only from scratch.",
        exclude_if=lambda value: value is None,
    )
    start: Name | None = Field(
        default=None,
        description="A dense arm with one trial, or `pretrained`. The arm's trained model of the same seed is trained "
        "further with a schedule of its own. It is the control for models that are compressed and fine-tuned. "
        "Default: from scratch.",
    )

    @model_validator(mode="after")
    def _nothing_new_beside_a_start(self) -> DenseArm:
        given = [key for key in ("init", "d_model", "d_ff", "model") if getattr(self, key) is not None]
        if self.start is not None and given:
            raise ValueError(f"`{given[0]}` has no meaning beside `start`: the model is that arm's")
        if self.heal is not None and self.heal.layers == "structured":
            raise ValueError("`heal.layers: structured` is not allowed in a dense arm: none of its layers is replaced")
        return self


class CompressedArm(_Arm):
    """Every linear layer is replaced by a smaller one."""

    n_sites: Number[Sites] | None = Field(
        default=None, description="Number of sites L of an MPO, 1 to 6. Not allowed with factorisation `paper`."
    )
    factorisation: Value[Literal["paper", "balanced", "min_params"]] = Field(
        default="balanced",
        description="How an MPO splits the layer's sizes over its sites. `paper` uses `balanced` for sizes that the "
        "paper does not have. `min_params` has the fewest parameters at its χ.",
    )
    start: Name | None = Field(
        default=None,
        description="A dense arm with one trial, or `pretrained`. The arm's trained model of the same seed, or the "
        "pretrained model, is compressed, then fine-tuned. Default: from scratch. Required with `keep`.",
    )
    lr_rule: Value[Literal["uniform", "mup"]] | None = Field(
        default=None,
        description="Learning rates of the factors: `uniform`, or `mup` by fan-in. Default: `uniform`. Rates are the "
        "same in both gauges.",
    )
    decay: Value[Literal["parameter", "matrix"]] | None = Field(
        default=None,
        description="Weight decay acts on each factor (`parameter`) or on W (`matrix`). Default: `parameter`. In the "
        "fixed gauge W is proportional to its last factor alone; `matrix` then acts on that factor alone.",
    )
    gauge: Value[Literal["free", "fixed"]] | None = Field(
        default=None,
        description="`fixed`: χ rows of every factor but the last are those of the identity; they are neither stored "
        "nor trained. This saves χ² parameters for each bond (χ is the rank in low_rank). A fresh layer of the same χ "
        "has the same W in both gauges, up to rounding. Default: `free`. Only some families have it, see "
        "[below](#inits-gauges-and-options).",
        exclude_if=lambda value: value is None,  # a file without it is recorded as it was before there were gauges
    )
    layers: (
        Annotated[tuple[Annotated[str, Field(max_length=200)], ...], Field(min_length=1, max_length=1000)] | None
    ) = Field(
        default=None,
        description="Which linear layers are replaced: patterns of their names, such as `model.layers.*`. Default: "
        "all of PicoGPT; all but the head of other models.",
        exclude_if=lambda value: value is None,
    )

    options: dict[Name, bool | int | float | str | tuple[int, ...]] | None = Field(
        default=None,
        description="Options of the kind of layer, such as `{n_sites: 6}` of a `tree` or `{n_blocks: 8}` of `monarch`. "
        "They are those of the class in `mpo_core`, see [below](#inits-gauges-and-options). Not for `mpo`.",
        exclude_if=lambda value: value is None,
    )

    @model_validator(mode="after")
    def _own_sites(self) -> CompressedArm:
        if self.n_sites is not None and "paper" in options(self.factorisation):
            raise ValueError("`n_sites` is not allowed with `factorisation: paper`, which has its own")
        return self


class SizedArm(CompressedArm):
    """Every layer has its size from the study file."""

    refinement: Any = None

    @model_validator(mode="after")
    def _start_for_refinement(self) -> SizedArm:
        if self.start is None and self.refinement is not None:
            raise ValueError("`refinement` has no meaning without `start`: there are no trained weights to fit")
        return self


class MPOArm(SizedArm):
    """Every linear layer is an MPO."""

    family: Literal["mpo"] = Field(description="Kind of layer.")
    chi: Number[PositiveInt] = Field(description="Largest bond dimension.")
    init: Value[Name] | None = Field(
        default=None,
        description="Init of an arm trained from scratch. Default: `variance`. `tt_svd` decomposes a random dense "
        "weight of the paper's scale (std 0.02), `tt_svd_fresh` one of the scale of `variance`.",
    )
    refinement: Value[Literal["tt_svd", "whitened", "als"]] | None = Field(
        default=None,
        description="How trained weights become cores. Default: `tt_svd`. The others fit the layer's outputs "
        "over protocol.calibration_batches: `whitened` site by site, `als` all cores as well as it can (by L-BFGS; the "
        "name is older).",
    )
    forward: Value[Literal["reconstruct", "chain"]] | None = Field(
        default=None,
        description="`reconstruct` forms W in every forward pass; `chain` contracts the input with the cores. Both "
        "give the same outputs up to rounding. Default: `reconstruct`.",
    )
    bonds: Bonds | None = Field(
        default=None,
        description="How the bonds change during the training, see [below](#bonds-that-change). Default: they stay.",
        exclude_if=lambda value: value is None,
    )
    sweep: Sweep | None = Field(
        default=None,
        description="One core of each layer is trained at a time, see [below](#sweeps). Default: all cores at once.",
        exclude_if=lambda value: value is None,
    )

    @model_validator(mode="after")
    def _consistent(self) -> MPOArm:
        _refuse_init_beside_start(self)
        for key in ("bonds", "sweep"):
            if getattr(self, key) is not None and "fixed" in options(self.gauge):
                raise ValueError(f"`{key}` needs `gauge: free`: it changes the gauge of the cores")
        if self.sweep is not None and self.decay is not None:
            raise ValueError("`decay` is not allowed beside `sweep`: the core that is trained has all of W's decay")
        if self.bonds is not None and self.sweep is not None:
            raise ValueError("`bonds` and `sweep` are not allowed together: both change the gauge of the cores")
        return self


class ControlArm(SizedArm):
    """Every linear layer is of another kind, with at most as many parameters as an MPO in its place."""

    family: Name = Field(
        description="Kind of layer: the name of any kind that `mpo_core` knows, except `mpo`. docs/glossary.md "
        "describes them, and docs/extending.md says how to add one."
    )
    as_chi: FixedOrListed[PositiveInt] = Field(
        description="χ of that MPO, which is counted in the free gauge. A layer stays dense if the MPO would not be "
        "smaller."
    )
    init: Value[Name] | None = Field(
        default=None,
        description="Init of an arm trained from scratch. Default: `variance`. `svd_fresh` (low_rank only) is the "
        "truncated SVD of a random dense weight of that scale.",
    )
    refinement: Value[Literal["weights", "outputs"]] | None = Field(
        default=None,
        description="Whether compression keeps the trained `weights` or the layers' `outputs` over "
        "protocol.calibration_batches. Default: `weights`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ControlArm:
        _refuse_init_beside_start(self)
        return self


class KeptArm(CompressedArm):
    """Linear layers of trained weights are replaced by smaller ones, which together keep a share of their parameters.

    The layers' own sizes follow from the weights and the calibration text, so they may differ from seed to seed.
    """

    family: Name = Field(
        description="Kind of layer: the name of any kind that `mpo_core` knows; or `auto`, for which each matrix takes "
        "the kind with the least error."
    )
    keep: Number[Share] = Field(
        description="Share of the parameters of all layers that are replaced, with masks and indices counted."
    )
    factorisation: Value[Literal["paper", "balanced", "min_params", "auto"]] | None = Field(  # type: ignore[assignment]
        default=None,
        description="How an MPO splits the layer's sizes over its sites. `auto` tries every split of the longer side "
        "over two sites; each matrix takes the one with the least error. Default: `balanced`. Only for `mpo`.",
    )
    metric: Value[Literal["weights", "outputs", "loss"]] = Field(
        default="loss",
        description="Which error compression keeps small: that of the `weights`, that of the layers' `outputs`, or the "
        "predicted rise of the `loss`. The last two are measured over protocol.calibration_batches.",
    )
    spread: Value[Literal["loss", "errors", "even"]] | None = Field(
        default=None,
        description="How parameters are spread over the layers: by the predicted `loss`, by the squared relative "
        "`errors`, or `even`. Default: `loss` with `metric: loss`, else `errors`.",
    )
    narrow: Value[bool] = Field(
        default=False,
        description="Whether MLPs also lose hidden units, where that costs less predicted loss. Needs `spread: loss`.",
    )
    forward: Value[Literal["reconstruct", "chain"]] | None = Field(
        default=None, description="As in other arms of `mpo`. Only for `mpo`; a layer that `auto` chose is a `chain`."
    )

    @model_validator(mode="after")
    def _consistent(self) -> KeptArm:
        if self.family == "dense":
            raise ValueError("`keep` needs a smaller kind of layer, but the family is dense")
        if self.start is None:
            raise ValueError("`keep` needs `start`: the share of each layer follows from trained weights")
        if self.family != "mpo":
            for key in ("factorisation", "n_sites"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` is for `family: mpo`, but the family is {self.family}")
        if self.forward is not None and self.family != "mpo":
            raise ValueError(f"`forward` is for `family: mpo`, but the family is {self.family}")
        if self.forward is not None and AUTO in options(self.factorisation):
            raise ValueError("`forward` is not allowed with `factorisation: auto`, whose layers are applied as chains")
        if self.n_sites is not None and AUTO in options(self.factorisation):
            raise ValueError("`n_sites` is not allowed with `factorisation: auto`, which has two sites")
        metrics, spreads = options(self.metric), options(self.spread)
        if set(metrics) - {"loss"} and "loss" in spreads:
            raise ValueError(f"`spread: loss` needs `metric: loss`, but metric is {', '.join(metrics)}")
        if True in options(self.narrow) and (set(metrics) - {"loss"} or set(spreads) - {None, "loss"}):
            raise ValueError("`narrow: true` needs `metric: loss` and `spread: loss`")
        by_size = [key for key in RATES if isinstance(getattr(self, key), dict)]
        if by_size:
            raise ValueError(f"`{by_size[0]}` by size is not allowed beside `keep`")
        return self


def _refuse_init_beside_start(arm: MPOArm | ControlArm) -> None:
    if arm.start is not None and arm.init is not None:
        raise ValueError("`init` has no meaning beside `start`: the layers come from trained weights")


def _class_of(arm: Any) -> str | None:
    if not isinstance(arm, dict | _Arm):
        return "dense"  # whose check says that it is no mapping
    if isinstance(arm, KeptArm) or (isinstance(arm, dict) and "keep" in arm):
        return "kept"
    family = arm.get("family") if isinstance(arm, dict) else getattr(arm, "family", None)
    return family if family in ("dense", "mpo") else None if family is None else "control"


ARMS: dict[str, type[_Arm]] = {"dense": DenseArm, "mpo": MPOArm, "control": ControlArm, "kept": KeptArm}
Arm = Annotated[
    Annotated[DenseArm, Tag("dense")]
    | Annotated[MPOArm, Tag("mpo")]
    | Annotated[ControlArm, Tag("control")]
    | Annotated[KeptArm, Tag("kept")],
    Discriminator(_class_of),
]
RATES = ("learning_rate", "embedding_learning_rate")
PROTOCOL_VALUES = (*RATES, "optimiser")
"""Fields that may be listed or searched and are part of a trial's protocol."""
BY_SIZE_FIELDS = (*RATES, "d_ff")
VALUE_FIELDS = (
    *(*RATES, "d_model", "chi", "as_chi", "n_sites", "factorisation", "init", "refinement", "lr_rule"),
    *("decay", "gauge", "forward", "optimiser", "keep", "metric", "spread", "narrow"),
)
SIZE_FIELDS = ("d_model", "chi", "as_chi")
