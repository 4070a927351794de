"""Strict YAML: read strictly and within limits, and written so that it reads back as the same values."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from study.errors import StudyError

MAX_BYTES, MAX_NODES, MAX_DEPTH = 4_000_000, 200_000, 20
"""Limits of one document: bytes of text; keys and values, counting an alias's at each use; nesting levels."""

_TAG = "tag:yaml.org,2002:"


class _StrictLoader(yaml.SafeLoader):
    """Loader with limits, in which a repeated key is an error, `3e-4` is a number, and `010` and `1:30` are not."""

    _n_nodes = _depth = _deepest = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._extents: dict[int, tuple[int, int]] = {}  # number of nodes and levels in each complete node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._extents:
                raise ComposerError(None, None, "an alias contains itself", mark)
            n_nodes, n_levels = self._extents[id(node)]
            self._count(n_nodes, self._depth + n_levels, mark)
            return node
        n_before, deepest_before = self._n_nodes, self._deepest
        self._depth += 1
        self._deepest = self._depth
        self._count(1, self._depth, mark)
        node = super().compose_node(parent, index)
        self._extents[id(node)] = (self._n_nodes - n_before, self._deepest - self._depth + 1)
        self._deepest = max(self._deepest, deepest_before)
        self._depth -= 1
        return node

    def _count(self, n_nodes: int, depth: int, mark: yaml.Mark) -> None:
        self._n_nodes += n_nodes
        self._deepest = max(self._deepest, depth)
        problem = None
        if depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
        elif self._n_nodes > MAX_NODES:
            problem = f"more than {MAX_NODES:,} keys and values, counting each use of an alias"
        if problem is not None:
            raise ComposerError(None, None, problem, mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a single value", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:  # `8` and `"8"` are the same key
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


_KINDS = tuple(f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
_StrictLoader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _KINDS
}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}bool", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in {
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}.items():
    _StrictLoader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^({_pattern})$"), list("-+.0123456789"))


class StrictDumper(yaml.SafeDumper):
    """Quotes strings that `_StrictLoader` would otherwise read as numbers."""


StrictDumper.ignore_aliases = lambda self, data: True  # a reader should not meet &id001
StrictDumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


class SectionDumper(StrictDumper):
    """Indents lists as the study files do."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML strictly, within `MAX_BYTES`, `MAX_NODES` and `MAX_DEPTH`.

    Args:
        where: names the source in errors.

    Raises:
        StudyError: the text is not valid YAML, or exceeds a limit.
    """
    if len(text) > MAX_BYTES:
        raise StudyError(f"{where}: has more than the allowed {MAX_BYTES:,} bytes")
    try:
        return _unshared(yaml.load(text, Loader=_StrictLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StudyError(f"{where}{position}: not valid YAML: {problem[:200]}") from None
    except ValueError:
        raise StudyError(f"{where}: not valid YAML: a number has more than 4,300 digits") from None


def _unshared(value: Any) -> Any:
    """A deep copy in which each alias is a separate value, so that changing one does not change another."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
