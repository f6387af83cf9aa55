"""The pages in a real browser: no request, no complaint, and what their scripts do."""

import pytest

import compare
from common.coco.page import write_report
from tests import scripts
from tests.browser import Browser, find_browser
from tests.pages import CLASSES, write_evaluation, write_log

pytestmark = [
    pytest.mark.again,  # needs a browser, see run_tests.sh
    pytest.mark.skipif(find_browser() is None, reason="no chromium: apt-get install chromium"),
]
CLASS_TABLE = "document.getElementById('class-table')"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run <b> ü")
    write_log(folder)
    write_evaluation(folder)
    write_report(folder, 1, print)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, report):
    browser.open(report)
    return browser


def column(page, number):
    """The texts of a column of the class table, of the rows that are shown."""
    return page.run(
        f"[...{CLASS_TABLE}.tBodies[0].rows].filter(row => !row.hidden)"
        f".map(row => row.cells[{number}].textContent)"
    )


def test_a_page_opens_without_a_request_or_a_complaint(page, report):
    assert page.requests() == [report.resolve().as_uri()]
    assert page.complaints() == []
    assert page.run("document.querySelectorAll('#curves svg').length") == 4
    assert page.run("[...document.images].every(image => image.complete)")


@pytest.mark.parametrize("width", [1280, 400])
def test_a_page_is_no_wider_than_its_window(page, report, width):
    page.resize(width, 900)
    page.open(report)
    assert page.run("document.documentElement.scrollWidth") == width


def test_a_field_filters_the_classes(page):
    page.run(
        "const field = document.querySelector('[data-table=class-table]');"
        "field.value = 'PLAIN'; field.dispatchEvent(new Event('input'))"
    )
    assert column(page, 0) == ["plain"]
    count = "document.querySelector('#classes output').value"
    assert page.run(count) == f"1 of {len(CLASSES) + 1}"


def test_a_click_on_a_head_sorts(page):
    by_ap = f"{CLASS_TABLE}.tHead.rows[0].cells[2].firstChild.click()"
    page.run(by_ap)
    assert column(page, 0) == [*reversed(CLASSES), "absent"]
    page.run(by_ap)
    assert column(page, 0) == ["absent", *CLASSES]
    page.run(f"{CLASS_TABLE}.tHead.rows[0].cells[0].firstChild.click()")
    assert column(page, 0) == page.run(
        f"{[*CLASSES, 'absent']}.sort((a, b) => a.localeCompare(b, undefined, {{numeric: true}}))"
    )


def test_a_picture_opens_large_and_closes(page):
    page.run("document.querySelector('#detections .picture').click()")
    assert page.run("document.getElementById('large').open")
    assert page.run("document.querySelector('#large img').naturalWidth") == 400
    page.run("document.getElementById('large').click()")
    assert not page.run("document.getElementById('large').open")


def test_a_comparison_opens_without_a_request_or_a_complaint(
    browser, detectors, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare, "SECONDS_OF_SPEED", 0.0)
    data = scripts.subset(tmp_path / "coco", train=1, val=2, classes=["person", "cat", "dog"])
    runs = [str(detectors["ssd_resnet34"])] * 2
    compare.main([*runs, f"--data={data}", f"--output_dir={tmp_path}", "--device=cpu"])
    for width in (1280, 400):
        browser.resize(width, 900)
        browser.open(tmp_path / "compare.html")
        assert browser.requests() == [(tmp_path / "compare.html").as_uri()]
        assert browser.complaints() == []
        assert browser.run("document.documentElement.scrollWidth") == width
    browser.run("document.querySelector('#images .picture').click()")
    assert browser.run("document.getElementById('large').open")


def test_a_class_shows_its_curves(page):
    line = "document.querySelector('#pr-lines path').getAttribute('d')"
    first = page.run(line)
    page.run(f"{CLASS_TABLE}.tBodies[0].rows[2].click()")
    assert page.run("document.getElementById('pr-class').selectedOptions[0].text") == CLASSES[2]
    assert page.run(line) not in ("", first)
    assert "best F1 0.610" in page.run("document.getElementById('pr-text').textContent")
    assert page.complaints() == []
