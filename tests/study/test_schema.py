"""The study file's document and JSON schema: what the command writes is what is there, and it holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml

import study
from analysis.report.places import fill_place
from study.spec.config import StudyConfig
from study.spec.schema import DOCUMENT, SCHEMA, json_schema, keys, write
from study.spec.study_file import parse_yaml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((Path(study.__file__).parent / "configs").glob("*.yaml"))
SCHEMA_CONTENT = json.loads(json_schema())


@pytest.mark.parametrize("name", [SCHEMA, DOCUMENT])
def test_committed_file_is_what_the_command_writes(tmp_path, name):
    shutil.copy(ROOT / "docs" / DOCUMENT, tmp_path)
    fill_place(tmp_path / DOCUMENT, "keys", "nothing")
    write(tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")


def properties(node):
    """Every key of a study file that the schema knows, with what it says of it."""
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict):
            yield from node["properties"].items()
        for value in node.values():
            yield from properties(value)
    elif isinstance(node, list):
        for value in node:
            yield from properties(value)


def test_every_key_is_described():
    undescribed = {
        name for name, said in properties(SCHEMA_CONTENT) if "description" not in said and "$ref" not in said
    }
    assert undescribed <= {"choices", "low", "high"}
    text = keys()
    for name in {name for name, _ in properties(SCHEMA_CONTENT)} - {"choices", "low", "high", "log"}:
        assert re.search(rf"\b{name}(`|\.|\[\])", text)
    assert "|  |" not in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_schema_takes_the_studies_that_come_with_the_program(path):
    jsonschema.validate(parse_yaml(path.read_text(encoding="utf-8"), "here"), SCHEMA_CONTENT)


def test_schema_takes_the_resolved_form_of_a_search(small_study):
    arm = {
        "name": "a",
        "family": "mpo",
        "chi": {"low": 2, "high": 8},
        "init": {"choices": ["paper"]},
        "forward": "chain",
    }
    content = small_study(arms=[arm], search={"sampler": "gp", "trials": 20, "max_params": 0.5})
    jsonschema.validate(content, SCHEMA_CONTENT)
    StudyConfig.model_validate_json(json.dumps(content))


@pytest.mark.parametrize(
    "text",
    [
        "name: bad",
        "{name: bad, arms: []}",
        "{name: bad, arms: [{name: a, family: dense}], protocol: {step: 3}}",
        "{name: bad, arms: [{name: a, family: cnn}]}",
        "{name: bad, arms: [{name: a, family: mpo}]}",
        "{name: bad, arms: [{name: a, family: mpo, chi: 0}]}",
        "{name: bad, arms: [{name: a, family: mpo, chi: {low: 2}}]}",
        "{name: bad, arms: [{name: a, family: dense}], search: {sampler: cma}}",
        "{name: bad, arms: [{name: a, family: dense}], search: {early_stopping: {}}}",
    ],
)
def test_schema_refuses_what_the_program_refuses(text):
    content = yaml.safe_load(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA_CONTENT)
    with pytest.raises(ValueError, match="validation error"):
        StudyConfig.model_validate_json(json.dumps(content))
