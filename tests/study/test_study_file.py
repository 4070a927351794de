"""Study files: what they may hold, and the one line that each defect gives."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import language_models
import pytest
import yaml

import study
from mpo_core import kinds
from study.errors import StudyError
from study.spec.cache import CACHE_VARIABLE
from study.spec.config import StudyConfig
from study.spec.study_file import dump_config, load_config, parse_yaml, validate
from study.spec.values import Choices, Range

BAD = [part.split("\n", 1) for part in (Path(__file__).parent / "bad_study_files.txt").read_text().split("=== ")[1:]]
CONFIGS = sorted((Path(study.__file__).parent / "configs").glob("*.yaml"))

ARMS = """\
arms:
  - name: dense
    family: dense
  - name: mpo
    family: mpo
    chi: [4, 8]
"""


def write(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Defects --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in BAD])
def test_bad_file_gives_the_lines_in_its_first_comment(tmp_path, text):
    path = write(tmp_path, text)
    *families, last = map(repr, ["dense", *kinds()])  # other tests define kinds of their own
    said = text.replace("{FAMILIES}", f"{', '.join(families)} or {last}")
    expected = list(takewhile(lambda line: line.startswith("# FILE"), said.splitlines()))
    with pytest.raises(StudyError) as caught:
        load_config(path)
    assert str(caught.value).splitlines() == [line.replace("# FILE", str(path), 1) for line in expected] != []


def test_bad_files_are_there():
    assert len(BAD) > 100


@pytest.mark.parametrize("text", ["[" * 5000, "seeds: " + "9" * 5000, "name: &a [*a]", "\0", "? {a: 1}\n: 2"])
def test_hostile_yaml_gives_one_line(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(StudyError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:")
    assert len(str(caught.value).splitlines()) == 1


BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 18))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (BOMB, "more than 200,000 keys and values, counting each use of an alias"),
        (MERGED, "more than 200,000 keys and values, counting each use of an alias"),
        (CHAIN, "nested more than 20 levels deep"),
        ("{a: " * 1000, "nested more than 20 levels deep"),
        ("seeds: " + "9" * 4301, "a number has more than 4,300 digits"),
        ("a" * 4_000_001, "at most 4,000,000 bytes"),
        ('{8: 1, "8": 2}', "key '8' is given twice"),
    ],
    ids=["aliases", "merged aliases", "chain of aliases", "brackets", "digits", "bytes", "key as number and text"],
)
def test_yaml_beyond_a_limit_is_refused_in_one_line(tmp_path, text, limit):
    path = write(tmp_path, text)
    with pytest.raises(StudyError, match=limit) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:")
    assert len(str(caught.value)) < 300
    if text != "a" * 4_000_001:
        with pytest.raises(StudyError, match=limit):
            load_config(write(tmp_path, f"name: s\n{ARMS}"), [f"description={text}"])


@pytest.mark.parametrize("override", ["a." * 1000 + "b=1", f"arms.{'9' * 5000}.chi=8", "arms.٣.chi=8"])
def test_hostile_override_gives_one_line(tmp_path, override):
    with pytest.raises(StudyError, match=r"^--set ") as caught:
        load_config(write(tmp_path, f"name: s\n{ARMS}"), [override])
    assert "\n" not in str(caught.value)


def test_device_as_a_study_file_is_not_read_to_its_end():
    with pytest.raises(StudyError, match=r"^/dev/zero: a study file has at most 4,000,000 bytes"):
        load_config("/dev/zero")


def test_defects_are_shown_up_to_a_number(tmp_path):
    keys = "".join(f"key{number}: 1\n" for number in range(25))
    with pytest.raises(StudyError) as caught:
        load_config(write(tmp_path, f"name: s\n{ARMS}{keys}"))
    assert len(str(caught.value).splitlines()) == 21
    assert str(caught.value).endswith("study.yaml: and 5 more")


def test_folder_as_a_study_file_names_the_one_in_it(tmp_path):
    with pytest.raises(StudyError, match=f"^{tmp_path}: is a folder; give a study file$"):
        load_config(tmp_path)
    path = write(tmp_path, f"name: s\n{ARMS}")
    with pytest.raises(StudyError, match=f"^{tmp_path}: is a folder; .* mpo-study run {path} --dir {tmp_path}"):
        load_config(tmp_path)


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_file_may_have_a_byte_order_mark_and_line_ends_of_windows(tmp_path, start):
    path = tmp_path / "study.yaml"
    path.write_bytes(f"{start}name: s\ndescription: |\n  a\n  b\n{ARMS}".replace("\n", "\r\n").encode())
    config = load_config(path)
    assert config == load_config(write(tmp_path, f"name: s\ndescription: |\n  a\n  b\n{ARMS}"))
    assert config.description == "a\nb\n"


def test_missing_file_gives_one_line(tmp_path):
    with pytest.raises(StudyError, match=r"absent\.yaml: cannot read the study file: No such file or directory$"):
        load_config(tmp_path / "absent.yaml")


def test_file_that_is_not_utf8_gives_one_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes("name: Größe".encode("latin-1"))
    with pytest.raises(StudyError, match=r"cannot read the study file: not UTF-8 text$"):
        load_config(path)


# What YAML means ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2e+3", -2000.0),
        ("1.5", 1.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("6.02e23", 6.02e23),
        ("0", 0),
        ("-7", -7),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("~", None),
        (".inf", float("inf")),
        ("2026-01-31", "2026-01-31"),
        ("12:30:00", "12:30:00"),
        ("1:30", "1:30"),
        ("0100", "0100"),
        ("0x10", "0x10"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("-", [None]),
        ("-1e", "-1e"),
        ("1.2.3", "1.2.3"),
        ("χ", "χ"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_learning_rate_may_be_written_without_a_point(tmp_path):
    config = load_config(write(tmp_path, f"name: s\nprotocol: {{learning_rate: 1e-3}}\n{ARMS}"))
    assert config.protocol.learning_rate == 0.001


def test_date_as_name_stays_a_string(tmp_path):
    assert load_config(write(tmp_path, f"name: 2026-01-31\n{ARMS}")).name == "2026-01-31"


def test_merge_key_copies_an_arm(tmp_path):
    text = "name: s\narms:\n  - &d {name: d, family: dense, steps: 300}\n  - {<<: *d, name: e, warmup_steps: 20}\n"
    arm = load_config(write(tmp_path, text)).arm("e")
    assert (arm.family, arm.steps, arm.warmup_steps) == ("dense", 300, 20)


# What a study file gives ----------------------------------------------------------------------------------------------


def test_defaults_are_the_papers_protocol(tmp_path):
    config = load_config(write(tmp_path, f"name: s\n{ARMS}"))
    model, protocol = config.model, config.protocol
    assert (model.d_model, model.n_heads, model.n_layers, model.context, model.d_ff) == (128, 4, 4, 256, None)
    assert (protocol.steps, protocol.warmup_steps, protocol.batch_size) == (2000, 100, 32)
    assert (protocol.learning_rate, protocol.betas, protocol.weight_decay) == (3e-4, (0.9, 0.95), 0.1)
    assert (protocol.grad_clip, protocol.eval_every) == (1.0, 100)
    assert (protocol.sampled_eval_batches, protocol.sampled_eval_batch_size) == (20, 8)
    assert config.corpus.validation_fraction == 0.1


def test_values_become_listed_choices_or_ranges(small_study):
    arms = [
        {"name": "a", "family": "mpo", "chi": {"choices": [4, 8]}, "learning_rate": {"low": 1e-4, "high": 1}},
        {"name": "b", "family": "mpo", "chi": [4, 8], "init": "paper"},
    ]
    config = validate(small_study(arms=arms, search={"sampler": "tpe", "trials": 4}), "here")
    searched, listed = config.arms
    assert searched.values() == {"chi": Choices((4, 8)), "learning_rate": Range(1e-4, 1.0), "factorisation": "balanced"}
    assert listed.values() == {"chi": (4, 8), "factorisation": "balanced", "init": "paper"}
    assert searched.is_searched
    assert not listed.is_searched


@pytest.mark.parametrize(("seeds", "expected"), [(3, (0, 1, 2)), ([100, 7], (100, 7))])
def test_seeds_are_a_number_or_a_list(small_study, seeds, expected):
    assert validate(small_study(seeds=seeds), "here").seed_list == expected


def test_many_seeds_are_read_at_once(small_study):
    assert len(validate(small_study(seeds=list(range(50_000))), "here").seed_list) == 50_000


def test_config_cannot_be_changed(small_study):
    config = validate(small_study(), "here")
    with pytest.raises(ValueError, match="frozen"):
        config.protocol.steps = 3


def test_corpus_path_is_relative_to_the_study_file(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    path = write(tmp_path / "studies", f"name: s\ncorpus: {{path: ../text.txt}}\n{ARMS}")
    monkeypatch.chdir("/")
    assert load_config(path).corpus.path == str(tmp_path / "text.txt")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_file_reads_as_the_same_study(tmp_path, monkeypatch, path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))  # with a model in the place of the pretrained one
    language_models.write(language_models.llama(), tmp_path / "smollm2" / "SmolLM2-135M-Instruct")
    config = load_config(path)
    resolved = write(tmp_path, dump_config(config))
    assert load_config(resolved) == config
    assert dump_config(load_config(resolved)) == dump_config(config)


def test_resolved_file_names_every_default(small_study):
    resolved = yaml.safe_load(dump_config(validate(small_study(), "here")))
    # What was left open stays open: d_ff follows d_model, the corpus has no checksum to meet, and
    # nothing is stopped early.
    assert set(resolved) == set(StudyConfig.model_fields) - {"bits"}  # left out at its default, as in older studies
    assert "early_stopping" not in resolved["search"]
    assert resolved["protocol"]["weight_decay"] == 0.1
    assert resolved["search"]["sampler"] == "grid"


def test_names_that_yaml_could_take_for_something_else_survive(tmp_path):
    arms = '[{name: "010", family: dense}, {name: "1e5", family: dense, steps: 500}]'
    config = load_config(write(tmp_path, f'name: "2026"\ndescription: "yes"\narms: {arms}\n'))
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert [again.name, again.description, *(arm.name for arm in again.arms)] == ["2026", "yes", "010", "1e5"]


# Overrides ------------------------------------------------------------------------------------------------------------


def test_overrides_reach_sections_arms_and_lists(tmp_path):
    path = write(tmp_path, f"name: s\n{ARMS}")
    overrides = [
        "protocol.steps=300",
        "protocol.learning_rate=1e-3",
        "name=other",
        "seeds=[4, 5]",
        "arms.mpo.chi=16",
        "arms.0.steps=200",
        "model.n_layers=2",
        "description=a=b",
    ]
    config = load_config(path, overrides)
    assert (config.protocol.steps, config.protocol.learning_rate, config.name) == (300, 1e-3, "other")
    assert (config.seed_list, config.model.n_layers, config.description) == ((4, 5), 2, "a=b")
    assert (config.arm("mpo").values()["chi"], config.arm("dense").steps) == (16, 200)


def test_override_reaches_one_item_of_a_list(tmp_path):
    config = load_config(write(tmp_path, f"name: s\n{ARMS}"), ["arms.mpo.chi.1=32"])
    assert config.arm("mpo").values()["chi"] == (4, 32)


def test_override_reaches_one_arm_of_those_that_share_an_alias(tmp_path):
    text = (
        "name: s\narms:\n  - {name: a, family: mpo, chi: &n [4, 8]}\n  - {name: b, family: mpo, chi: *n, init: paper}\n"
    )
    config = load_config(write(tmp_path, text), ["arms.a.chi.1=16"])
    assert [arm.values()["chi"] for arm in config.arms] == [(4, 16), (4, 8)]


def test_later_override_wins(tmp_path):
    assert load_config(write(tmp_path, f"name: s\n{ARMS}"), ["seeds=1", "seeds=5"]).seeds == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocol.steps", "--set protocol.steps: must have the form key=value, for example protocol.steps=100"),
        ("=3", "--set =3: must have the form key=value, for example protocol.steps=100"),
        ("arms.cnn.chi=8", "--set arms.cnn.chi=8: arms.cnn does not exist; allowed: dense, mpo"),
        ("arms.mpos.chi=8", "--set arms.mpos.chi=8: arms.mpos does not exist (did you mean mpo?); allowed: dense, mpo"),
        ("arms.7.chi=8", "--set arms.7.chi=8: arms.7 does not exist; allowed: dense, mpo"),
        ("arms.mpo.chi.2=8", "--set arms.mpo.chi.2=8: arms.mpo.chi.2 does not exist; allowed: 0, 1"),
        ("name.first=x", "--set name.first=x: name is a single value, so it has no keys"),
        ("seeds=[1", "--set seeds=[1:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seeds={a: 1, a: 2}", "--set seeds={a: 1, a: 2}:1: not valid YAML: key 'a' is given twice"),
    ],
)
def test_bad_override_is_named(tmp_path, override, message):
    with pytest.raises(StudyError) as caught:
        load_config(write(tmp_path, f"name: s\n{ARMS}"), [override])
    assert str(caught.value) == message


def test_override_is_checked_like_the_file(tmp_path):
    path = write(tmp_path, f"name: s\n{ARMS}")
    with pytest.raises(StudyError) as caught:
        load_config(path, ["protocol.step=3"])
    assert str(caught.value).startswith(f"{path}: protocol.step: unknown key (did you mean steps?); allowed: steps, ")
