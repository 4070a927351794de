"""The kinds of layer that arms name, checked against those that `mpo_core` knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from study.errors import StudyError, did_you_mean
from study.spec.arms import AUTO, ControlArm, DenseArm, KeptArm, MPOArm
from study.spec.config import StudyConfig
from study.spec.values import options

DECOMPOSED = "tt_svd"
"""An init of MPO arms beside those of the layer: the decomposition of a dense weight of the paper's scale."""


def check_kinds(config: StudyConfig) -> None:
    """Raise a StudyError, a line for each defect, if an arm names an unknown kind of layer or an unknown init."""
    if problems := list(_problems(config)):
        raise StudyError("\n".join(problems))


def why_no_family(family: str) -> str | None:
    """Why no arm can have this family, in one line; None if an arm can."""
    from mpo_core import kinds  # imports torch, which is slow: only `run` and `plan` need it

    try:
        known = ["dense", *kinds()]
    except ValueError as error:
        raise StudyError(str(error)) from None
    return None if family in known else f"{_must_be(known, family)}; another kind needs the package that defines it"


def inits(family: str) -> tuple[str, ...]:
    """The inits of an arm from scratch of that family."""
    from mpo_core import kind_called

    own = kind_called(family).inits
    return (*own, DECOMPOSED) if family == "mpo" else own


def own_options(family: str) -> list[str]:
    """The keys that `options` of an arm of that family may have; an MPO has keys of the arm instead."""
    from mpo_core import kind_called

    return [] if family in ("mpo", AUTO) else sorted(kind_called(family).option_names() - {"gauge", "max_steps"})


def families_with_gauge() -> list[str]:
    """The families whose kind of layer has the option `gauge`."""
    from mpo_core import kinds

    return [name for name, kind in kinds().items() if "gauge" in kind.option_names()]


def _problems(config: StudyConfig) -> Iterator[str]:
    for arm in config.arms:
        is_auto = isinstance(arm, KeptArm) and arm.family == AUTO
        problem = None if is_auto else why_no_family(arm.family)
        if problem is not None:
            yield f"arms[{arm.name}].family: {problem}"
        elif not isinstance(arm, DenseArm):
            yield from _problems_of_options(arm)


def _problems_of_options(arm: MPOArm | ControlArm | KeptArm) -> Iterator[str]:
    if isinstance(arm, MPOArm | ControlArm) and arm.init is not None:
        allowed = inits(arm.family)
        for init in options(arm.init):
            if init not in allowed:
                yield f"arms[{arm.name}].init: {_must_be(allowed, init)}"
    if arm.options is not None:
        yield from _problems_of_own_options(arm.name, arm.family, arm.options)
    if arm.gauge is not None and arm.family not in (families := [*families_with_gauge(), AUTO]):
        yield f"arms[{arm.name}].gauge: family {arm.family} does not have it; families that do: {', '.join(families)}"


def _problems_of_own_options(arm: str, family: str, given: Mapping[str, Any]) -> Iterator[str]:
    known = own_options(family)
    for key in given:
        if key not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no `options`"
            yield f"arms[{arm}].options: family {family} does not have {json.dumps(key)}; {has}"


def _must_be(allowed: Sequence[str], given: str) -> str:
    *first, last = map(repr, allowed)
    shown = f"{', '.join(first)} or {last}" if first else last
    return f"must be {shown}, but got {json.dumps(given)}{did_you_mean(given, allowed)}"
