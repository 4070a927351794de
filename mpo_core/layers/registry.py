"""The kinds of layer that are defined, by name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from mpo_core import layers
from mpo_core.layers.structured import StructuredLinear

ENTRY_POINTS = "mpo_core.layers"
"""Group of entry points under which another package names its modules that define kinds of layer."""


def kinds() -> dict[str, type[StructuredLinear]]:
    """Every kind of layer by its name: those of `mpo_core.layers`, of other packages' entry points, and of the program.

    If two kinds have one name, the one that was defined first. A class with abstract methods is not a kind.
    """
    named: dict[str, type[StructuredLinear]] = {}
    for kind in _defined():
        named.setdefault(kind.kind, kind)
    return named


def kind_called(name: str) -> type[StructuredLinear]:
    """The kind of layer of that name.

    Raises:
        ValueError: there is none, or more than one; or a module of an entry point cannot be imported.
    """
    found = [kind for kind in _defined() if kind.kind == name]
    if not found:
        for unfinished in _subclasses(StructuredLinear):
            lacking = ", ".join(_abstract_methods(unfinished))
            if unfinished.kind == name and lacking:
                raise ValueError(f"{unfinished.__qualname__} is not a kind of layer yet: it does not define {lacking}")
        known = ", ".join(kinds())
        raise ValueError(
            f"no kind of layer is called {name!r}, only {known}; for another kind, import its module first"
        )
    if len(found) > 1:
        places = ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in found))
        raise ValueError(f"more than one kind of layer is called {name!r}: {places}")
    return found[0]


def _defined() -> list[type[StructuredLinear]]:
    _import_all()
    # A class that is defined again, as in a notebook, replaces the first one.
    last = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(StructuredLinear)}
    return [kind for kind in last.values() if not _abstract_methods(kind)]


@cache
def _import_all() -> None:
    for module in iter_modules(layers.__path__):
        import_module(f"{layers.__name__}.{module.name}")
    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()
        except Exception as error:  # of another package's module, whatever it raises
            package = entry_point.dist.name if entry_point.dist is not None else "a package"
            raise ValueError(f"{entry_point.value} of {package} cannot be imported: {error}") from error


def _subclasses(kind: type[StructuredLinear]) -> Iterator[type[StructuredLinear]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _abstract_methods(kind: type[StructuredLinear]) -> list[str]:
    """Names of the methods that the class still has to define; Python does not compute this for an nn.Module."""
    return [name for name in vars(StructuredLinear) if getattr(getattr(kind, name), "__isabstractmethod__", False)]
