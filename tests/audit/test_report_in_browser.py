"""The report in a real browser: nothing is amiss, every figure shows, no request leaves the file."""

import pytest
from audit_sample import hostile_html, sample_html
from browser import Browser, find_browser


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="apt-get install chromium, or name a browser in CHROME"),
]
SHOWN = """[...document.images].map(i => ({
    loaded: i.complete && i.naturalWidth > 0, width: i.getBoundingClientRect().width, alt: i.alt
}))"""
# Text against what is behind it, by the contrast ratio of the Web Content Accessibility Guidelines.
CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  return Math.min(...[...document.querySelectorAll('p, li span, th, td, dt, dd, h1, h2')].map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def address(browser, tmp_path):
    """Address of the sample's report, opened."""
    file = tmp_path / "report.html"
    file.write_text(sample_html(), encoding="utf-8")
    browser.resize(1100, 900)
    browser.open(file.as_uri())
    return file.as_uri()


def test_nothing_is_amiss_and_no_request_leaves_the_file(browser, address):
    images = browser.evaluate(SHOWN)
    assert len(images) == 11 and all(one["loaded"] and one["width"] > 200 and one["alt"] for one in images)
    assert browser.complaints() == []
    assert [one for one in browser.requests() if one != address and not one.startswith("data:image/svg+xml")] == []


def test_the_browser_reports_a_figure_that_does_not_load(browser, tmp_path):
    """The test above could fail: a page with a missing figure, a request and an error has all three."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png' alt='x'><script>throw Error('amiss')</script>")
    browser.open(page.as_uri())
    assert browser.complaints() and not browser.evaluate(SHOWN)[0]["loaded"]
    assert "http://127.0.0.1:9/x.png" in browser.requests()


def test_the_page_fits_its_window_stands_out_and_prints(browser, address):
    for width in (320, 390, 1100):
        browser.resize(width, 800)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        browser.resize(1100, 900, prefers_color_scheme=scheme)
        assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.pdf().startswith(b"%PDF")


def test_hostile_names_run_nothing(browser, tmp_path):
    (tmp_path / "report.html").write_text(hostile_html(), encoding="utf-8")
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.complaints() == []
    assert not any(name == "Page.javascriptDialogOpening" for name, _ in browser.events)
    assert all(one["loaded"] for one in browser.evaluate(SHOWN))
