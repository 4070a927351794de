"""Reading a study file: strict YAML, overrides, and one line for each defect."""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from study.errors import StudyError, did_you_mean
from study.spec.cache import CACHE
from study.spec.config import StudyConfig
from study.spec.corpus import MODEL_TOKENIZER, Corpus
from study.spec.defects import defects
from study.spec.kinds import check_kinds
from study.spec.models import HUB, HuggingFaceModel, with_checksum
from study.spec.search_space import check_trials
from study.spec.strict_yaml import MAX_BYTES, MAX_DEPTH, SectionDumper, StrictDumper, parse_yaml

MOST_SHOWN = 20
"""Number of a file's defects that are listed; the others are only counted."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """`read_config` of a study that is to be trained: the program must know the kinds of layer and their inits.

    Raises:
        StudyError: as `read_config`; an arm names an unknown kind of layer or init.
    """
    config = read_config(path, overrides)
    try:
        check_kinds(config)
    except StudyError as error:
        raise StudyError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None
    try:
        return config.model_copy(update={"model": with_checksum(config.model)})
    except ValueError as error:
        raise StudyError(f"{path}: model: {error}") from None


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file and apply `key=value` overrides (dotted keys; an arm by its name: `arms.mpo.chi=8`).

    Raises:
        StudyError: the file cannot be read or is not a valid study; the message names file, key and what is allowed.
    """
    path = Path(path)
    data = parse_yaml(_read(path), str(path))
    if not isinstance(data, dict):
        raise StudyError(f"{path}: a study file is a mapping of keys to values; it begins with `name:`")
    for override in overrides:
        _apply_override(data, override)
    config = validate(data, str(path))
    try:
        check_trials(config)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    model = config.model
    corpus = config.corpus
    if isinstance(model, HuggingFaceModel) and model.pretrained is not None:
        if not model.pretrained.startswith((CACHE, HUB)):  # these mean the same on every machine
            model = model.model_copy(update={"pretrained": _absolute("model.pretrained", model.pretrained, path)})
        if corpus.tokenizer == MODEL_TOKENIZER:
            try:
                is_cached = str(model.pretrained).startswith(CACHE)
                corpus = corpus.model_copy(update={"tokenizer": model.pretrained if is_cached else model.folder})
            except ValueError as error:
                raise StudyError(f"{path}: model.pretrained: {error}") from None
    return config.model_copy(update={"model": model, "corpus": _with_absolute_paths(corpus, path)})


def _absolute(key: str, path: str, file: Path) -> str:
    """A path in a study file, which does not depend on where the file is."""
    if path.startswith(CACHE) or Path(path).is_absolute():
        return path
    try:
        return os.path.realpath(file.parent / path)  # `resolve` raises on circular links
    except ValueError as error:  # a null character
        raise StudyError(f"{file}: {key}: {error}") from None


def _with_absolute_paths(corpus: Corpus, file: Path) -> Corpus:
    """The corpus of a study file, with paths that do not depend on where the file is."""

    def absolute(key: str, path: str) -> str:
        return _absolute(f"corpus.{key}", path, file)

    changes: dict[str, Any] = {}
    if corpus.path is not None:
        paths = tuple(absolute("path", path) for path in corpus.given_paths)
        if len(set(paths)) < len(paths):
            raise StudyError(f"{file}: corpus.path: names {max(paths, key=paths.count)} more than once")
        changes["path"] = paths[0] if isinstance(corpus.path, str) else paths
    if corpus.tokenizer_folder is not None:
        changes["tokenizer"] = absolute("tokenizer", corpus.tokenizer)
    return corpus.model_copy(update=changes)


def _read(path: Path) -> str:
    if path.is_dir():
        own = path / "study.yaml"
        there = f"its study file is {own} (to continue it: mpo-study run {own} --dir {path})"
        raise StudyError(f"{path}: is a folder; {there if own.is_file() else 'give a study file'}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device may have no end
        if len(data) > MAX_BYTES:
            raise StudyError(f"{path}: a study file has at most {MAX_BYTES:,} bytes, but this one has more")
        return data.removeprefix(BOM_UTF8).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StudyError(f"{path}: cannot read the study file: {reason}") from None


def validate(data: Any, where: str) -> StudyConfig:
    """Build the configuration.

    Raises:
        StudyError: a line for each defect, at most `MOST_SHOWN`.
    """
    try:
        # Validate as JSON: there strict mode still converts an array to a tuple.
        return StudyConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        lines = [f"{where}: {line}" for line in defects(error, data)]
        more = [f"{where}: and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
        raise StudyError("\n".join([*lines[:MOST_SHOWN], *more])) from None


def dump_config(config: StudyConfig) -> str:
    """The resolved study file as YAML: every value in effect, including defaults."""
    data = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(data, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def dump_sections(data: Mapping[str, Any]) -> str:
    """The content of a study file as YAML for people to read.

    A blank line separates sections and arms; the innermost lists and mappings are on one line.
    """
    text = yaml.dump(
        dict(data), Dumper=SectionDumper, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110
    )
    return re.sub(r"\n(?=(?!description)\S|  - )", "\n\n", text).replace("\narms:\n\n", "\narms:\n")


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise StudyError(f"--set {override}: must have the form key=value, for example protocol.steps=100")
    keys, node = dotted.split("."), data
    if len(keys) > MAX_DEPTH:
        raise StudyError(f"--set {dotted[:60]}...: a key has at most {MAX_DEPTH} parts")
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key, ".".join(keys[: depth + 1]), override)
    value = parse_yaml(text, f"--set {override}")
    if isinstance(node, list):
        node[_index(node, keys[-1], dotted, override)] = value
    else:
        node[keys[-1]] = value


def _child(node: Any, key: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, path, override)]
    child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise StudyError(f"--set {override}: {path} is a single value, so it has no keys")
    return child


def _index(items: list[Any], key: str, path: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    places = [str(place) for place in range(len(items))]
    if key in places:
        return int(key)
    known = [str(name) for name in names if name is not None] or places
    raise StudyError(f"--set {override}: {path} does not exist{did_you_mean(key, known)}; allowed: {', '.join(known)}")
