"""The report in a real browser, without a network."""

import json
import os
import shutil

import pytest

from semcons_ray.reporting import write_report
from tests.reporting.builder import HOSTILE, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("SEMCONS_REQUIRE_CHROMIUM") == "1":
            pytest.fail("SEMCONS_REQUIRE_CHROMIUM=1, but chromium or chromedriver is not on the PATH")
        pytest.skip("chromium or chromedriver is not on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1280,900")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """A report of 3 rounds and 25 prompts, prompt 7 hostile, in the browser; logs begin with it."""

    def answer(round, prompt, client):
        return HOSTILE if prompt == 7 else f"answer {client % 2} to {prompt} in {round}"

    folder = write_run(tmp_path / "run", num_clients=4, num_rounds=3, num_prompts=25, lost={2: (1,)}, answer=answer)
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(write_report(folder).as_uri())
    return browser


def texts(browser, selector):
    # By script: what is read off the screen would depend on the fonts that are installed.
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector
    )


def choose(browser, name, value):
    browser.execute_script(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def requests(browser):
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def test_it_opens_without_errors_and_asks_for_nothing(opened):
    assert opened.get_log("browser") == []
    asked = [url for url in requests(opened) if not url.startswith("data:")]
    assert len(asked) == 1
    assert asked[0].endswith("/report.html")


def test_all_figures_are_drawn(opened):
    assert len(texts(opened, "figure svg")) == 9
    sizes = opened.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => [svg.clientWidth, svg.clientHeight])"
    )
    assert all(width > 300 and height > 100 for width, height in sizes)


def test_the_prompt_table_filters(opened):
    assert texts(opened, "#count") == ["25 of 25 prompts in round 3"]
    assert len(texts(opened, "#answers tbody tr")) == 20
    opened.find_element("id", "next").click()
    assert len(texts(opened, "#answers tbody tr")) == 5

    opened.find_element("id", "search").send_keys("Question 12")
    assert texts(opened, "#count") == ["1 of 25 prompts in round 3"]
    assert texts(opened, "#answers .said") == ["answer 1 to 12 in 3✓ chosen, client 3", "answer 0 to 12 in 3"]
    assert texts(opened, "#answers .reference") == ["Reference: reference 12"]
    choose(opened, "round", "1")
    assert texts(opened, "#answers .said")[0] == "answer 1 to 12 in 1✓ chosen, client 1"

    choose(opened, "search", "")
    choose(opened, "show", "abstained")
    assert texts(opened, "#answers .question") == ["question 0?"]
    assert texts(opened, "#answers .abstained") == ["abstained"]
    choose(opened, "show", "labelled")
    assert texts(opened, "#count") == ["24 of 25 prompts in round 1"]
    choose(opened, "winner", "2")  # prompts 1, 5, 9, 13, 17, 21
    assert texts(opened, "#count") == ["6 of 25 prompts in round 1"]
    choose(opened, "order", "high")
    assert texts(opened, "#answers .question")[0] == "question 21?"
    choose(opened, "search", "no such text")
    assert texts(opened, "#count") == ["0 of 25 prompts in round 1"]
    assert opened.get_log("browser") == []


def test_hostile_answers_are_shown_and_not_run(opened):
    choose(opened, "search", "<script>")
    assert texts(opened, "#answers .said")[0].startswith(HOSTILE)
    assert opened.title == "semantic-consensus: 3 of 3 rounds"
    assert opened.execute_script("return document.querySelectorAll('img').length") == 0


def test_the_policy_stops_scripts_and_requests(opened):
    blocked = opened.execute_async_script(
        """
        const done = arguments[arguments.length - 1], seen = [];
        document.addEventListener("securitypolicyviolation", event => {
          seen.push(event.effectiveDirective);
          if (seen.length === 3) done(seen);
        });
        const script = document.createElement("script");
        script.textContent = "window.owned = true";
        document.body.append(script);
        fetch("http://127.0.0.1:9/").catch(() => {});
        new Image().src = "http://127.0.0.1:9/x.png";
        """
    )
    assert sorted(blocked) == ["connect-src", "img-src", "script-src-elem"]
    assert opened.execute_script("return window.owned === undefined")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_hangs_over_the_edge_and_text_stands_out(opened, width, theme):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        over = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert opened.execute_script(over) == 0
        ink, paper = opened.execute_script(
            """
            const light = colour => colour.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0);
            const style = selector => getComputedStyle(document.querySelector(selector));
            return [light(style("figure svg text").fill), light(style("figure").backgroundColor)];
            """
        )
        assert (ink < 200 and paper > 700) if theme == "light" else (ink > 600 and paper < 150)
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
