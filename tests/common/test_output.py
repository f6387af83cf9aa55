import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.npu import output

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_folder_in_use_is_refused(tmp_path, resumed):
    """A lock of another process; the children of that process do not hold it any longer."""
    code = (
        "import os, sys, time; from pathlib import Path; from common.npu import output\n"
        "output.claim_output_folder(Path(sys.argv[1]), True)\n"
        "child = os.fork()\n"
        "print(child, flush=True) if child else os.close(1)\n"
        "time.sleep(60)"
    )
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "train_0.log").write_text("at work")
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other:
        child = int(other.stdout.readline())
        try:
            with pytest.raises(UserError, match=r"output: a running process uses it; name another"):
                output.claim_output_folder(folder, resumed)
            assert (folder / "train_0.log").read_text() == "at work"
            other.kill()
            other.wait()
            output.claim_output_folder(folder, resumed)
            assert (folder / "train_0.log").exists() == resumed
        finally:
            other.kill()
            os.kill(child, 9)


def test_a_former_run_is_renamed_and_never_deletes(tmp_path):
    folder = tmp_path / "output"
    assert output.claim_output_folder(folder, False) == []
    assert output.claim_output_folder(folder, False) == []
    for text in ("first", "second", "third"):
        (folder / "train_0.log").write_text(text)
        (line,) = output.claim_output_folder(folder, False)
        assert str(folder) in line
        assert [path.name for path in folder.iterdir()] == [output.LOCK_FILE]
        assert Path(line.split()[-1], "train_0.log").read_text() == text
    kept = sorted(path for path in tmp_path.iterdir() if path != folder)
    texts = {path.joinpath("train_0.log").read_text() for path in kept}
    assert texts == {"first", "second", "third"}
    (folder / "train_0.log").write_text("fourth")
    os.utime(folder, (1.7e9, 1.7e9))
    (line,) = output.claim_output_folder(folder, False)
    clash = Path(line.split()[-1])
    assert clash.name.startswith("output_20231114_") or clash.name.startswith("output_20231115_")
    (folder / "train_0.log").write_text("fifth")
    os.utime(folder, (1.7e9, 1.7e9))
    with pytest.raises(UserError, match=r"holds a former run and cannot be renamed: .*not empty"):
        output.claim_output_folder(folder, False)
    assert (folder / "train_0.log").read_text() == "fifth"
    assert (clash / "train_0.log").read_text() == "fourth"


@pytest.fixture
def former(tmp_path):
    """The folder of a former run."""
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "train_0.log").touch()
    return folder


def listing(folder):
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    "name", ["20260101_000000.log.json", "iter_5.pt", "best.pt", "tensorboard", "metrics.json"]
)
def test_a_folder_is_renamed_for_the_files_of_a_run_alone(tmp_path, name):
    folder = tmp_path / "output"
    (folder / "notes").mkdir(parents=True)
    (folder / "iter.txt").touch()
    assert output.claim_output_folder(folder, False) == []
    (folder / name).touch()
    (line,) = output.claim_output_folder(folder, False)
    moved = Path(line.split()[-1])
    assert sorted(path.name for path in moved.iterdir()) == sorted(
        [output.LOCK_FILE, "iter.txt", name, "notes"]
    )


@pytest.mark.parametrize("name", ["", "coco", "coco/annotations.json", "records/train*", "link"])
def test_a_folder_with_what_the_run_reads_is_not_moved(tmp_path, former, name):
    (former / "coco").mkdir()
    (tmp_path / "data").mkdir()
    (former / "link").symlink_to(tmp_path / "data")
    before = listing(tmp_path)
    path = str(former / name)
    message = (
        f"--output_dir {former} holds a former run and cannot be renamed: this run reads "
        f"{Path(path)}, which is in it; name another folder, or go on with that run by "
        "--resume=auto"
    )
    with pytest.raises(UserError) as refused:
        output.claim_output_folder(former, False, ["elsewhere", path])
    assert str(refused.value) == message
    assert listing(tmp_path) == before
    assert output.claim_output_folder(former, True, [path]) == []


def test_data_beside_and_around_the_folder_do_not_hinder(tmp_path, former):
    inputs = [str(tmp_path), str(tmp_path / "output_data"), "coco"]
    assert len(output.claim_output_folder(former, False, inputs)) == 1


@pytest.mark.parametrize("name", [".", "", "notes/.."])
def test_the_current_folder_is_taken_once_and_not_renamed(tmp_path, monkeypatch, name):
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert output.claim_output_folder(Path(name), False) == []
    assert output.renamed_folders(Path(name)) == []
    (tmp_path / "best.pt").touch()
    before = listing(tmp_path.parent)
    with pytest.raises(UserError, match="the current folder is in it; name another folder, or go"):
        output.claim_output_folder(Path(name), False)
    monkeypatch.chdir(tmp_path / "notes")
    with pytest.raises(UserError, match="the current folder is in it; name another folder, or go"):
        output.claim_output_folder(Path(".."), False)
    assert listing(tmp_path.parent) == before


def test_a_relative_folder_is_renamed_beside_itself(tmp_path, former, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(output.claim_output_folder(Path("output"), False)) == 1
    (moved,) = output.renamed_folders(Path("output"))
    assert moved.parent == tmp_path
    assert (moved / "train_0.log").exists()


def test_a_mount_point_is_not_renamed(former, monkeypatch):
    message = "it is a mount point; name a folder in it, or go on with that run by --resume=auto"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == former)
        with pytest.raises(UserError, match=message):
            output.claim_output_folder(former, False)

    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)  # a part of the same disk, mounted there
    with pytest.raises(UserError, match=message):
        output.claim_output_folder(former, False)
    assert (former / "train_0.log").exists()


def test_a_link_stays_and_its_folder_is_renamed_on_its_disk(tmp_path, former):
    (tmp_path / "small").mkdir()
    link = tmp_path / "small" / "link"
    link.symlink_to(former)
    (line,) = output.claim_output_folder(link, False)
    assert str(link) in line
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["link"]
    assert link.resolve() == former
    assert [path.name for path in former.iterdir()] == [output.LOCK_FILE]
    (moved,) = output.renamed_folders(link)
    assert moved.parent == tmp_path
    assert (moved / "train_0.log").exists()
    link.unlink()
    link.symlink_to(tmp_path / "new")  # a link to a folder that is still to be made
    assert output.claim_output_folder(link, False) == []
    assert (tmp_path / "new").is_dir()


def test_a_file_in_the_place_of_the_folder_has_its_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*/file cannot be written: .*; a file is"):
        output.claim_output_folder(tmp_path / "file", False)
