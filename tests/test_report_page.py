"""A report as a reader opens it: in a headless Chromium, from the folder, without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chromium import PATIENCE, browser, keep_screenshot  # noqa: F401 (a fixture)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from analysis.report.report import EXPLORE, INDEX, write_report
from analysis.runs.load import StudyAddress, load_study

sys.path.append(str(Path(__file__).parent / "analysis"))
import simulated_study

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PHONE = (390, 844)
DESK = (1400, 1000)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = simulated_study.configurations()
    uri = simulated_study.write_study(folder, found, n_evaluations=4)
    write_report(load_study(StudyAddress(uri, "tiny")), folder / "report")
    return folder / "report"


def opened(browser, path, size=DESK):  # noqa: F811
    """The page at that size; what the console says and what is asked for from now on is new."""
    browser.set_window_size(*size)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())
    WebDriverWait(browser, PATIENCE).until(
        lambda page: page.execute_script("return document.readyState === 'complete'"), f"{path} does not load"
    )


def complaints(browser):  # noqa: F811
    """Errors on the console. (That Chromium draws by software here is a warning, and no page's fault.)"""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def asked_for(browser):  # noqa: F811
    """Addresses that were fetched, but for what a page holds in itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_report_shows_all_figures_and_fetches_nothing_from_elsewhere(browser, report, tmp_path, size):  # noqa: F811
    opened(browser, report / INDEX, size)
    pictures = browser.find_elements(By.TAG_NAME, "img")
    drawn = sorted(path.name for path in (report / "figures").glob("*.svg"))
    assert sorted(Path(picture.get_attribute("src")).name for picture in pictures) == drawn
    for picture in pictures:
        assert browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 100", picture)
        assert len(picture.get_attribute("alt")) > 40
    assert complaints(browser) == []
    assert {url.rpartition("/report/")[0] for url in asked_for(browser)} == {report.parent.as_uri()}
    wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0  # tables and figures scroll in themselves
    keep_screenshot(browser, tmp_path, f"report_{size[0]}")


def test_contents_open_the_section_that_they_lead_to(browser, report):  # noqa: F811
    opened(browser, report / INDEX)
    section = browser.find_element(By.ID, "comparisons")
    assert not section.is_displayed()
    browser.find_element(By.CSS_SELECTOR, 'nav a[href="#comparisons"]').click()
    WebDriverWait(browser, PATIENCE).until(lambda _: section.is_displayed(), "the section stays folded")


def test_report_answers_on_its_first_screen(browser, report):  # noqa: F811
    opened(browser, report / INDEX)
    image = browser.find_element(By.CSS_SELECTOR, "#frontier_val_loss img")
    assert image.location["y"] + image.size["height"] < DESK[1]
    for question in ("What is on the frontier?", "Does MPO beat its controls of equal parameters?"):
        [heading] = [h for h in browser.find_elements(By.TAG_NAME, "h3") if h.text == question]
        assert heading.location["y"] < DESK[1]


def test_configurations_can_be_pointed_at(browser, report, tmp_path):  # noqa: F811
    opened(browser, report / EXPLORE)
    WebDriverWait(browser, PATIENCE).until(
        lambda page: len(page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .main-svg")) >= 3, "no charts"
    )
    [dense] = browser.find_elements(By.CSS_SELECTOR, "#explore_val_loss .scatterlayer .trace:nth-child(2) .point")
    ActionChains(browser).move_to_element(dense).perform()
    shown = WebDriverWait(browser, PATIENCE).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, "#explore_val_loss .hoverlayer .hovertext"), "nothing is shown"
    )
    assert "808,448 parameters" in shown[0].text
    assert complaints(browser) == []
    assert {url.rpartition("/report/")[0] for url in asked_for(browser)} == {report.parent.as_uri()}
    keep_screenshot(browser, tmp_path, "explore")
