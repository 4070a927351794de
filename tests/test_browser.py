"""The MLflow UI, as `mpo-study ui` shows a finished study, in a headless Chromium."""

from __future__ import annotations

import re
import shutil
import signal
import socket

import pytest
from chromium import PATIENCE, browser, keep_screenshot  # noqa: F401 (a fixture)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from study_fixtures import (
    DENSE,
    MPO,
    TUNED,
    cli,
    mlflow_template,  # noqa: F401 (a fixture)
    run_at,
    runs_in,
    start_cli,
    write_study,
)

from analysis import run_schema as schema

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def study(tmp_path_factory, mlflow_template):  # noqa: F811
    """Folder of a finished study with a failed trial, tracked in MLflow."""
    work = tmp_path_factory.mktemp("work")
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    file = write_study(
        work,
        arms=[DENSE, MPO, TUNED, wild],
        protocol={"steps": 60, "eval_every": 10},
        description="A small study, made for a look at the MLflow UI.",
    )
    run_at(file, work / "kept")
    shutil.copy(mlflow_template, work / "kept" / "mlflow.db")
    code, _, err = cli("sync", "kept", cwd=work)
    assert code == 0, err
    return work / "kept"


@pytest.fixture(scope="module")
def address(study):
    """The page that `mpo-study ui` names, up and running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_cli("ui", study, "--port", str(port), cwd=study.parent)
    try:
        yield server.stdout.readline().removeprefix("MLflow: ").strip()
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=300)


def text_of(browser):  # noqa: F811
    return browser.find_element(By.TAG_NAME, "body").text


def wait_for(browser, *words):  # noqa: F811
    """Wait until the page shows all of these."""
    WebDriverWait(browser, PATIENCE).until(
        lambda page: all(word in text_of(page) for word in words), f"the page does not show all of {words}"
    )


def page_of(address, run):
    """A run's own page."""
    root, _, _ = address.partition("/#/")
    return f"{root}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def test_ui_lists_trials_with_their_seeds_folded_under_them(browser, address, tmp_path):  # noqa: F811
    browser.get(address)
    names = ("mpo χ=2", "mpo χ=4", "tuned χ=2", "dense d_model=8", "wild d_model=8")
    wait_for(browser, *names)
    keep_screenshot(browser, tmp_path, "runs")
    assert "seed 1" not in text_of(browser)

    expanders = [
        button
        for button in browser.find_elements(By.CSS_SELECTOR, "button[data-component-id*='runnamecellrenderer']")
        if button.is_displayed()
    ]
    assert len(expanders) == len(names)
    expanders[1].click()
    wait_for(browser, "seed 0 of tuned", "seed 1 of tuned")
    keep_screenshot(browser, tmp_path, "runs_unfolded")
    assert text_of(browser).count("seed 0") == 1


def test_ui_shows_a_seeds_params_metrics_and_curve(browser, address, study, tmp_path):  # noqa: F811
    [run] = next(same for key, same in runs_in(study / "mlflow.db").items() if key.endswith("/1/0"))
    browser.get(page_of(address, run))
    wait_for(browser, "seed 0 of mpo χ=2 (trial 1)", "learning_rate", "budget_hash", "final/val_loss")
    keep_screenshot(browser, tmp_path, "seed")
    assert run.data.params["budget_hash"] in text_of(browser)

    browser.get(f"{page_of(address, run)}/model-metrics")
    wait_for(browser, "best", "final")
    browser.find_element(By.CSS_SELECTOR, "input[placeholder='Search metric charts']").send_keys("^val_loss$")
    WebDriverWait(browser, PATIENCE).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path.js-line")
    )
    keep_screenshot(browser, tmp_path, "curve")
    line, *_ = browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path.js-line")
    corners = re.findall(r"-?[\d.]+,-?[\d.]+", line.get_attribute("d") or "")
    assert len(set(corners)) >= 5  # seven evaluations; Plotly leaves out points on a straight line


def test_ui_shows_a_trials_aggregates_and_a_failures_reason(browser, address, study, tmp_path):  # noqa: F811
    runs = runs_in(study / "mlflow.db")
    [trial] = next(same for key, same in runs.items() if key.endswith("/1") and key.count("/") == 1)
    browser.get(page_of(address, trial))
    wait_for(browser, "mpo χ=2 (trial 1)", schema.mean_key("final/val_loss"), schema.N_SEEDS)
    keep_screenshot(browser, tmp_path, "trial")

    [failed] = next(same for key, same in runs.items() if same[0].info.status == "FAILED" and key.endswith("/0"))
    browser.get(page_of(address, failed))
    wait_for(browser, "seed 0 of wild d_model=8", "Failed", "diverged")
    keep_screenshot(browser, tmp_path, "failed")
