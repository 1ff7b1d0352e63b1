"""The report in a real browser, with scripts off: a person reads the verdict and picks a concept.

`make test-browser`; needs Debian's chromium and chromium-driver.
"""

import pytest
from records import BASELINE, LEVELS, SPREAD, make_record

from calibrate import report
from calibrate.audit import readers, verdict
from calibrate.audit.profile import TokenTrace
from calibrate.report import profile

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync",
                 "disable-component-update", "no-first-run", "window-size=1000,900"):  # fmt: skip
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def test_the_verdict_is_read_and_the_concept_chosen(browser, planted, tmp_path):
    """The second token reads +4 sigma desperate (full red) and -2 calm (half blue)."""
    planted.set_band([2], "by hand")
    trace = TokenTrace("alder/failing", "ab", [(0, 1), (1, 2)], ["user", "reply"],
                       {"desperate": [0.0, 4.0], "calm": [0.0, -2.0]})  # fmt: skip
    header = {"failing": {0: LEVELS + 0.5 + SPREAD}, "passing": {0: LEVELS}}
    records = [make_record(planted, BASELINE), make_record(planted, header)]
    before, after = (
        r._replace(contexts=r.contexts._replace(profile=r.profile._replace(traces=[trace]))) for r in records
    )
    change = readers.compare(before, after)
    judged = verdict.judge(change.figures)
    report.write(tmp_path, judged, before, after, change, {}, {})
    browser.get((tmp_path / "report.html").as_uri())
    by_css = lambda query: browser.find_elements("css selector", query)  # noqa: E731
    assert by_css("#verdict")[0].text == f"Verdict: {judged.outcome}"
    second = by_css(".trace span")[1]
    assert second.text == "b"
    assert "rgb(181, 68, 46)" in second.value_of_css_property("background-image")  # opaque: no alpha is written
    by_css("label[for=pick1]")[0].click()
    image = second.value_of_css_property("background-image")
    assert "rgba(31, 95, 168, 0.5)" in image
    assert "rgba(181, 68, 46, 0)" in image
    assert browser.get_log("browser") == []  # nothing was refused or not found
    width = by_css("html")[0]
    assert int(width.get_property("scrollWidth")) <= int(width.get_property("clientWidth"))  # no sideways scrolling


def test_a_profile_is_read_and_the_concept_chosen(browser, planted, tmp_path):
    """The scenarios read 0; the first and only token of the transcript reads +4 sigma desperate and -2 calm."""
    planted.set_band([2], "by hand")
    trace = TokenTrace("alder/failing", "b", [(0, 1)], ["reply"], {"desperate": [4.0], "calm": [-2.0]})
    record = make_record(planted, BASELINE)
    found = record.contexts.profile._replace(traces=[trace])
    profile.write(tmp_path, record._replace(contexts=record.contexts._replace(profile=found)))
    browser.get((tmp_path / "profile.html").as_uri())
    by_css = lambda query: browser.find_elements("css selector", query)  # noqa: E731
    assert by_css("#profile")[0].text == "Emotional profile of planted"
    (token,) = by_css(".trace span")
    assert "rgb(181, 68, 46)" in token.value_of_css_property("background-image")
    by_css("label[for=pick1]")[0].click()
    assert "rgba(31, 95, 168, 0.5)" in token.value_of_css_property("background-image")
    by_css("summary")[0].click()
    assert "desperate" in by_css("details[open] td")[1].text
    assert by_css("td.heat")[0].text == "0.00"
    assert browser.get_log("browser") == []
    width = by_css("html")[0]
    assert int(width.get_property("scrollWidth")) <= int(width.get_property("clientWidth"))
