"""download_weights.sh against a server on this machine, and what it says beside the documents."""

import hashlib
import re
import subprocess

import pytest

from tests.downloads import environment, error_of
from tests.scripts import ROOT

SCRIPT = ROOT / "download_weights.sh"
MODELS = ("ssd_mmdet", "ssd_resnet34", "ssd_resnet34/tfrecord", "m2det", "fcos")
BODY = b"weights " * 100
SUM = hashlib.sha256(BODY).hexdigest()
FILE = "fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth"
URL_PATH = f"/mmdetection/v2.0/fcos/fcos_r50_caffe_fpn_gn-head_1x_coco/{FILE}"


def script(*arguments, cwd=ROOT, **more_env):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env={**environment(), **more_env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def download(file_server, tmp_path):
    """Runs the script in `tmp_path` with the server's address, and the sum of `BODY`."""
    file_server.files[URL_PATH] = BODY

    def run(*arguments, **more_env):
        env = {"WEIGHTS_URL": file_server.url, "WEIGHTS_SHA256": SUM, **more_env}
        return script(*arguments, cwd=tmp_path, **env)

    return run


def weights(model):
    """The table of the script for a model: (name, what for, address) of each file."""
    listing = script(model)
    assert listing.returncode == 0, listing.stderr
    return re.findall(r"^(\w+) +(.+)\n {21}(https://\S+)$", listing.stdout, re.MULTILINE)


def test_a_file_is_downloaded_once(download, file_server, tmp_path, path_env):
    first = download("fcos", "gn", **path_env)
    assert first.returncode == 0, first.stderr
    file = tmp_path / "weights" / FILE
    assert file.read_bytes() == BODY
    assert first.stdout.splitlines()[-1] == (
        f"next: bash {ROOT}/fcos/test/train_eval_8p.sh --data_path=coco --checkpoint_path={file}"
    )
    assert [path.name for path in file.parent.iterdir()] == [FILE]

    second = download("fcos", "gn", **path_env)
    assert f"{FILE}: complete" in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert len(file_server.requests) == 1


def test_an_interrupted_download_goes_on(download, file_server, tmp_path, path_env):
    partial = tmp_path / "a b" / f"{FILE}.part"
    partial.parent.mkdir()
    partial.write_bytes(BODY[:100])
    file_server.cut = 50
    result = download("fcos", "gn", "a b", **path_env)
    assert result.returncode == 0, result.stderr
    assert file_server.requests == [(URL_PATH, "bytes=100-"), (URL_PATH, "bytes=150-")]
    assert partial.with_suffix("").read_bytes() == BODY


def test_a_complete_part_is_moved_into_place(download, tmp_path):
    partial = tmp_path / "weights" / f"{FILE}.part"
    partial.parent.mkdir()
    partial.write_bytes(BODY)
    assert download("fcos", "gn").returncode == 0
    assert [path.name for path in partial.parent.iterdir()] == [FILE]


def test_the_digits_in_the_name_are_checked(download, file_server, tmp_path):
    line = error_of(download("fcos", "gn", WEIGHTS_SHA256=""))
    bad = tmp_path / "weights" / f"{FILE}.bad"
    assert f"wrong sha256 sum of {file_server.url}{URL_PATH}, kept as {bad}" in line
    assert f"({SUM} instead of 821213aa)" in line
    assert "WEIGHTS_SHA256=DIGITS" in line
    assert [path.name for path in bad.parent.iterdir()] == [bad.name]

    assert download("fcos", "gn", WEIGHTS_SHA256=SUM[:8]).returncode == 0
    assert [path.name for path in bad.parent.iterdir()] == [FILE]


def test_a_file_that_does_not_fit_is_kept_aside(download, tmp_path):
    file = tmp_path / "weights" / FILE
    file.parent.mkdir()
    file.write_bytes(b"a page of a proxy")
    result = download("fcos", "gn")
    assert result.returncode == 0, result.stderr
    assert f"{file}: wrong sha256 sum, renamed to {file}.bad" in result.stdout
    assert file.read_bytes() == BODY


def test_a_missing_file_says_how_to_go_on(download, file_server, tmp_path, path_env):
    file_server.files.clear()
    assert "give the same command again to go on" in error_of(download("fcos", "gn", **path_env))
    assert not (tmp_path / "weights" / FILE).exists()


def test_a_file_without_a_published_sum(download, file_server, tmp_path):
    url_path = "/model/1_PyTorch_PTH/M2Det/PTH/m2det512_vgg.pth"
    file_server.files[url_path] = BODY
    partial = tmp_path / "weights/m2det512_vgg.pth.part"
    partial.parent.mkdir()
    partial.write_bytes(BODY[:10])
    result = download("m2det", "512_vgg", WEIGHTS_SHA256="")
    assert result.returncode == 0, result.stderr
    assert f"m2det512_vgg.pth: sha256 {SUM}; its publisher states none to check" in result.stdout
    assert partial.with_suffix("").read_bytes() == BODY


def test_a_checkpoint_of_two_files(download, file_server, tmp_path):
    folder = "/tf-perf-public/resnet34_ssd_checkpoint"
    for end in ("index", "data-00000-of-00001"):
        file_server.files[f"{folder}/model.ckpt-28152.{end}"] = BODY
    arguments = ("ssd_resnet34/tfrecord", "resnet34_tensorflow", tmp_path / "tf")
    assert "has 2" in error_of(download(*arguments))
    result = download(*arguments, WEIGHTS_SHA256="")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "tf").iterdir())) == 2
    flag = f"--resnet_checkpoint={tmp_path}/tf/model.ckpt-28152"
    assert result.stdout.endswith(f"run_npu_8p.sh {flag}\n")


