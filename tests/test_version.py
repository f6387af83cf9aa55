"""One version for the whole project: where it is written, and where a user finds it."""

import json
import re
import subprocess
import sys
from importlib import import_module

import onnx
import pytest

import common
from common import export
from common.npu import checkpoint
from tests.common.test_run import RECIPE, parts_of, start, train
from tests.scripts import ROOT

ENTRY_SCRIPTS = (
    "ssd_mmdet.train",
    "ssd_resnet34.evaluate",
    "ssd_resnet34.tfrecord.train",
    "m2det.demo",
    "fcos.pthtar2onx",
)


def test_the_version_is_that_of_the_newest_entry_in_the_changelog():
    headings = re.findall(r"^## .+$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "## [Unreleased]"]
    assert re.fullmatch(rf"## \[{re.escape(common.__version__)}\] - \d{{4}}-\d\d-\d\d", released[0])
    assert all(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - [\d-]{10}", line) for line in released)


def test_the_package_has_the_same_version():
    code = "from setuptools import Distribution as D; d = D(); d.parse_config_files()"
    command = [sys.executable, "-c", f"{code}; print(d.get_version())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == common.__version__, done.stderr


@pytest.mark.parametrize("program", ENTRY_SCRIPTS)
def test_programs_print_it(program, capsys):
    with pytest.raises(SystemExit, match="0"):
        import_module(program).main(["--version"])
    assert capsys.readouterr().out == f"onestage {common.__version__}\n"


def test_a_run_leaves_it_in_its_log_and_its_checkpoints(tmp_path):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    (lines,) = tmp_path.glob("*.log.json")
    header = json.loads(lines.read_text().splitlines()[0])
    assert header["env_info"].startswith(f"onestage {common.__version__}, ")
    assert f"onestage {common.__version__}, " in run.log.text_path.read_text()
    assert checkpoint.load(tmp_path / "iter_1.pt")["onestage_version"] == common.__version__


def test_an_exported_file_has_it_in_its_metadata():
    body = onnx.helper.make_graph([], "empty", [], [])
    graph = onnx.helper.make_model(body)
    export.describe(graph, {"unit": "pixels"}, RECIPE, ("batch_size",))
    notes = {entry.key: entry.value for entry in graph.metadata_props}
    assert notes == {
        "unit": "pixels",
        "onestage_version": common.__version__,
        "batch_size": "2",
    }
