"""Who may import whom: `mpo_core` and `analysis` stand on the ground, `study` stands on both."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import analysis

ROOT = Path(__file__).parents[1]
OURS = ("mpo_core", "analysis", "study")
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in OURS}


def imports(path):
    """Full names of all modules that a file imports, wherever in it: at its top, in a function, for a type checker."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            names |= {".".join((*prefix, *filter(None, [node.module]), alias.name)) for alias in node.names}
    return names


def importers(package, of):
    """Files of a package that import one of these top-level modules."""
    return {
        str(path.relative_to(ROOT))
        for path in FILES[package]
        if any(name.partition(".")[0] in of for name in imports(path))
    }


def loaded_by(statement, modules):
    """Which of these modules a fresh interpreter has after a statement."""
    script = f"import sys\n{statement}\nprint([name for name in {list(modules)!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return ast.literal_eval(ended.stdout.splitlines()[-1])


# In the text of the files ---------------------------------------------------------------------------------------------


def test_packages_are_found():
    assert all(len(paths) > 5 for paths in FILES.values())
    assert "mpo_core.layers.mpo.MPOLinear" in imports(ROOT / "mpo_core/models/picogpt.py")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("mpo_core", ("analysis", "study")), ("analysis", ("mpo_core", "study"))],
)
def test_mpo_core_and_analysis_import_nothing_of_ours(package, forbidden):
    assert importers(package, forbidden) == set()


def test_mpo_core_needs_torch_and_the_standard_library_alone():
    # A report becomes a DataFrame where pandas is there; a saved model needs safetensors, one of Hugging Face its code.
    further = {
        "report.py": {"pandas"},
        "origin.py": {"transformers"},
        "hugging_face.py": {"transformers", "huggingface_hub"},
    }
    further |= {
        name: {"safetensors"} for name in ("saving.py", "statistics.py", "tensor_files.py", "collection_folder.py")
    }
    for path in FILES["mpo_core"]:
        names = {name.partition(".")[0] for name in imports(path)} - further.get(path.name, set())
        assert names <= {"torch", "mpo_core", *sys.stdlib_module_names}, path
    assert loaded_by("import mpo_core", ["pandas", "scipy", "tensorly", "transformers", "safetensors"]) == []


def test_analysis_needs_neither_torch_nor_ray():
    assert importers("analysis", ("torch", "ray")) == set()


def test_analysis_takes_of_optuna_its_importance_alone():
    """And what that is fed with: no sampler, no storage. It brings neither torch nor Ray."""
    assert importers("analysis", ("optuna",)) == {"analysis/results/importance.py"}
    taken = {name for name in imports(ROOT / "analysis/results/importance.py") if name.startswith("optuna")}
    modules = ("importance", "distributions", "logging", "study.create_study", "trial.create_trial")
    assert all(name.removeprefix("optuna.").startswith(modules) for name in taken)
    assert loaded_by("import analysis.results.importance", ["optuna"]) == []
    assert loaded_by("import optuna.importance", ["torch", "ray"]) == []


def test_mlflow_has_one_writer_and_one_reader():
    writer = ("connection", "known_runs", "tracker")
    assert importers("study", ("mlflow",)) == {f"study/tracking/{name}.py" for name in writer}
    assert importers("analysis", ("mlflow",)) == {"analysis/runs/load.py"}


def test_ray_is_imported_by_its_executor_alone():
    assert importers("study", ("ray",)) == {f"study/scheduler/{name}.py" for name in ("ray", "tune_parts", "worker")}


def test_run_schema_needs_the_standard_library_alone():
    names = {name.partition(".")[0] for name in imports(ROOT / "analysis/run_schema.py")}
    assert names <= sys.stdlib_module_names


def test_study_takes_of_the_analysis_its_schema_and_its_pure_functions_alone():
    """Names of what a run records, URLs, streams, what `refine` and `plan` go by, places in documents."""
    taken = {name for path in FILES["study"] for name in imports(path) if name.partition(".")[0] == "analysis"}
    modules = (
        *(
            "analysis.run_schema",
            "analysis.runs.urls",
            "analysis.commands.streams",
            "analysis.results.pairs",
            "analysis.results.comparisons",
            "analysis.results.summary",
            "analysis.runs.study_runs",
            "analysis.statistics.nondominated",
            "analysis.report.places",
        ),
        "analysis.statistics.power",
    )
    assert {next((module for module in modules if name.startswith(module)), name) for name in taken} == {*modules}


def parts_of(package):
    """The folders and modules at the top of a package, each with those that it imports."""
    top = {".".join((package, path.stem)) for path in (ROOT / package).iterdir() if path.stem.strip("_").isidentifier()}
    parts = {name: set() for name in top if not name.endswith(("__init__", "__main__", "__pycache__"))}
    for path in FILES[package]:
        own = ".".join((package, path.relative_to(ROOT / package).with_suffix("").parts[0]))
        if own in parts:
            parts[own] |= {".".join(name.split(".")[:2]) for name in imports(path)} & parts.keys() - {own}
    return parts


