"""mpo-compress: what it writes, says and refuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import language_models
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import mpo_core
from mpo_core.commands import compress as command
from mpo_core.commands.arguments import parser
from mpo_core.commands.texts import read_documents, split

ROOT = Path(__file__).parents[2]
FEW = ("--tokens", "640", "--evaluation-tokens", "200")
TEXTS = [f"{i}.txt" for i in range(7)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and seven documents."""
    folder = tmp_path_factory.mktemp("place")
    language_models.write(language_models.llama(), folder / "llama")
    language_models.write(language_models.gpt2(), folder / "gpt2")
    for i, name in enumerate(TEXTS):
        (folder / name).write_text(language_models.text(150, seed=i), encoding="utf-8")
    return folder


@pytest.fixture
def run(place, tmp_path, monkeypatch, capsys):
    """Runs the command in an own folder that has the models and the text: exit status, stdout, stderr."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run_command(*options, model="llama", out="small", keep="0.6", text=TEXTS, few=FEW):
        capsys.readouterr()
        try:
            status = command.main([model, out, "--keep", keep, "--text", *text, *few, *options])
        except SystemExit as ended:  # of argparse
            status = ended.code
        return (status, *capsys.readouterr())

    return run_command


def cut(**options):
    """The split that the command makes."""
    tokenizer = language_models.tokenizer()
    sizes = {"calibration_tokens": 640, "evaluation_tokens": 200, "length": language_models.CONTEXT, "seed": 0}
    sizes |= options
    documents = read_documents([Path(name) for name in TEXTS])
    return split(documents, lambda text: tokenizer(text).input_ids, **sizes, between=2)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def numbers(line, out):
    """Those of a line of the output."""
    found = next(each for each in out.splitlines() if each.startswith(line))
    return [float(each.replace(",", "")) for each in re.findall(r"[\d,]*\d(?:\.\d+)?", found.removeprefix(line))]


# What it writes and says ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the predicted loss")
@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("llama", "low_rank", {"gauge": "fixed", "narrow": True}),
        ("gpt2", "low_rank", {"gauge": "fixed"}),
        ("llama", "auto", {"gauge": "fixed", "narrow": True}),
        ("gpt2", "pruned", {}),
    ],
)
def test_it_does_what_the_functions_do(run, family, kind, options):
    narrow = () if "narrow" in options or kind == "pruned" else ("--no-narrow",)
    status, out, _ = run(*(() if kind == "low_rank" else ("--layer", kind)), *narrow, model=family)
    assert status == 0
    model, text = getattr(language_models, family)(), cut()
    batches = [ids[None] for ids in text.calibration]
    statistics = mpo_core.collect_statistics(model, batches, loss=mpo_core.next_token_losses)
    small, report = mpo_core.compress(model, keep=0.6, layer=kind, statistics=statistics, **options)
    loaded = mpo_core.load("small")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(small))

    before, after = (mpo_core.perplexity(one, text.evaluation, window=64) for one in (model, small))
    expected = [before.value, before.standard_error, after.value, after.standard_error]
    assert numbers("perplexity", out) == pytest.approx(expected, abs=0.02)
    difference = mpo_core.paired_difference(after, before)
    assert numbers("loss, nats per token", out)[2:] == pytest.approx([abs(difference[0]), difference[1]], abs=2e-3)
    rows = [row for row in report.rows if row.name != "lm_head"]
    assert numbers("parameters of ", out)[:3] == [
        len(rows),
        sum(row.n_params_before for row in rows),
        sum(row.n_params_after for row in rows),
    ]
    assert numbers("parameters of the model", out)[:2] == [mpo_core.n_params(model), mpo_core.n_params(loaded)]
    fitted, held_out = (math.fsum(getattr(row, f"{which}_loss") for row in rows) for which in ("predicted", "held_out"))
    said = re.search(r"loss: (\S+) nats on the text that layers are fitted to, (\S+) on", " ".join(out.split()))
    assert [float(each) for each in said.groups()] == pytest.approx([fitted, held_out], abs=2e-3)
    assert Path("small/report.txt").read_text(encoding="utf-8").startswith(out.rstrip("\n"))


@pytest.mark.slow
def test_a_stranger_runs_the_entry_point_and_the_lines_it_prints(run):
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mpo-compress"].split(
        ":"
    )
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    arguments = ["gpt2", "small", "--keep", "0.7", "--text", *TEXTS, *FEW]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    lines = ended.stderr.splitlines()
    assert lines[0] == "loading gpt2"
    assert [line.split(":")[0] for line in lines[2:]] == [
        "text",
        "perplexity before",
        "statistics",
        "hidden units",
        "sizes",
        "fits",
        "perplexity after",
    ]
    assert max(map(len, (ended.stdout + ended.stderr).splitlines())) <= 80
    script = "\n".join(
        [
            *(line.strip() for line in ended.stdout.splitlines()[-2:]),
            "inputs = tokenizer('w1 w2 w3', return_tensors='pt')",
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]))",
        ]
    )
    generated = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert generated.stdout.startswith("w1 w2 w3 ")


def test_the_head_stays_dense_unless_it_is_included(run):
    language_models.write(language_models.llama(tie=False), "untied")
    assert run(model="untied")[0] == 0
    assert isinstance(mpo_core.load("small").lm_head, torch.nn.Linear)
    assert (
        run("--include", "lm_head", "*down_proj", "--exclude", "model.layers.0.*", model="untied", out="head")[0] == 0
    )
    rows = [line.split()[0] for line in Path("head/report.txt").read_text().splitlines() if "gauge=fixed" in line]
    assert rows == ["model.layers.1.mlp.down_proj", "lm_head"]


def test_metric_spread_gauge_dtype_and_threads_are_passed_on(run):
    n_threads = torch.get_num_threads()
    options = ("--metric", "outputs", "--spread", "even", "--gauge", "free", "--dtype", "bfloat16", "--threads", "1")
    status, out, _ = run(*options)
    assert status == 0
    assert torch.get_num_threads() == n_threads
    assert "predicted rise" not in out
    loaded = mpo_core.load("small")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    layers = [module for module in loaded.modules() if isinstance(module, mpo_core.LowRankLinear)]
    assert {layer.gauge for layer in layers} == {"free"}
    assert [layer.n_params_matrix <= 0.6 * layer.in_features * layer.out_features for layer in layers] == [True] * 14
    assert run("--metric", "weights", "--layer", "mpo", out="mpo")[0] == 0
    chains = [module for module in mpo_core.load("mpo").modules() if isinstance(module, mpo_core.MPOLinear)]
    assert {chain.gauge for chain in chains} == {"fixed"}


def test_a_token_that_begins_every_text_begins_every_sequence(run):
    begun = language_models.tokenizer()
    begun._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    language_models.write(language_models.llama(), "begun")
    begun.save_pretrained("begun")
    status, out, _ = run("--length", "32", model="begun")
    assert status == 0
    expected = mpo_core.perplexity(language_models.llama(), cut(length=32, first=1).evaluation, window=31, first=1)
    assert numbers("perplexity", out)[:2] == pytest.approx([expected.value, expected.standard_error], abs=0.02)


def test_one_document_is_cut_and_it_is_said(run):
    Path("all.txt").write_text(language_models.text(1000), encoding="utf-8")
    status, out, err = run(text=["all.txt"])
    assert status == 0
    assert "fewer than 5 documents: the last part of each is for evaluation" in err
    assert re.search(r"one standard error over \d+ sequences", out)


# Statistics in a file -------------------------------------------------------------------------------------------------


def test_statistics_are_collected_once(run, monkeypatch):
    assert run("--statistics", "kept/stats")[0] == 0
    assert run(out="without")[0] == 0
    collect = command.collect_statistics
    monkeypatch.setattr(command, "collect_statistics", None)
    assert run("--statistics", "kept/stats", out="again")[0] == 0
    status, _, err = run("--statistics", "kept/stats", "--metric", "outputs", keep="0.4", out="smaller")
    assert (status, "statistics: read from kept/stats" in err) == (0, True)
    for other in ("without", "again"):
        assert torch.equal(logits(mpo_core.load("small")), logits(mpo_core.load(other)))
    assert mpo_core.n_params(mpo_core.load("smaller")) < mpo_core.n_params(mpo_core.load("small"))
    monkeypatch.setattr(command, "collect_statistics", collect)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt2"}, "kept belongs to another model: choose another file, or remove it"),
        ({"damage": lambda: _set("llama/config.json", "rope_theta", 3.0)}, "kept belongs to another model"),
        ({"options": ["--dtype", "bfloat16"]}, "kept belongs to another model"),
        ({"options": ["--seed", "1"]}, "kept belongs to other text, --tokens, "),
        ({"options": ["--include", "*"]}, ""),
        ({"options": ["--include", "*.mlp.*"]}, "kept has nothing about model.layers.0.mlp.gate_proj: --include or"),
        ({"options": ["--metric", "loss"]}, "kept was collected with --metric outputs, without the loss"),
        ({"damage": lambda: Path("kept").write_bytes(b"x")}, "kept is not a file of statistics: "),
        ({"damage": lambda: Path("kept.json").write_text("{}")}, "kept.json is damaged: remove it and kept"),
        ({"damage": lambda: Path("kept.json").unlink()}, "kept is not a file of this command: kept.json is not beside"),
    ],
)
def test_statistics_of_something_else_are_refused(run, options, message):
    metric = ("--metric", "outputs", "--include", "*.self_attn.*")
    assert run("--statistics", "kept", *metric)[0] == 0
    options = {"options": [], "model": "llama", **options}
    options.get("damage", lambda: None)()
    changed = [*metric, *options["options"]]
    if options["model"] == "gpt2":
        changed = changed[:2]
    status, _, err = run("--statistics", "kept", *changed, model=options["model"], out="other")
    assert status == 2
    assert message in err.splitlines()[-1]
    assert not Path("other").exists()


# What it refuses ------------------------------------------------------------------------------------------------------


def _set(path, key, value):
    config = json.loads(Path(path).read_text())
    config.setdefault("rope_parameters", {})[key] = value
    Path(path).write_text(json.dumps(config | {key: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "0"}, "argument --keep: must be above 0 and at most 1, but got 0 (see mpo-compress --help)"),
        ({"keep": "1.5"}, "must be above 0 and at most 1, but got 1.5"),
        ({"keep": "some"}, "must be above 0 and at most 1, but got some"),
        ({"keep": "0.001"}, " parameters is too small: the smallest sizes of all layers have "),
        ({"options": ["--tokens", "0"]}, "argument --tokens: must be a whole number from 1 on, but got 0"),
        ({"options": ["--seed", "9" * 20]}, "argument --seed: must be a whole number from 0 on, but got 999"),
        ({"options": ["--length", "2"]}, "argument --length: must be a whole number from 3 on, but got 2"),
        ({"options": ["--metric", "best"]}, "argument --metric: invalid choice: 'best'"),
        ({"options": ["--layer", "best"]}, "no kind of layer is called 'best', only mpo, low_rank"),
        ({"options": ["--layer", "monarch", "--gauge", "fixed"]}, "--layer monarch has no gauge: leave --gauge out"),
        ({"options": ["--metric", "weights", "--statistics", "s"]}, "--metric weights needs no --statistics"),
        ({"options": ["--metric", "outputs", "--spread", "loss"]}, "--spread loss needs --metric loss"),
        ({"options": ["--narrow", "--spread", "even"]}, "--narrow needs --metric loss and --spread loss"),
        ({"options": ["--include", "model.layer.*"]}, "include=['model.layer.*'], exclude=[]; it has"),
        ({"options": ["--include", "lm_head"]}, "lm_head cannot be replaced: its weight is shared with model.embed"),
        ({"options": ["--exclude", "*"]}, "no nn.Linear inside the model matches"),
        ({"options": ["--length", "100"]}, "--length must be at most 64, the model's context, but got 100"),
        ({"text": ["none.txt"]}, "none.txt cannot be read: No such file or directory"),
        ({"text": ["empty.txt"]}, "there is no text in empty.txt"),
        ({"few": ()}, "10,240 tokens to calibrate and 10,000 to evaluate were asked for, but the text has 150 and 900"),
        ({"model": "none"}, "none is no folder, and cannot be loaded by name: "),
        ({"model": "nothing"}, "nothing holds no Hugging Face model"),
        ({"model": "small"}, "small holds a model that `mpo_core.save` wrote"),
        ({"model": "longer"}, "the tokenizer is not the model's: it has token 39, but the model 30"),
        ({"out": "small"}, "small holds an earlier result: choose another folder, or add --replace"),
        ({"out": "llama"}, "llama is not empty, and holds no earlier result: choose another folder"),
        ({"out": "0.txt"}, "0.txt cannot be written: "),
        ({"out": "0.txt/small"}, "0.txt/small cannot be written: "),
        ({"options": ["--statistics", "llama"]}, "llama cannot be written: "),
    ],
)
def test_errors_are_one_line(run, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("empty.txt").write_text("\n")
    Path("nothing").mkdir()
    mpo_core.save(language_models.llama(), "small")
    language_models.write(language_models.llama(), "longer")
    longer = language_models.tokenizer()
    longer.add_tokens([f"v{i}" for i in range(10)])
    longer.save_pretrained("longer")
    Path("0.txt").unlink()
    Path("0.txt").write_text(language_models.text(100) + " v9" * 50)
    before = sorted(Path("small").iterdir())
    status, out, err = run(*options.pop("options", []), **{"out": "new", **options})
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("mpo-compress: ")
    assert message in line
    assert not Path("new").exists()
    assert sorted(Path("small").iterdir()) == before


def test_a_misspelt_pattern_lists_a_few_names(run):
    _, _, err = run("--include", "*.q_pro")
    assert err.splitlines()[-1].endswith(
        "it has model.layers.*.self_attn.q_proj, model.layers.*.mlp.up_proj, model.layers.*.mlp.gate_proj, "
        "model.layers.*.mlp.down_proj and 4 more"
    )


def test_arguments_that_are_missing_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["llama"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "mpo-compress: the following arguments are required: OUT, --keep, --text (see mpo-compress --help)\n"
    )


def test_an_earlier_result_is_replaced_only_if_asked(run):
    assert run()[0] == 0
    first = logits(mpo_core.load("small"))
    assert run(keep="0.4")[0] == 2
    assert torch.equal(logits(mpo_core.load("small")), first)
    assert run("--replace", keep="0.4")[0] == 0
    assert not torch.equal(logits(mpo_core.load("small")), first)


def test_a_failed_write_and_a_stop_have_their_own_status(run, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "save", fail)
    status, _, err = run()
    assert (status, err.splitlines()[-1]) == (1, "mpo-compress: no space left")
    monkeypatch.setattr(command, "compress", stop)
    status, _, err = run()
    assert (status, err.splitlines()[-1]) == (130, "mpo-compress: stopped")


def test_help_fits_into_80_columns_and_has_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    example = next(line for line in shown.splitlines() if line.startswith("  mpo-compress "))
    assert parser().parse_args(example.split()[1:]).keep == 0.6