@pytest.mark.parametrize("model", MODELS)
def test_the_readme_names_each_file(model):
    """With the AP that is listed, in the one line of the name."""
    readme = (ROOT / model / "README.md").read_text()
    files = weights(model)
    assert files
    for name, words, address in files:
        file = address.split("/")[-1].removesuffix(".data-00000-of-00001").removesuffix(".index")
        start = f"| `{name}` | `{file}` | "
        row = [line for line in readme.splitlines() if line.startswith(start)]
        assert len(row) == 1, start
        if words.startswith("AP"):
            ap = re.match(r"AP ([\d.]+):", words)[1]
            assert re.search(rf"\| {re.escape(ap)} \|", row[0]), name


def test_sums_are_those_in_the_names():
    pairs = re.findall(r"sha256:(\w+) \S+-([0-9a-f]{8})\.pth ", SCRIPT.read_text())
    assert len(pairs) == 19
    for digits, in_name in pairs:
        assert digits.startswith(in_name)


@pytest.mark.parametrize("model", MODELS)
def test_the_next_command_names_what_exists(model, file_server, tmp_path):
    names = set()
    for name, _, address in weights(model):
        names.add(name)
        file_server.files["/" + address.split("/", 3)[3]] = BODY
    for name in names:
        two = name == "resnet34_tensorflow"
        env = {"WEIGHTS_URL": file_server.url, "WEIGHTS_SHA256": "" if two else SUM}
        result = script(model, name, tmp_path, **env)
        assert result.returncode == 0, result.stderr
        _, _, program, *flags = result.stdout.splitlines()[-1].split()
        assert (ROOT / program).is_file()
        recipes = [flag for flag in flags if flag.startswith("--recipe=")]
        config = (ROOT / model / "config.py").read_text()
        for recipe in recipes:
            assert f'"{recipe.removeprefix("--recipe=")}"' in config


BAD = [
    [],
    ["yolo"],
    ["fcos", "gm"],
    ["fcos", ""],
    ["fcos", "--all"],
    ["fcos", "gn", ""],
    ["fcos", "gn", "a", "b"],
]


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments(download, tmp_path, arguments):
    error_of(download(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_help(download, tmp_path):
    result = download("--help")
    assert result.returncode == 0
    for word in ("MODEL [NAME [DIR]]", *MODELS, "WEIGHTS_URL", "WEIGHTS_SHA256"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []
