from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import simulated_controls
from simulated_study import simulated_runs

from analysis.figures import data
from analysis.report.interactive import frontier_chart, parallel_chart, plotly_script, run_link
from analysis.results.summary import VAL_LOSS, summarise
from analysis.results.uncertainty import frontier_uncertainty
from analysis.runs.studies import join_studies


def points_of(runs, summary):
    return data.frontier_points(summary, VAL_LOSS, frontier_uncertainty(runs, summary, VAL_LOSS).chances)


def traces(html):
    """What the page gives to Plotly."""
    start = html.index("[", html.index("Plotly.newPlot("))
    return json.JSONDecoder().raw_decode(html[start:])[0]


def test_chart_describes_every_configuration_and_links_its_run(runs, summary):
    points = points_of(runs, summary)
    found = [trace for trace in traces(frontier_chart(runs, points, VAL_LOSS)) if trace.get("mode") == "markers"]
    words = [text for trace in found for text in trace["text"]]
    links = [link for trace in found for link in trace["customdata"]]
    assert len(words) == len(links) == len(points)
    run_ids = set(runs.trials.loc[runs.trials["trial"].isin(points["trial"]), "run_id"])
    assert {link.rpartition("/")[2] for link in links} == run_ids
    [dense] = [text for text in words if text.startswith("<b>dense</b>")]
    row = points[points["is_reference"]].iloc[0]
    for part in (
        "3 seeds",
        f"{row['mean']:.5g} ± {row['half_width']:.4g} nats",
        "808,448 parameters (100.0 % of dense)",
    ):
        assert part in dense
    assert [symbol for trace in found for symbol in trace["marker"]["symbol"]].count("diamond") == 1


@pytest.mark.parametrize("name", ["controls", "no dense model", "crowded"])
def test_every_group_has_its_symbol(name):
    runs, _ = simulated_runs(simulated_controls.studies()[name], n_evaluations=1)
    summary = summarise(runs)
    points = points_of(runs, summary)
    found = [trace for trace in traces(frontier_chart(runs, points, VAL_LOSS)) if trace.get("mode") == "markers"]
    shapes = [{symbol.removesuffix("-open") for symbol in trace["marker"]["symbol"]} for trace in found]
    assert len(found) == points["group"].nunique()
    assert all(len(shape) == 1 for shape in shapes)
    looks = {(trace["marker"]["color"], *shape) for trace, shape in zip(found, shapes, strict=True)}
    assert len(looks) == len(found)


def test_parallel_axes_are_the_factors_that_vary(runs, summary):
    [trace] = traces(parallel_chart(runs, summary))
    axes = {axis["label"]: axis for axis in trace["dimensions"]}
    assert {"family", "start", "chi", "d_model", "n_params", "loss (nats)"} <= set(axes)
    assert "n_sites" in axes  # dense has none
    assert "init" in axes
    assert "weight_decay" not in axes
    assert axes["chi"]["ticktext"] == ["4", "8", "16", "32", "–"]


def test_same_runs_give_the_same_bytes(runs, summary):
    points = points_of(runs, summary)
    assert frontier_chart(runs, points, VAL_LOSS) == frontier_chart(runs, points, VAL_LOSS)
    assert parallel_chart(runs, summary) == parallel_chart(runs, summary)


def test_chart_of_few_seeds_says_that_it_has_no_interval():
    from simulated_study import Configuration

    runs, _ = simulated_runs([Configuration("mpo", 79_168, 1.8, chi=8, seeds=(0, 1))])
    summary = summarise(runs)
    [trace] = traces(frontier_chart(runs, points_of(runs, summary), VAL_LOSS))
    assert "(no interval)" in trace["text"][0]
    assert trace["marker"]["symbol"] == ["circle-open"]


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("sqlite:////somewhere/mlflow.db", "http://127.0.0.1:5000/#/runs/abc"),
        ("https://user:secret@host:8443/mlflow/", "https://host:8443/mlflow/#/runs/abc"),
        ("http://host", "http://host/#/runs/abc"),
    ],
)
def test_run_link_is_an_address_without_a_password(runs, uri, link):
    assert run_link(replace(runs, address=replace(runs.address, tracking_uri=uri)), "abc", "tiny") == link


@pytest.mark.parametrize("names", [("one", "two"), ("same", "same")])
def test_runs_of_joined_studies_link_to_their_own_servers(names):
    from simulated_study import Configuration

    parts = []
    for name, uuid, size in zip(names, ("aaaaaaaa-1", "bbbbbbbb-2"), (79_168, 177_408), strict=True):
        part, _ = simulated_runs(
            [Configuration("mpo", size, 1.8, chi=size // 10_000)], experiment=name, uuid=uuid, n_evaluations=1
        )
        parts.append(replace(part, address=replace(part.address, tracking_uri=f"http://server-{uuid[0]}")))
    runs = join_studies(parts)
    points = points_of(runs, summarise(runs))
    found = [trace for trace in traces(frontier_chart(runs, points, VAL_LOSS)) if trace.get("mode") == "markers"]
    links = {text: link for trace in found for text, link in zip(trace["text"], trace["customdata"], strict=True)}
    assert len(links) == 2
    for text, link in links.items():
        assert link == f"http://server-{'a' if '79,168 parameters' in text else 'b'}/#/runs/0-None"


def test_charts_offer_no_upload(runs, summary):
    html = frontier_chart(runs, points_of(runs, summary), VAL_LOSS)
    assert re.search(r'"modeBarButtonsToRemove":\s*\["sendChartToCloud"\]', html)
    assert 'name:"sendChartToCloud"' in plotly_script()  # else it has another name now


def test_names_end_no_script_and_are_no_markup(runs):
    hostile = "</script><img src=x onerror=alert(1)>"
    changed = replace(runs, trials=runs.trials.assign(arm=hostile, init=runs.trials["init"].fillna("") + hostile))
    summary = summarise(changed)
    for html in (frontier_chart(changed, points_of(changed, summary), VAL_LOSS), parallel_chart(changed, summary)):
        assert html.count("</script") == html.count("<script")
        assert "<img" not in html
        shown = json.dumps(traces(html))
        assert "img src" in shown
        assert "<img" not in shown
