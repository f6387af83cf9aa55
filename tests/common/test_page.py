"""The page of a run: what it shows of a folder, and that names from users stay text."""

import base64
import io
import json

import pytest
from PIL import Image

from common.coco import page
from common.coco.page import write_report
from common.errors import UserError
from tests.pages import CLASSES, FILES, RECORD, Page, write_evaluation, write_log


@pytest.fixture
def run(tmp_path):
    """A folder with all files, and the page that was written of it."""
    write_log(tmp_path)
    write_evaluation(tmp_path)
    lines = []
    write_report(tmp_path, 34_300_000, lines.append)
    assert lines == [f"report: {tmp_path}/report.html"]
    return tmp_path


def test_a_page_has_a_part_for_every_file_of_the_folder(run):
    content = Page(run / "report.html")
    assert list(content.sections) == [name for name, _ in page.SECTIONS]
    links = [attributes["href"] for attributes in content.attributes("a")]
    assert links == [f"#{name}" for name in content.sections]
    summary = content.sections["summary"]
    for text in ("0.4321", "0.6789", "0.370", "51.2", "2 h 3 min", "34.3 M", "100"):
        assert text in summary
    assert summary.count("2 images are <small>") == 1  # said twice
    assert "0.2500" in content.sections["errors"]
    assert "no label" in content.sections["suspects"]
    programs = content.sections["programs"]
    assert "2026-01-02 03:04:05" in programs
    for text in ("cd /data && python3 train.py '--data=<b>'", "555, python 3.11, torch 2.13", "O0"):
        assert text in programs
    assert "name = 'SSD<300>'\nlr = 0.1" in programs
    assert "/data/<b>/train.json" in programs
    assert len([1 for attributes in content.attributes("svg") if "role" not in attributes]) == 4


def test_a_page_asks_for_nothing(run):
    content = Page(run / "report.html")
    for _, attributes in content.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            address = attributes.get(name, "#") or "#"
            assert address.startswith(("#", "data:image/", "data:,"))
    assert "url(http" not in (run / "report.html").read_text()
    ids = [attributes["id"] for _, attributes in content.elements if "id" in attributes]
    of_svg = [name for name in ids if name[:1] in "pm" and name[1:].isalnum()]
    assert len(set(ids) - set(of_svg)) == len([name for name in ids if name not in of_svg])


def test_names_from_users_stay_text(run):
    content = Page(run / "report.html")
    # Ours: the JSON of the curves and the script; three pictures and the place of a large one.
    assert len(content.attributes("script")) == 2
    assert len(content.attributes("img")) == 4
    assert not content.attributes("b")
    for name in CLASSES:
        assert name in content.sections["classes"]
        assert name in content.sections["confusion"]
    assert FILES[0] in content.sections["worst_images"]
    # A byte of a file name that is no UTF-8 is escaped.
    assert r"bild_\udcff.jpg" in content.sections["worst_images"]
    text = (run / "report.html").read_text()
    start = text.index('id="pr-curves">') + len('id="pr-curves">')
    curves = json.loads(text[start : text.index("</script>", start)])
    assert [curve["name"] for curve in curves] == CLASSES


def test_a_class_without_boxes_has_no_figures_and_no_curve(run):
    content = Page(run / "report.html")
    rows = content.attributes("tr")
    assert len([1 for attributes in rows if "data-curve" in attributes]) == len(CLASSES)
    assert "absent" in content.sections["classes"]


def test_pictures_lie_in_the_page_in_the_smaller_format(run, tmp_path):
    content = Page(run / "report.html")
    for attributes in content.attributes("img")[:3]:
        kind, _, data = attributes["src"].partition(";base64,")
        assert kind == "data:image/jpeg"  # of noise
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (400, 160)
    assert page.embedded(Image.new("RGB", (300, 300))).startswith("data:image/png")


def test_a_page_of_80_classes_is_not_large(tmp_path):
    write_log(tmp_path)
    write_evaluation(tmp_path, classes=[f"class {k}" for k in range(80)], images=1)
    write_report(tmp_path, 1, print)
    pictures = sum(len(a.get("src", "")) for a in Page(tmp_path / "report.html").attributes("img"))
    assert (tmp_path / "report.html").stat().st_size - pictures < 1_000_000


def test_what_is_not_there_is_left_out(tmp_path):
    write_log(tmp_path)
    write_report(tmp_path, 1, print)
    content = Page(tmp_path / "report.html")
    assert list(content.sections) == ["summary", "curves", "data", "speed", "programs"]
    assert "train.py --check_data" in content.sections["data"]
    assert "Nothing was evaluated" in content.sections["summary"]
    assert "evaluate.py --benchmark" in content.sections["speed"]


def test_the_analysis_of_another_evaluation_is_left_out(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["best_f1"]["score"] = 0.41
    (run / "metrics.json").write_text(json.dumps(metrics))
    write_report(run, 1, print)
    sections = Page(run / "report.html").sections
    assert "classes" in sections
    assert not {"confusion", "errors", "worst_images", "suspects"} & sections.keys()


def test_the_page_of_an_evaluation_names_its_program(tmp_path):
    write_evaluation(tmp_path)
    program = {**RECORD, "recipe": {"name": "FCOS"}, "checkpoint": "a/best.pt"}
    write_report(tmp_path, 1, print, program)
    content = Page(tmp_path / "report.html")
    assert "curves" not in content.sections
    assert "a/best.pt" in content.sections["programs"]
    assert "<title>FCOS</title>" in (tmp_path / "report.html").read_text()


def test_an_evaluation_may_lie_in_another_folder(tmp_path):
    write_log(tmp_path)
    (tmp_path / "eval").mkdir()
    write_evaluation(tmp_path / "eval")
    write_report(tmp_path, 1, print, evaluation_folder=tmp_path / "eval")
    content = Page(tmp_path / "report.html")
    assert {"curves", "classes", "worst_images"} <= content.sections.keys()


def test_the_data_are_described(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_evaluation(folder)
    Image.new("RGB", (20, 10)).save(tmp_path / "run_check_data.png")
    write_report(folder, 1, print)
    content = Page(folder / "report.html")
    for text in ("50 images, 46 boxes and 5 classes", "1 of them has fewer than 10", "absent (0)"):
        assert text in content.sections["data"]
    assert "--check_data" not in content.sections["data"]
    assert len(content.attributes("img")) == 5


def test_a_measured_speed_is_shown(tmp_path):
    write_evaluation(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    percentiles = {"prepare": [1, 2, 3], "network": [21.5, 22, 23], "detect": [1, 2, 3]}
    metrics["benchmark"] = {
        "device": "cpu", "precision": "O0", "flops": 30e9, "input": [300, 300],
        "batches": [
            {
                "batch_size": 8, "images_per_second": 41.26, "memory_mib": 900,
                "percentiles": percentiles,
            }
        ],
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_report(tmp_path, 1, print)
    speed = Page(tmp_path / "report.html").sections["speed"]
    for text in ("30.0 GFLOPs", "41.3", "21.5"):
        assert text in speed


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        write_report(tmp_path, 1, print)


def test_a_broken_file_is_named(run):
    (run / "metrics.json").write_text('{"AP": 0.')
    with pytest.raises(UserError, match=r"metrics.json is not JSON .*; delete it, or evaluate"):
        write_report(run, 1, print)


def test_other_files_with_such_a_name_are_no_records(run):
    (run / "run_notes.json").write_text('{"who": "me"}')
    (run / "runs.json").write_text("[")
    write_report(run, 1, print)
    assert "2026-01-02 03:04:05" in Page(run / "report.html").sections["programs"]