@pytest.mark.parametrize("package", OURS)
def test_a_package_has_few_parts_that_import_in_one_direction(package):
    parts = parts_of(package)
    assert len(parts) <= 10
    list(TopologicalSorter(parts).static_order())  # raises a CycleError


@pytest.mark.parametrize(
    "path",
    [path for paths in FILES.values() for path in paths if path.name == "__init__.py"],
    ids=lambda path: path.parent.name,
)
def test_init_is_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    if path.parent == ROOT / "analysis":
        return  # see the next test
    if path.parent != ROOT / "mpo_core":
        assert len(tree.body) == 1
        return
    *names, last = tree.body[1:]
    assert all(isinstance(node, ast.ImportFrom) for node in names)
    assert isinstance(last, ast.Assign)
    public = {alias.name for node in names for alias in node.names}
    assert set(ast.literal_eval(last.value)) == public


def test_analysis_gives_its_public_names_and_loads_what_they_need_only_then():
    assert loaded_by("import analysis", ["pandas", "matplotlib", "analysis.report"]) == []
    statement = "import analysis; [getattr(analysis, name) for name in analysis.__all__]"
    assert loaded_by(statement, ["pandas", "analysis.report.notebook"]) == ["pandas", "analysis.report.notebook"]
    with pytest.raises(AttributeError, match="has no attribute 'load_studies'"):
        analysis.load_studies  # noqa: B018


# In a running interpreter ---------------------------------------------------------------------------------------------


def test_command_line_loads_neither_torch_nor_ray_nor_mlflow():
    """Help and errors are there at once."""
    assert loaded_by("import study.commands.cli", ["torch", "ray", "mlflow"]) == []
    everything = ["study.training.train", "study.ledger.ledger", "study.scheduler.inline"]
    statement = "import study.commands.run, study.commands.plan"
    assert loaded_by(statement, ["ray", "mlflow", *everything]) == everything


def test_pure_training_needs_no_sampler_and_no_database():
    statement = "import study.training.train, study.training.corpus, study.training.storage"
    assert loaded_by(statement, ["optuna", "sqlalchemy", "ray", "mlflow", "pandas", "matplotlib"]) == []


def test_analysis_loads_no_torch():
    statement = "import analysis.commands.cli, analysis.runs.load, analysis.report.report"
    assert loaded_by(statement, ["torch", "ray", "optuna", "mpo_core", "study"]) == []


def test_inline_study_without_tracking_loads_neither_ray_nor_mlflow(tmp_path):
    (tmp_path / "text.txt").write_text("to train or not to train " * 40, encoding="utf-8")
    study = {
        "name": "s",
        "corpus": {"path": "text.txt"},
        "model": {"d_model": 4, "n_heads": 1, "n_layers": 1, "context": 8},
        "protocol": {"steps": 2, "warmup_steps": 1, "batch_size": 2, "sampled_eval_batches": 1},
        "seeds": 1,
        "arms": [{"name": "dense", "family": "dense"}],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    arguments = ["mpo-study", "run", str(tmp_path / "study.yaml"), "--dir", str(tmp_path / "results")]
    arguments += ["--executor", "inline", "--tracking", "off"]
    statement = (
        f"sys.argv = {arguments!r}\nfrom study.commands.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded_by(statement, ["ray", "mlflow", "sqlalchemy"]) == ["sqlalchemy"]
    assert (tmp_path / "results" / "ledger.db").exists()


@pytest.mark.parametrize("module", ["mpo_core", "study.training.train"])
def test_import_has_no_side_effects(module):
    script = f"""
import random, threading
import numpy as np, torch

def state():
    # Under the name of numpy's own generator there is its global state.
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_num_threads(), threading.active_count(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())

before = state()
import {module}
assert state() == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True)


DRAWING = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "normal_", "uniform_")


def global_draws(path):
    """Calls in a file that seed or draw from a global generator."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of, _, name = ast.unparse(node.func).rpartition(".")
        if of in ("random", "np.random", "numpy.random") and name not in ("default_rng", "Generator"):
            yield ast.unparse(node)
        if of in ("torch", "nn.init", "torch.nn.init") and (
            name in ("manual_seed", "seed")
            or (name in DRAWING and "generator" not in [keyword.arg for keyword in node.keywords])
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize("package", OURS)
def test_nothing_seeds_or_draws_from_a_global_generator(package):
    assert [call for path in FILES[package] for call in global_draws(path)] == []


def test_global_draws_would_be_found(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("torch.randn(3)\nnp.random.seed(0)\ntorch.randn(3, generator=g)\nnn.init.normal_(W)\n")
    assert list(global_draws(path)) == ["torch.randn(3)", "np.random.seed(0)", "nn.init.normal_(W)"]
