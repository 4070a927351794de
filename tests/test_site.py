"""The documents as a site: every link leads somewhere, and the API is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from study.commands.exchange import import_study
from study.commands.sync import sync
from study.ledger.directory import StudyDirectory

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_site_builds_without_a_warning_and_names_the_api(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("compress", "MPOLinear", "load_study", "plot_frontier", "plot_curves"):
        assert name in api
    assert "fonts.googleapis.com" not in api
    assert (tmp_path / "site" / "findings.html").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
def test_page_on_notebooks_runs_on_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = StudyDirectory(Path("results/first"))
    import_study(ROOT / "docs" / "results" / "ema-quick" / "ledger.db.xz", directory)
    sync(directory.load_config(), directory, None, None)
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    assert len(blocks) == 3
    assert Path("frontier.pdf").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
def test_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """As Jupyter runs it, with an empty folder for results."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = json.loads((ROOT / "docs" / "study.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert (tmp_path / "frontier.pdf").stat().st_size > 1000
    assert len(cells) >= 7
