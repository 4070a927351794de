"""What our commands do where their output cannot be written, and how each of them says what it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from study_fixtures import nothing_left_running, results_at, start_cli, write_study  # noqa: F401 (one is a fixture)

from analysis.commands import shipped
from study.spec import schema
from study.training import bigram

ROOT = Path(__file__).parents[1]
IMPORTS = "import sys\nfrom analysis.commands.streams import lasting_streams\n"


def ended(script, prefix="", encoding="utf-8", **options):
    """A command made of `script`, which a shell starts with `prefix`."""
    code = f"{IMPORTS}with lasting_streams('it'):\n    {script}"
    command = ["bash", "-c", f'exec "$0" -c "$1" {prefix}', sys.executable, code]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "χ \\udcff"), ("latin-1", "\\u03c7 \\udcff")])
def test_character_that_the_encoding_lacks_is_escaped(encoding, shown):
    done = ended(r"print('\u03c7 \udcff'); print('\u03c7 \udcff', file=sys.stderr)", encoding=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{shown}\n", f"{shown}\n")


@pytest.mark.parametrize(
    ("script", "code"), [("print('a')", 1), ("print('a'); sys.exit(0)", 1), ("print('a'); sys.exit(130)", 130)]
)
def test_full_disk_is_told_in_one_line_once_the_command_is_done(script, code):
    done = ended(f"{script.replace('print', 'print(1); print')}", "> /dev/full")
    assert (done.returncode, done.stderr) == (code, "it: cannot write the output: No space left on device\n")
    assert ended(script, "> /dev/full 2>&1").returncode == code


def test_reader_that_leaves_is_no_error():
    script = "[print(i, flush=True) for i in range(100_000)]; print('done', file=sys.stderr); sys.exit(3)"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; echo ${PIPESTATUS[0]}', sys.executable,
         f"{IMPORTS}with lasting_streams('it'):\n    {script}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n3\n", "done\n")


def test_streams_that_were_closed_before_are_no_error():
    done = ended("print('a'); print('b', file=sys.stderr)", ">&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_run_goes_on_without_its_reader_and_in_an_encoding_without_chi(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    file = write_study(tmp_path)
    run = start_cli("run", file, "--dir", "kept", "--executor", "inline", "--tracking", "off", cwd=tmp_path)
    while not run.stdout.readline().startswith("1/8"):
        assert run.poll() is None
    run.stdout.close()
    assert (run.wait(), run.stderr.read()) == (0, "")
    assert len(results_at(tmp_path / "kept")) == 8


@pytest.mark.parametrize(("module", "named"), [(schema, "folder"), (bigram, "text"), (shipped, "STUDIES")])
def test_module_that_is_run_says_what_it_takes(module, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert named in capsys.readouterr().out


def test_schema_says_in_one_line_where_it_cannot_write(tmp_path):
    command = [sys.executable, "-m", "study.spec.schema", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "none" in done.stderr
    assert len(done.stderr.splitlines()) == 1
