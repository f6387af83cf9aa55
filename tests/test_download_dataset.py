"""download_dataset.sh against a server on this machine: whole, resumed, wrong, refused, sample."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.downloads import environment, error_of

SCRIPT = Path(__file__).parents[1] / "download_dataset.sh"
ARCHIVES = {
    "train": ("/zips/train2017.zip", "train2017/000000000009.jpg"),
    "val": ("/zips/val2017.zip", "val2017/000000000139.jpg"),
    "annotations": (
        "/annotations/annotations_trainval2017.zip",
        "annotations/instances_val2017.json",
    ),
}


@pytest.fixture
def server(file_server, tmp_path):
    for url_path, member in ARCHIVES.values():
        path = tmp_path / "archive.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, member * 500)
        file_server.files[url_path] = path.read_bytes()
        path.unlink()
    return file_server


@pytest.fixture
def download(server, tmp_path):
    """Runs the script in `tmp_path` with the server's address and sums."""

    def run(*arguments, **more_env):
        env = {**environment(), "COCO_URL": server.url}
        for part, (url_path, _) in ARCHIVES.items():
            body = server.files[url_path]
            env[f"COCO_MD5_{part.upper()}"] = hashlib.md5(body).hexdigest()
        return subprocess.run(
            ["bash", str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path,
            env={**env, **more_env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_whole_run_and_nothing_to_do_after_it(download, server, tmp_path, path_env):
    first = download("data/coco", **path_env)
    assert first.returncode == 0, first.stderr
    assert f"--data_path={tmp_path}/data/coco" in first.stdout
    for _, member in ARCHIVES.values():
        assert (tmp_path / "data/coco" / member).read_text() == member * 500
    assert not list((tmp_path / "data/coco").rglob("*.zip*"))
    assert len(server.requests) == 3

    second = download("data/coco", **path_env)
    assert second.returncode == 0, second.stderr
    assert len(server.requests) == 3


def test_partial_archive_is_resumed(download, server, tmp_path, path_env):
    url_path, member = ARCHIVES["val"]
    partial = tmp_path / "coco/.download/val2017.zip.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.files[url_path][:100])
    result = download("--only=val", **path_env)
    assert result.returncode == 0, result.stderr
    assert server.requests == [(url_path, "bytes=100-")]
    assert (tmp_path / "coco" / member).is_file()
    assert not (tmp_path / "coco/train2017").exists()


def test_broken_connection_is_taken_up_again(download, server, tmp_path, path_env):
    url_path, member = ARCHIVES["val"]
    server.cut = 70
    result = download("--only=val", **path_env)
    assert result.returncode == 0, result.stderr
    assert server.requests == [(url_path, None), (url_path, "bytes=70-")]
    assert (tmp_path / "coco" / member).is_file()


def test_archive_that_was_complete_but_not_unpacked(download, server, tmp_path, path_env):
    url_path, member = ARCHIVES["val"]
    partial = tmp_path / "coco/.download/val2017.zip.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.files[url_path])
    assert download("--only=val", "--keep_zips", **path_env).returncode == 0
    assert (tmp_path / "coco" / member).is_file()
    assert partial.with_suffix("").read_bytes() == server.files[url_path]


def test_wrong_md5_is_set_aside_and_the_next_run_begins_anew(download, server, tmp_path):
    result = download("--only=val", COCO_MD5_VAL="0" * 32)
    assert "wrong md5 sum" in error_of(result)
    bad = tmp_path / "coco/.download/val2017.zip.bad"
    assert bad.read_bytes() == server.files[ARCHIVES["val"][0]]
    assert not (tmp_path / "coco/val2017").exists()

    assert download("--only=val").returncode == 0
    assert [wanted for _, wanted in server.requests] == [None, None]


def test_missing_archive_says_how_to_go_on(download, server, tmp_path, path_env):
    result = download("--only=val", COCO_URL=f"{server.url}/none", **path_env)
    assert "give the same command again" in error_of(result)
    assert not (tmp_path / "coco/val2017").exists()


def test_foreign_folder_is_never_touched(download, server, tmp_path):
    foreign = tmp_path / "coco/train2017"
    foreign.mkdir(parents=True)
    (foreign / "mine.jpg").write_text("mine")
    assert "train2017 exists and was not made by this script" in error_of(download())
    assert server.requests == []
    assert [path.name for path in foreign.iterdir()] == ["mine.jpg"]
    assert download("--only=val,annotations").returncode == 0
    assert [path.name for path in foreign.iterdir()] == ["mine.jpg"]


def test_half_unpacked_folder_is_begun_anew(download, tmp_path):
    half = tmp_path / "coco/.download/val.unpacked/val2017"
    half.mkdir(parents=True)
    (half / "half.jpg").write_text("half")
    assert download("--only=val").returncode == 0
    assert [path.name for path in (tmp_path / "coco/val2017").iterdir()] == ["000000000139.jpg"]


def test_sample(download, server, tmp_path):
    result = download("--sample", "drawn")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "drawn/val2017").iterdir())) == 60
    assert (tmp_path / "drawn/annotations/instances_train2017.json").is_file()
    assert "exists and is not empty" in error_of(download("--sample=drawn"))
    assert server.requests == []


@pytest.mark.parametrize(
    "arguments", [["--fast"], ["--only=test"], ["--only="], ["--sample"], ["a", "b"], [""]]
)
def test_bad_arguments(download, tmp_path, arguments):
    error_of(download(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_help(download, tmp_path):
    result = download("--help")
    assert result.returncode == 0
    for word in ("--only=LIST", "--keep_zips", "--sample DIR", "--data_path", "COCO_URL"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []
