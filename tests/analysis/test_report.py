from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
import simulated_study

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.report.report import write_report
from analysis.runs.load import StudyAddress, load_study

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Links, pictures and text of a page; refuses tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.references: list[str] = []
        self.alts: list[str | None] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.references += [value for key in ("href", "src", "srcset", "action") if (value := attributes.get(key))]
        self.ids += [value] if (value := attributes.get("id")) else []
        if tag == "img":
            self.alts.append(attributes.get("alt"))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data if self._open and self._open[-1] != "style" else ""


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "report"
    write_report(runs, out)
    return out


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def explore(report):
    return Page((report / "explore.html").read_text(encoding="utf-8"))


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_report_refers_only_to_files_it_holds(report, page, explore):
    local = {reference for reference in page.references + explore.references if not reference.startswith("#")}
    assert local
    for reference in local:
        assert "//" not in reference
        assert (report / reference).is_file(), reference
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)


def test_report_fetches_nothing(report):
    text = (report / "index.html").read_text(encoding="utf-8")
    for word in ("http:", "https:", "<script", "@import", "url("):
        assert word not in text


def test_page_to_explore_takes_its_script_from_beside_it(report, explore):
    assert explore.references.count("scripts/plotly.min.js") == 1
    assert explore.references.count("index.html") == 1
    assert {"explore_val_loss", "explore_val_acc", "explore_parallel"} <= set(explore.ids)


def test_report_links_every_file_it_wrote(report, page, explore):
    written = set(files(report)) - {"index.html", "report.json"}
    assert written <= set(page.references + explore.references)
    assert json.loads((report / "report.json").read_text())["written"] == sorted(written | {"index.html"})


def test_report_describes_each_figure_in_words(report, page):
    assert len(page.alts) == len(list((report / "figures").glob("*.svg")))
    assert all(alt and len(alt) > 40 for alt in page.alts)
    assert "χ=8 (MPO fine-tuned)" in page.alts[0]


def test_report_says_what_a_reader_must_know(page, runs):
    text = " ".join(page.text.split())
    for sentence in (
        "11 configurations, 33 complete seeds (n = 3 per configuration)",
        "Budgets differ.",
        "1 failed.",
        "1 not finished.",
        "validation loss is not finite",
        "95 % t intervals of the mean",
        "1 duplicated trial left out",
        "full validation split",
        "comparisons (Benjamini and Hochberg)",
        "What is on the frontier?",
        "P(on frontier) is the probability that a configuration truly is on it",
        *runs.budgets,
        runs.uuid,
        runs.trials["corpus_sha256"][0],
    ):
        assert sentence in text.replace("\xa0", " "), sentence


@pytest.mark.slow
def test_report_tells_what_was_tuned_here_from_what_was_tuned_before(tmp_path):
    tuned = {"elsewhere": (3, 3), "here": (6, None), "both": (6, 3), "never": (1, None)}
    found = [
        replace(simulated_study.configurations()[0], arm=arm, extra={"tuning_trials": n, "tuned_among": among})
        for arm, (n, among) in tuned.items()
    ]
    uri = simulated_study.write_study(tmp_path, found, n_evaluations=2)
    write_report(load_study(StudyAddress(uri, "tiny")), tmp_path / "report", light=True)
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "2 of 4 configurations have values that another study chose, each among 3 trials." in text
    assert "2 of 4 configurations were tried to choose an init or a learning rate." in text


def test_report_shows_the_frontier_first(page, summary):
    on = summary[summary["on_frontier/val_loss"]]
    assert page.ids.index("frontier") < page.ids.index("figures")
    before_figures = page.text[: page.text.rindex("Figures")]
    for n_params in on["n_params"]:
        assert f"{n_params:,}" in before_figures
    assert "experiment 'tiny'" in before_figures


def test_report_saves_the_data_each_figure_shows(report, summary, runs):
    points = pd.read_csv(report / "figures" / "frontier_val_acc.csv").set_index("trial")
    on_frontier = summary.set_index("trial")["on_frontier/val_acc"]
    assert points["on_frontier"].to_dict() == on_frontier.to_dict()
    for row in summary.to_dict("records"):
        assert points["mean"][row["trial"]] == pytest.approx(100 * row["mean/final/val_acc"])
    assert len(pd.read_csv(report / "figures" / "frontier_val_acc_seeds.csv")) == len(runs.seeds)
    curves = pd.read_csv(report / "figures" / "learning_curves.csv")
    assert sorted(curves["trial"].unique()) == list(range(11))


@pytest.mark.slow
def test_light_report_is_the_same_with_fewer_files(report, runs, tmp_path):
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    write_report(runs, tmp_path, light=True)
    full, light = files(report), files(tmp_path)
    fewer = {
        name for name in full if name.endswith((".pdf", ".png")) or name in ("explore.html", "scripts/plotly.min.js")
    }
    assert light.keys() == full.keys() - fewer
    differing = {name for name in light if light[name] != full[name]}
    of_mlflow = {"index.html", "tables/trials.csv", "tables/frontier.csv"}  # where the runs are, and their ids
    assert differing == {"report.json", *of_mlflow}
    for name in of_mlflow:
        assert b"sqlite:" not in light[name]
        assert not any(run_id.encode() in light[name] for run_id in runs.trials["run_id"])
    for reference in Page(light["index.html"].decode()).references:
        assert reference.startswith("#") or reference in light


@pytest.mark.slow
def test_report_written_again_is_the_same_bytes(report, runs):
    before = files(report)
    write_report(runs, report)
    assert files(report) == before


@pytest.mark.slow
def test_report_replaces_the_last_one_and_leaves_foreign_files_alone(runs, tmp_path):
    write_report(runs, tmp_path, light=True)
    assert (tmp_path / "figures" / "rel_error.svg").exists()
    notes = [tmp_path / "notes.txt", tmp_path / "figures" / "mine.png"]
    for note in notes:
        note.write_text("mine")
    write_report(replace(runs, rel_errors=runs.rel_errors.iloc[:0]), tmp_path, light=True)
    assert not (tmp_path / "figures" / "rel_error.svg").exists()
    assert not (tmp_path / "figures" / "rel_error.csv").exists()
    assert all(note.read_text() == "mine" for note in notes)
    left = set(files(tmp_path)) - {"report.json", "notes.txt", "figures/mine.png"}
    assert sorted(left) == json.loads((tmp_path / "report.json").read_text())["written"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_report_overwrites_nothing_it_did_not_write(runs, tmp_path):
    (tmp_path / "index.html").write_text("my own page")
    with pytest.raises(AnalysisError, match=r"index\.html exists and was not written by a report"):
        write_report(runs, tmp_path)
    assert files(tmp_path) == {"index.html": b"my own page"}


@pytest.mark.slow
def test_report_names_a_file_where_its_folder_must_be(runs, tmp_path):
    (tmp_path / "figures").write_text("mine")
    with pytest.raises(AnalysisError, match=r"figures exists and is not a folder"):
        write_report(runs, tmp_path, light=True)
    assert files(tmp_path) == {"figures": b"mine"}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"written": ["../precious"]}', '{"written": ["/etc/precious"]}', '{"written": ["other"]}']
)
def test_report_believes_no_list_of_files_that_is_not_its_own(runs, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("precious")
    (out / "report.json").write_text(content)
    with pytest.raises(AnalysisError, match=r"report\.json"):
        write_report(runs, out)
    assert (tmp_path / "precious").exists()


def test_report_says_where_it_cannot_write(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AnalysisError, match=r"cannot write the report to .*file"):
        write_report(runs, tmp_path / "file")


def test_report_refuses_a_study_without_complete_seed(tmp_path):
    found = [replace(simulated_study.configurations()[3], seeds=(), failed=(0,), unfinished=(1,))]
    runs, _ = simulated_study.simulated_runs(found)
    with pytest.raises(AnalysisError, match=r"no complete seed yet: 1 unfinished, 1 failed"):
        write_report(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_of_single_seeds_claims_nothing_and_escapes_names(tmp_path):
    found = [replace(c, seeds=(0,), arm=f"<b>{c.arm}</b>") for c in simulated_study.awkward_studies()["usual"][:4]]
    uri = simulated_study.write_study(tmp_path, found, n_evaluations=2)
    runs = load_study(StudyAddress(uri, "tiny"))
    runs = replace(runs, seeds=runs.seeds.assign(**{schema.PROGRAM: ["1a2b", "1a2b", "<b>3c</b>", "5d6e"]}))
    write_report(runs, tmp_path / "out", light=True)
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert "2 by 1a2b; 1 by <b>3c</b>; 1 by 5d6e. No configurations have seeds of more than one" in page.text
    assert "None: no configuration has 3 complete seeds without a failed one." in page.text
    assert "4 configurations have fewer than 3 complete seeds." in page.text
    assert "All trials here share one." in page.text


@pytest.mark.slow
def test_report_says_what_was_stopped_early_and_what_follows(tmp_path):
    usual = simulated_study.awkward_studies()["usual"]
    why = "trial 5 is better in val_loss by 0.02 or more on every seed shared"
    database = simulated_study.write_study(tmp_path, [*usual, replace(usual[5], seeds=(0, 1), stopped=why)])
    write_report(load_study(StudyAddress(database, "tiny")), tmp_path / "report", light=True)
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "1 stopped early." in text
    assert "depends on the order in which trials ended" in text
    assert why in text
    assert 'href="tables/stopped.csv"' in text
    assert "2 (stopped)" in text
    assert "have fewer than" not in text


HOSTILE = "<script>alert(1)</script>"


@pytest.mark.slow
def test_report_shows_names_and_failures_as_text(runs, tmp_path):
    """What MLflow holds may be anybody's."""
    hostile = replace(
        runs,
        name=HOSTILE,
        trials=runs.trials.assign(arm=runs.trials["arm"] + HOSTILE + "$x_$", study=HOSTILE),
        failures=runs.failures.assign(reason=f"{HOSTILE} | [a](javascript:b)"),
    )
    assert len(hostile.failures)
    write_report(hostile, tmp_path, light=True)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > len(runs.trials)
    markdown = (tmp_path / "tables" / "failures.md").read_text(encoding="utf-8")
    assert r"\<script>alert(1)\</script> \| \[a\](javascript:b)" in markdown
    assert "<script" not in markdown.replace(r"\<script", "")
