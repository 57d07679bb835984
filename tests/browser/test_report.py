# SPDX-License-Identifier: Apache-2.0
"""Reports in a real browser: quiet, quick, legible, and unmoved by what stands in prompts and responses."""

import re
import shutil
from pathlib import Path

import pytest

from tests.benchmarks.report_logs import LogPlan, write_log
from verl_gradalign.report.html import write_report
from verl_gradalign.report.run import find_runs, read_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

MIN_CONTRAST = 4.5  # WCAG 2 AA
MIN_TEXT_PX = 12
MAX_FIRST_PAINT_MS = 1000
ATTACK = (
    "</pre></details><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
    "<svg onload=window.hacked=3><a href='javascript:window.hacked=4'>{id}</a> <iframe src='http://example.com/'>"
    "<style>body{{display:none}}</style><meta http-equiv=refresh content='0;url=http://example.com/'> "
    "{{{{ 7 * 7 }}}} \x00\x1b[31m\u202eevil\u2066\u200b \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600 "
    "&amp;&lt; "
)
HOSTILE_NAME = "<b onmouseover=window.hacked=5>$\\frac{1}{0}$ \u202e \U0001f600</b>"

# Contrast of text with the nearest background that is not transparent, and sizes, of all elements that have text.
LEGIBILITY = """() => {
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own) continue;
    const style = getComputedStyle(e), a = light(parse(style.color)), b = light(behind(e));
    found.push({tag: e.tagName, text: e.textContent.trim().slice(0, 40), size: parseFloat(style.fontSize),
      contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)});
  }
  return found;
}"""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNSEEN_PROMPTS = """[...document.querySelectorAll('details pre')].filter(
  e => !e.checkVisibility({contentVisibilityAuto: true}) || e.getBoundingClientRect().height < 10).length"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of an ordinary run, of one full of hostile text, of one with damage, and of all of them."""
    folder = tmp_path_factory.mktemp("runs")
    plan = {"num_steps": 30, "num_candidates": 60, "num_problems": 150, "mislabelled": 0.1}
    write_log(folder / "ordinary" / "gradalign", LogPlan(**plan))
    write_log(
        folder / HOSTILE_NAME.replace("/", "|") / "gradalign",
        LogPlan(
            **plan,
            sources=(HOSTILE_NAME, "_b", "$", "\u4f60\u597d", "x" * 300),
            columns={HOSTILE_NAME: ("</td><script>window.hacked=6</script>", "\u202e", "")},
            prompt=ATTACK + "x" * 1_000_000,
            response=ATTACK * 3 + "{sum}",
            version="<i>9</i>",
            num_samples=4,
        ),
    )
    write_log(folder / "damaged" / "gradalign", LogPlan(**plan, planned_steps=90))
    (folder / "damaged" / "gradalign" / "selection-00000011-00000020.parquet").write_bytes(b"<script>window.hacked=7")
    runs = [read_run(run) for run in find_runs([folder])]
    made = {run.folder.parent.name: [run] for run in runs} | {"all": runs}
    names = {"ordinary": "ordinary", "damaged": "damaged", "all": "all"}
    return {
        names.get(name, "hostile"): write_report(some, folder / f"{number}.html", top=10)
        for number, (name, some) in enumerate(made.items())
    }


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a report, and let the test fail if anything but the file itself was asked for, or an error was printed."""
    pages, wrong = [], []

    def open_report(path, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if not is_own(request.url, path) else None)
        page.goto(Path(path).as_uri(), wait_until="load")
        return page

    yield open_report
    assert wrong == []
    for page in pages:
        page.close()


def is_own(url, path):
    return url.split("#")[0] == Path(path).as_uri() or url.startswith("data:")


KINDS = ["ordinary", "hostile", "damaged", "all"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_quiet_and_asks_for_nothing(reports, visit, kind):
    page = visit(reports[kind])
    page.mouse.wheel(0, 20_000)
    for link in page.query_selector_all("nav a"):
        link.click()
    for summary in page.query_selector_all("summary"):
        summary.click()
    page.wait_for_timeout(100)
    assert all(page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)"))
    assert page.evaluate("document.images.length") >= 10


def test_the_first_paint_is_below_a_second(reports, visit):
    paints = []
    for _ in range(3):
        page = visit(reports["all"])
        # wait_for_function would be stopped by the page's own policy once it has to poll.
        while (paint := page.evaluate(FIRST_PAINT)) is None:
            page.wait_for_timeout(20)
        paints.append(paint)
    assert sorted(paints)[1] < MAX_FIRST_PAINT_MS, paints


@pytest.mark.parametrize("kind", KINDS)
def test_all_text_is_large_and_dark_enough(reports, visit, kind):
    page = visit(reports[kind])
    texts = page.evaluate(LEGIBILITY)
    assert len(texts) > 100
    assert [text for text in texts if text["contrast"] < MIN_CONTRAST or text["size"] < MIN_TEXT_PX] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(reports, visit, kind, width):
    page = visit(reports[kind], width)
    for summary in page.query_selector_all("summary"):
        summary.click()
    assert page.evaluate(OVERFLOW) <= 0


@pytest.mark.parametrize("kind", ["hostile", "all"])
def test_nothing_is_wider_than_paper(reports, visit, kind):
    page = visit(reports[kind], 688)  # A4 without its margins
    page.emulate_media(media="print")
    assert page.evaluate(OVERFLOW) <= 0


def test_text_in_figures_is_legible_on_a_laptop(reports, visit):
    page = visit(reports["ordinary"])
    sizes = page.evaluate("""async () => Promise.all([...document.images].map(async image => {
      const text = atob(image.src.split(',')[1]);
      const width = parseFloat(text.match(/<svg[^>]* width="([\\d.]+)pt"/)[1]);
      const fonts = [...text.matchAll(/font: ([\\d.]+)px/g)].map(match => parseFloat(match[1]));
      return Math.min(...fonts) * image.getBoundingClientRect().width / width;
    }))""")
    assert len(sizes) >= 10 and min(sizes) >= MIN_TEXT_PX


def test_hostile_text_is_shown_and_does_nothing(reports, visit):
    page = visit(reports["hostile"])
    for summary in page.query_selector_all("summary"):
        summary.click()
    page.mouse.move(200, 60)
    assert page.evaluate("window.hacked") is None
    assert page.query_selector_all("script, iframe, object, embed, form, body svg, [onerror], [onload]") == []
    shown = page.inner_text("details[open] pre")
    for part in ("<script>window.hacked=1</script>", "<iframe", "{{ 7 * 7 }}", "[U+202E]evil", "\u2400\u241b[31m"):
        assert part in shown
    for part in ("\u0645\u0631\u062d\u0628\u0627", "\u4f60\u597d", "\U0001f600", "&amp;&lt;"):
        assert part in shown
    assert "Cut: the first" in page.inner_text("details[open]")
    assert HOSTILE_NAME.replace("/", "|").replace("\u202e", "[U+202E]") in page.inner_text("h1")
    assert "</td><script>" in page.inner_text("body")
    assert page.is_visible("text=What is missing")


def test_damage_is_said_at_the_top(reports, visit):
    page = visit(reports["damaged"])
    box = page.query_selector(".missing")
    assert box.bounding_box()["y"] < 800
    said = box.inner_text()
    assert "selection-00000011-00000020.parquet" in said
    assert "Steps 11 to 20 are missing" in said and "30 of 90 steps" in said


def test_suspicious_problems_are_closed_on_the_screen_and_open_on_paper(reports, visit):
    page = visit(reports["ordinary"])
    assert page.evaluate("document.querySelectorAll('details').length") == 10
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    assert page.evaluate(UNSEEN_PROMPTS) > 0
    page.emulate_media(media="print")
    # Styles of another medium hold from the next frame on: what is evaluated before it may still see the screen's.
    page.wait_for_function(f"{UNSEEN_PROMPTS} === 0", timeout=10_000)
    assert page.evaluate("[...document.querySelectorAll('pre')].every(e => e.scrollHeight <= e.clientHeight + 1)")
    assert not page.is_visible("nav")


def test_it_prints_with_the_texts_of_the_suspicious_problems(reports, visit):
    page = visit(reports["ordinary"])
    whole = page.pdf(prefer_css_page_size=True)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert num_pages(page.pdf(prefer_css_page_size=True)) == num_pages(whole)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.remove())")
    without = page.pdf(prefer_css_page_size=True)
    assert whole.startswith(b"%PDF") and num_pages(whole) > num_pages(without) >= 3


def num_pages(pdf):
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))


def test_tables_wider_than_a_phone_scroll_in_a_box_of_their_own(reports, visit):
    page = visit(reports["all"], 390)
    assert page.evaluate("[...document.querySelectorAll('.box')].some(box => box.scrollWidth > box.clientWidth)")
