"""The demonstration page, in a real browser."""

from __future__ import annotations

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from serving_helpers import EchoEngine, serving, writer

from prlhf_lightning.data.feedback_log import FeedbackLog
from prlhf_lightning.serving.services import Services

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def log(tmp_path):
    return FeedbackLog(str(tmp_path / "feedback.db"))


@pytest.fixture
def page(browser, log):
    with serving(Services(writer(), EchoEngine, log)) as url:
        browser.get(url)
        wait(browser, lambda _: len(texts(browser)) == 3)
        yield browser


def wait(browser, condition):
    return WebDriverWait(browser, 10).until(condition)


def texts(browser):
    return [card.text for card in browser.find_elements(By.CSS_SELECTOR, ".card .text")]


def ask(browser, prompt):
    box = browser.find_element(By.ID, "prompt")
    box.clear()
    box.send_keys(prompt)
    browser.find_element(By.ID, "send").click()
    wait(browser, lambda _: all(text.endswith(prompt) for text in texts(browser)))
    wait(browser, lambda _: not browser.find_elements(By.CSS_SELECTOR, ".writing"))


def test_the_page_answers_for_two_users_and_for_nobody(page):
    ask(page, "say <b>this</b>")
    assert texts(page) == ["ann: say <b>this</b>", "team-a-1: say <b>this</b>", "None: say <b>this</b>"]
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_what_is_better_becomes_pairs_of_the_judge(page, log):
    ask(page, "which")
    page.find_elements(By.CSS_SELECTOR, "#judges input")[1].click()
    page.find_elements(By.CLASS_NAME, "better")[0].click()
    wait(page, lambda _: log.extent().rows == 2)
    page.find_elements(By.CLASS_NAME, "thumb")[0].click()
    wait(page, lambda _: log.extent().rows == 3)
    pairs = [(row["user_id"], row["prompt"], row["chosen"], row["rejected"]) for _, row in log.pairs()]
    assert pairs == [("team-a-1", "which", "ann: which", other) for other in ("team-a-1: which", "None: which")]


class Endless(EchoEngine):
    """Never comes to an end for user team-a-1."""

    def add(self, generation):
        number = super().add(generation)
        if generation.user == "team-a-1":
            self.waiting[number] = ["on "] * 10_000
        return number


def test_an_answer_that_is_still_being_written_is_not_judged(browser, log):
    with serving(Services(writer(), lambda: Endless(0.01), log)) as url:
        browser.get(url)
        wait(browser, lambda _: len(texts(browser)) == 3)
        browser.find_element(By.ID, "send").click()
        wait(browser, lambda _: [b.is_displayed() for b in browser.find_elements(By.CLASS_NAME, "better")] == [1, 0, 1])
        browser.find_elements(By.CLASS_NAME, "better")[0].click()
        wait(browser, lambda _: "Kept as a vote" in browser.find_element(By.ID, "notice").text)
        browser.get("about:blank")
    assert [row["rejected"][:5] for _, row in log.pairs()] == ["None:"]


def test_the_page_has_a_new_user_learned_where_that_is_possible(browser, log):
    taught = {}
    with serving(
        Services(writer(), EchoEngine, log, learner=lambda user, rows, between: taught.update({user: rows}))
    ) as url:
        browser.get(url)
        wait(browser, lambda _: len(texts(browser)) == 3)
        ask(browser, "which")
        browser.find_elements(By.CLASS_NAME, "better")[0].click()
        wait(browser, lambda _: log.extent().rows == 2)
        browser.find_element(By.ID, "learn").click()
        wait(browser, lambda _: "Learned from 2 votes" in browser.find_element(By.ID, "notice").text)
    assert [row["chosen"] for row in taught["you"]] == ["ann: which"] * 2


def test_line_breaks_are_kept_and_text_has_its_own_direction(page):
    box = page.find_element(By.ID, "prompt")
    box.clear()
    page.execute_script("arguments[0].value = '\u0634\u0643\u0631\u0627\\n\u0646\u0639\u0645'", box)
    page.execute_script("document.querySelector('.card .text').textContent = arguments[0].value", box)
    text = page.find_element(By.CSS_SELECTOR, ".card .text")
    assert "\n" in text.text
    for element in (box, text):
        assert page.execute_script("return getComputedStyle(arguments[0]).direction", element) == "rtl"


def test_every_control_has_a_name(page):
    ask(page, "anything")
    for control in page.find_elements(By.CSS_SELECTOR, "main button, main input, main textarea"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")


def test_the_page_fits_a_phone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    name = page.find_element(By.ID, "user-b")
    name.clear()
    name.send_keys("somebody.with.a.long.address+tag@subdomain.example-company.international\t")
    ask(page, "a" * 200)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
