"""The report's page shows all text as text, needs no network, and works in a real browser."""

import re
import shutil

import pytest

from reprotune.records import write_parquet
from tests.browser import Browser
from tests.comparison.cells import SAMPLE
from tests.report.written import make_report, unquantized, write_run

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> "
    "\u202egnp.exe\u202c & <b>bold</b>"
)
GENERATED = SAMPLE | {"choices": None, "log_probs": None}


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    """A page whose samples, title and note try to be more than text. On the second row only DPO is right."""
    folder = tmp_path_factory.mktemp("page")
    settings = unquantized(world, title=f"Title {HOSTILE}", note=HOSTILE)
    metrics = write_run(settings, folder)
    hostile = {"doc_id": 0, "correct": 1.0, "predicted": "0", "prompt": HOSTILE, "generation": HOSTILE}
    long = {
        "doc_id": 3,
        "correct": 0.0,
        "predicted": "1",
        "prompt": "x" * 100_000 + "the end",
        "generation": "y" * 100_000,
    }
    for model in ("base", "sft", "dpo"):
        rows = [GENERATED | hostile, GENERATED | long | ({"correct": 1.0} if model == "dpo" else {})]
        write_parquet(folder / "evals" / model / "gsm8k.parquet", rows)
    make_report(settings, metrics, folder / "report")
    return folder / "report" / "report.html"


@pytest.fixture
def browser(page):
    if not shutil.which("chromium"):
        pytest.skip("no chromium")
    with Browser(f"file://{page}#benchmark=gsm8k&change=all") as opened:
        yield opened
        assert not opened.errors


def count(browser: Browser) -> str:
    """The line that says which sample is shown, of how many."""
    return browser.run("document.getElementById('count').textContent")


def row(browser: Browser) -> str:
    return browser.run("document.querySelector('#sample h3').textContent")


def show(browser: Browser, address: str, start: str) -> None:
    """Go to an address, and wait until the count starts like this."""
    browser.run(f"location.hash = '{address}'; 0")
    browser.wait(f"document.getElementById('count').textContent.startsWith('{start}')")


def column(browser: Browser, number: int) -> list[str]:
    """A column of the first table."""
    return browser.run(
        f"[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[{number}].textContent)"
    )


def test_the_page_needs_nothing_and_allows_nothing(page):
    text = page.read_text()
    assert len(text) < 1_000_000, "long texts are cut"
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text.replace(HOSTILE, ""))
    assert "://" not in re.sub(r"data:[^\"]*", "", text)
    assert text.count("<script") == 2 and "default-src &#39;none&#39;;" in text and "unsafe" not in text


def test_hostile_text_is_shown_as_text(browser):
    assert browser.run("document.title") == f"Title {HOSTILE}"
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('main img').length") == 6
    assert browser.run("[...document.images].every((image) => image.naturalWidth > 100)")
    assert browser.run("document.querySelector('#sample .text').textContent") == HOSTILE
    classes = (
        "[...document.querySelectorAll('#sample .models section')].map((answer) => answer.className).join()"
    )
    assert browser.run(classes) == "right,right,right"
    assert count(browser) == "1 / 2 here, of 2"


def test_keys_go_through_samples(browser):
    previous = "document.querySelector('button[name=previous]').getAttribute('aria-disabled')"
    assert browser.run(previous) == "true"
    browser.press("ArrowRight", 39)
    assert count(browser).startswith("2 / 2 here") and "place=1" in browser.run("location.hash")
    shown = browser.run("document.querySelector('#sample .text').textContent")
    assert shown.startswith("[… 96,007 characters]") and shown.endswith("the end") and len(shown) < 5000
    show(browser, "benchmark=gsm8k&change=dpo_vs_sft_better", "1 / 1 here")
    assert row(browser) == "Row 3"
    browser.press("k", 75)
    assert row(browser) == "Row 3", "there is nothing before the first"


def test_samples_are_filtered_by_address(browser):
    # the search looks in what was written, not in how the page stores it
    show(browser, "benchmark=gsm8k&change=all&text=onerror", "1 / 1 here, of 2")
    show(browser, "benchmark=gsm8k&change=all&text=correct", "No such row")
    browser.run("location.hash = 'benchmark=arc_challenge&change=all'; 0")
    browser.wait("document.querySelectorAll('#sample bdi').length === 6")
    assert browser.run("document.querySelector('#sample .chosen').textContent") == " sleeps (-1.00)"
    show(browser, "benchmark=arc_challenge&change=dpo_vs_base_worse&text=nonsense", "No such row")


def test_tables_sort_and_fit_a_phone(browser):
    browser.run("document.querySelector('th button').focus(); 0")
    names = column(browser, 0)
    for order in (sorted(names), sorted(names, reverse=True)):
        browser.press("Enter", 13, "\r")
        assert column(browser, 0) == order
    browser.run("document.querySelectorAll('table')[0].querySelectorAll('th button')[3].click(); 0")
    scores = [float(text.split()[0]) for text in column(browser, 3)]
    assert scores == sorted(scores)
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True
    )
    assert browser.run("document.documentElement.scrollWidth") <= 360
