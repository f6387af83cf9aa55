import gzip
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from common.errors import UserError
from common.npu import checkpoint
from common.npu.foreign import Placeholder

ROOT = Path(__file__).parents[2]


def state(value=1.0):
    weights = {f"layer{k}.weight": torch.full((40, 30), value + k) for k in range(3)}
    return {
        "model": weights,
        "buffers": [{}],
        "windows": [{}],
        "optimizer": {},
        "scaler": {},
        "iteration": 3,
        "best": 0.0,
        "recipe": {"name": "tiny", "epochs": 1, "batch_size": 2, "lr": 0.1},
        "classes": ["person"],
        "category_ids": [1],
        "run": {"seed": 0},
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "iter_3.pt"
    checkpoint.save(path, state())
    return path


def test_what_was_saved_is_loaded(saved):
    loaded = checkpoint.load(saved)
    assert loaded.keys() == state().keys() | {"path"}
    assert loaded["path"] == str(saved)
    assert loaded["run"] == {"seed": 0}
    for key, value in state()["model"].items():
        assert torch.equal(loaded["model"][key], value)
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(saved, monkeypatch, where, error):
    old = saved.read_bytes()

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as seen:
            checkpoint.save(saved, state(2.0))
    if isinstance(error, OSError):
        assert str(saved) in str(seen.value)
        assert "No space left" in str(seen.value)
    assert saved.read_bytes() == old
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3.pt"]


def test_bytes_are_on_the_disk_before_the_name(saved, monkeypatch):
    """A power cut after the rename must not find an empty file under the good name."""
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, n=name, f=original: (events.append(n), f(*a))[1], raising=True
        )
    checkpoint.save(saved, state())
    assert events[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("limit", [0, 100, 100_000, 3_999_000])
def test_a_full_disk_is_reported_as_one(saved, limit):
    old = saved.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal
    try:
        with pytest.raises(UserError, match=r"iter_3\.pt cannot be written: .*File too large"):
            checkpoint.save(saved, {"model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert saved.read_bytes() == old
    assert [path.name for path in saved.parent.iterdir()] == ["iter_3.pt"]


def test_every_flipped_byte_of_a_tensor_is_noticed(saved):
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        for entry in archive.infolist():
            if "/data/" not in entry.filename:
                continue
            value = archive.read(entry)
            start = data.index(value)
            for offset in range(0, len(value), max(1, len(value) // 12)):
                broken = bytearray(data)
                broken[start + offset] ^= 1 << offset % 8
                saved.write_bytes(broken)
                with pytest.raises(UserError, match=r"iter_3\.pt .*damaged.* not those .* written"):
                    checkpoint.load(saved)
    saved.write_bytes(data)
    assert same(checkpoint.load(saved)["model"], state()["model"])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def noticed_or_harmless(path, data, place, bit, capsys):
    """A flip may hit a byte that means nothing; nothing else may pass."""
    broken = bytearray(data)
    broken[place] ^= 1 << bit
    path.write_bytes(broken)
    found = checkpoint.load_newest(path.parent)
    told = capsys.readouterr().err
    if found is None:
        assert told.startswith(f"skipping checkpoint {path}")
        assert told.count("\n") == 1
    else:
        assert same(found, {**state(), "path": str(path)})
    return found is None


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path_factory, capsys, place, bit):
    path = tmp_path_factory.mktemp("flip") / "iter_3.pt"
    checkpoint.save(path, state())
    data = path.read_bytes()
    noticed_or_harmless(path, data, int(place * len(data)), bit, capsys)


def test_every_flipped_bit_of_the_archives_directory(saved, capsys):
    data = saved.read_bytes()
    name = b"/data/0"
    end = data.rindex(name) + len(name)
    start = data.rindex(b"PK\x01\x02", 0, end)
    flips = [(place, bit) for place in range(start, end) for bit in range(8)]
    noticed = sum(noticed_or_harmless(saved, data, *flip, capsys) for flip in flips)
    assert noticed > len(flips) / 2


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_noticed(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"iter_3\.pt .*damaged"):
        checkpoint.load(saved)


def test_the_newest_whole_one_is_found_and_the_others_are_named(tmp_path, capsys):
    for iteration in (5, 40, 300, 1000):
        checkpoint.save(tmp_path / f"iter_{iteration}.pt", state(float(iteration)))
    (tmp_path / "best.pt").write_bytes(b"")
    (tmp_path / "iter_x.pt").write_bytes(b"")
    (tmp_path / "iter_2000.pt.77.tmp").write_bytes(b"half")
    names = [path.name for path in checkpoint.checkpoints_newest_first(tmp_path)]
    assert names == ["iter_1000.pt", "iter_300.pt", "iter_40.pt", "iter_5.pt"]
    assert [path.name for path in checkpoint.checkpoints_newest_first(tmp_path, 40)] == names[2:]
    assert checkpoint.load_newest(tmp_path)["path"] == str(tmp_path / "iter_1000.pt")
    assert capsys.readouterr().err == ""

    cut, flipped = tmp_path / "iter_1000.pt", tmp_path / "iter_300.pt"
    cut.write_bytes(cut.read_bytes()[:-1000])
    data = bytearray(flipped.read_bytes())
    data[data.index(torch.full((4,), 300.0).numpy().tobytes())] ^= 4
    flipped.write_bytes(data)
    assert checkpoint.load_newest(tmp_path)["path"] == str(tmp_path / "iter_40.pt")
    skipped = capsys.readouterr().err.splitlines()
    assert len(skipped) == 2
    assert skipped[0].startswith(f"skipping checkpoint {cut} is cut short or damaged")
    assert skipped[1].startswith(f"skipping checkpoint {flipped} is cut short or damaged")


def test_the_best_one_is_found_where_there_is_no_other(tmp_path):
    checkpoint.save(tmp_path / "best.pt", {"run": {}, "iteration": 3})
    assert checkpoint.load_newest(tmp_path)["path"] == str(tmp_path / "best.pt")
    checkpoint.save(tmp_path / "iter_1.pt", {"run": {}, "iteration": 1})
    assert checkpoint.load_newest(tmp_path)["path"] == str(tmp_path / "iter_1.pt")


def test_of_a_run_the_best_one_is_taken_before_the_newest(tmp_path, capsys):
    assert checkpoint.load_best(tmp_path) is None
    checkpoint.save(tmp_path / "iter_9.pt", {"run": {}, "iteration": 9})
    assert checkpoint.load_best(tmp_path)["path"] == str(tmp_path / "iter_9.pt")
    checkpoint.save(tmp_path / "best.pt", {"run": {}, "iteration": 3})
    assert checkpoint.load_best(tmp_path)["path"] == str(tmp_path / "best.pt")
    (tmp_path / "best.pt").write_bytes(b"half")
    capsys.readouterr()
    assert checkpoint.load_best(tmp_path)["path"] == str(tmp_path / "iter_9.pt")
    assert "best.pt" in capsys.readouterr().err


def test_later_checkpoints_are_set_aside_and_not_deleted(tmp_path):
    for iteration in (5, 40, 300):
        checkpoint.save(tmp_path / f"iter_{iteration}.pt", state(float(iteration)))
    later = checkpoint.set_aside_later(tmp_path, last_step=40)
    assert [path.name for path in later] == ["iter_300.pt"]
    assert checkpoint.load_newest(tmp_path)["path"] == str(tmp_path / "iter_40.pt")
    assert checkpoint.load(tmp_path / "iter_300.pt.superseded")["path"]


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(UserError, match=r"typo\.pt does not exist; check the path"):
        checkpoint.load(tmp_path / "typo.pt")


def test_nothing_to_resume_from(tmp_path, capsys):
    assert checkpoint.load_newest(tmp_path / "missing") is None
    assert checkpoint.load_resume_state("auto", tmp_path, "tiny") is None
    assert checkpoint.load_resume_state("none", tmp_path, "tiny") is None
    assert capsys.readouterr().err == ""


def test_resume_takes_the_newest_whole_one_and_says_what_it_skips(saved, tmp_path, capsys):
    saved.with_name("iter_9.pt").write_bytes(b"PK broken")
    assert checkpoint.load_resume_state("none", saved.parent, "tiny") is None
    found = checkpoint.load_resume_state("auto", saved.parent, "tiny")
    assert found["path"] == str(saved)
    assert found["iteration"] == 3
    assert "skipping checkpoint" in capsys.readouterr().err
    assert checkpoint.load_resume_state(str(saved), tmp_path / "b", "tiny")["iteration"] == 3
    told = []
    checkpoint.load_resume_state("auto", saved.parent, "tiny", warn=told.append)
    assert told[0].startswith("skipping checkpoint")


@pytest.mark.parametrize("run", [None, "wandb"])
def test_weights_alone_cannot_be_resumed(run, tmp_path):
    path = tmp_path / "iter_1.pt"
    torch.save({"model": {}} if run is None else {"model": {}, "run": run}, path)
    for resume in (str(path), "auto"):
        with pytest.raises(UserError) as error:
            checkpoint.load_resume_state(resume, tmp_path, "tiny", "--resnet_checkpoint")
        assert str(error.value) == (
            f"--resume {path}: holds weights only; use --resnet_checkpoint {path}"
        )


@pytest.mark.parametrize("name", sorted(set(state()) - {"run"}))
@pytest.mark.parametrize("value", [None, "text"])
def test_a_state_that_lacks_an_entry_cannot_be_resumed(name, value, tmp_path):
    path = tmp_path / "iter_3.pt"
    content = {**state(), name: value}
    if value is None:
        del content[name]
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        checkpoint.load_resume_state(str(path), tmp_path, "tiny")
    assert str(error.value) == (
        f"--resume {path}: not a whole state of a run (nothing usable as {name}); "
        f"use --checkpoint_path {path}"
    )


def test_load_refuses_with_one_line_what_is_no_checkpoint(tmp_path):
    text, array, pickled = (tmp_path / name for name in ("a.txt", "b.pt", "c.pt"))
    text.write_text("hello\nworld")
    torch.save([1, 2], array)
    pickled.write_bytes(pickle.dumps(print, 2))
    for path in (tmp_path / "none.pt", text, array, pickled, tmp_path):
        with pytest.raises(UserError) as error:
            checkpoint.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def torchscript(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def detectron2_pickle(path):
    content = {"model": {"stem.conv1.weight": np.zeros((2, 2))}, "__author__": "Detectron2"}
    path.write_bytes(pickle.dumps(content, 2))


def numpy_archive(path):
    with path.open("wb") as file:  # an open file: a path would get a suffix
        np.savez(file, a=np.zeros(2))


def numpy_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(2))


def zip_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/iter_1.pt", b"1")


def exported_program(path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, path)


def tar_archive(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


def jpeg(path):
    Image.new("RGB", (4, 4)).save(path, "JPEG")


ARRAYS = {"conv.weight": np.zeros((2, 2)), "steps": 3}
TABLE_END = bytes.fromhex("57fb808b247547db")
OTHER_FILES = {
    "R-50.pkl": (detectron2_pickle, "is a plain pickle, such as Detectron2's R-50.pkl; "),
    "model.pt": (torchscript, "is TorchScript, a program; give the state dict"),
    "notes.txt": (b"hello\nworld", "is a text file; give a checkpoint"),
    "chinese.txt": ("\u8bad\u7ec3 " * 2000, "is a text file; give a checkpoint"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, "),
    "page.pth": (b"<!DOCTYPE html><html>not found</html>", "is a web page, not what it was to be"),
    "model.ckpt": (b"\0" * 99 + TABLE_END, "is a TensorFlow V1 checkpoint; write it again as V2"),
    "model.ckpt-1.index": (b"\0" * 99 + TABLE_END, "is the index of a TensorFlow checkpoint; "),
    "model.ckpt-1.data-00000-of-00001": (b"\1\2\3", "is a part of a TensorFlow checkpoint; "),
    "arrays.npz": (numpy_archive, "is an archive of NumPy's arrays; write its arrays as tensors"),
    "array.npy": (numpy_array, "is an array of NumPy; write its arrays as tensors"),
    "weights.zip": (zip_archive, "is a zip archive of other files; unpack it and give"),
    "program.pt2": (exported_program, "is a program of torch.export; give the state dict"),
    "weights.tar": (tar_archive, "is a tar archive; unpack it and give the checkpoint in it"),
    "weights.pth.gz": (gzip.compress(b"1"), "is a file compressed with gzip; unpack it and give"),
    "photo.jpg": (jpeg, "is an image; give weights here, images after them or with --img"),
    "det.onnx": (
        b"\x08\x08\x12\x07pytorch\x1a\x06\x32.9.1\0\1",
        "is an ONNX graph; give the",
    ),
    "yolov3.weights": (
        struct.pack("<iiiq", 0, 2, 0, 32_013_312) + np.ones(9, np.float32).tobytes(),
        "is a file of Darknet's weights, such as YOLO's; give PyTorch's weights",
    ),
    "latin1.txt": ("Gr\u00f6\u00dfe: 3 m\n".encode("latin-1"), "is a text file; give a checkpoint"),
    "utf16.txt": ("Gr\u00f6\u00dfe \u8bad\n".encode("utf-16"), "is a text file; give a checkpoint"),
    "gbk.txt": ("\u8bad\u7ec3\n".encode("gbk"), "is a text file; give a checkpoint"),
    "protocol0.pkl": (pickle.dumps(ARRAYS, 0), "is a plain pickle of an early protocol; write its"),
    "protocol1.pkl": (pickle.dumps(ARRAYS, 1), "is a plain pickle of an early protocol; write its"),
    "ordered.pkl": (pickle.dumps(OrderedDict(ARRAYS), 0), "is a plain pickle of an early protocol"),
    "checkpoint": (
        b'model_checkpoint_path: "model.ckpt-5"\nall_model_checkpoint_paths: "model.ckpt-5"\n',
        "is TensorFlow's list of the checkpoints in a folder; give the folder, to ssd_resnet34/tf",
    ),
    "unknown.pth": (bytes(range(1, 200)), "is of no kind that can be read as a checkpoint; give a"),
    "model.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file, such as Keras writes"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name):
    content, words = OTHER_FILES[name]
    path = tmp_path / name
    (tmp_path / "model.ckpt-1.index").touch()
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"checkpoint {path} {words}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("n" * 300 + ".pth", "cannot be opened (File name too long); check the path"),
        ("file/x.pth", "cannot be opened (Not a directory); check the path"),
        ("loop.pth", "cannot be opened (Too many levels of symbolic links); check the path"),
    ],
)
def test_a_path_that_cannot_be_opened_is_no_damage(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path / name)
    assert str(error.value) == f"checkpoint {tmp_path / name} {reason}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": ARRAYS}, "state_dict holds NumPy arrays; make tensors of them"),
        ({"model": nn.Linear(2, 2), "epoch": 3}, "model is a pickled Linear; save its state dict"),
    ],
)
def test_what_lies_in_the_place_of_tensors_is_named(tmp_path, content, words):
    path = tmp_path / "last.pth"
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"checkpoint {path} has no tensors: {words}")


def test_tensors_beside_a_pickled_module_are_read(tmp_path):
    torch.save({"model": nn.Linear(2, 2), "state_dict": {"a": torch.ones(1)}}, tmp_path / "a.pth")
    assert checkpoint.load(tmp_path / "a.pth")["state_dict"]["a"] == 1


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the file in it"):
        checkpoint.load(tmp_path)


def write_safetensors(path):
    """One tensor `a` of two numbers, by the format's rule: length, JSON, values."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    values = np.array([1, 2], np.float32).tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)


def test_safetensors_need_their_package(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value) == (
        f"checkpoint {path} is of the format safetensors, whose package is not installed; "
        "pip install safetensors"
    )


def test_safetensors_are_read(tmp_path):
    pytest.importorskip("safetensors.torch")
    write_safetensors(tmp_path / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert loaded["a"].tolist() == [1, 2]
    assert loaded.keys() == {"a", "path"}


@pytest.mark.parametrize("as_zip", [True, False])
def test_foreign_classes_become_placeholders(tmp_path, monkeypatch, foreign, as_zip):
    """Of a file that plain `weights_only` refuses, in the format of today and before torch 1.6."""
    meta = {
        "CLASSES": ("cat", "hat"),
        "config": foreign.Config(),
        "dataset_meta": foreign.ConfigDict(classes=("cat", "hat")),
        "best_score": np.float64(0.25),
        "hooks": defaultdict(list, {"a": deque([1, 2], 3)}),
    }
    weights = OrderedDict(state()["model"])
    given = {
        "meta": meta,
        "state_dict": weights,
        "message_hub": {"scalars": OrderedDict(loss=foreign.HistoryBuffer())},
        "optimizer": {"lr": 0.1, "step": torch.tensor(7)},
    }
    path = tmp_path / "epoch_1.pth"
    torch.save(given, path, _use_new_zipfile_serialization=as_zip)
    assert zipfile.is_zipfile(path) == as_zip
    monkeypatch.delitem(sys.modules, "mmlike")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = checkpoint.load(path)
    assert same(loaded["state_dict"], weights)
    assert loaded["optimizer"] == given["optimizer"]
    assert loaded["meta"]["CLASSES"] == ("cat", "hat")
    assert loaded["meta"]["dataset_meta"] == {"classes": ("cat", "hat")}
    assert loaded["meta"]["hooks"] == {"a": [1, 2]}
    buffer = loaded["message_hub"]["scalars"]["loss"]
    for held in (loaded["meta"]["config"], loaded["meta"]["best_score"], buffer):
        assert isinstance(held, Placeholder)
        assert not vars(held)
    with pytest.raises(pickle.UnpicklingError):  # they are safe there and then only
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("call", [os.system, eval, exec, print])
def test_no_code_of_a_file_runs(tmp_path, capfd, as_zip, call):
    """It is refused, or read without its objects; run, each call would leave a mark."""
    mark = tmp_path / "mark"
    text = f"touch {mark}" if call is os.system else f"print(open({str(mark)!r}, 'w'))"

    class Evil:
        def __reduce__(self):
            return call, (text,)

    path = tmp_path / "evil.pth"
    torch.save({**state(), "evil": Evil()}, path, _use_new_zipfile_serialization=as_zip)
    if call is os.system:  # torch blocks the whole module
        with pytest.raises(UserError, match="holds more than tensors"):
            checkpoint.load(path)
    else:
        loaded = checkpoint.load(path)
        assert same(loaded["model"], state()["model"])
        assert type(loaded["evil"]).__mro__[1] is Placeholder
    assert not mark.exists()
    assert capfd.readouterr().out == ""
    call(text)
    assert mark.exists() or capfd.readouterr().out


def test_deleting_keeps_the_newest_and_the_best(tmp_path):
    for name in ("iter_1.pt", "iter_20.pt", "iter_3.pt", "best.pt", "iter_9.pt.12.tmp", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "iter_30.pt").write_bytes(b"of a former start, damaged")
    checkpoint.delete_old(tmp_path, 20, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["best.pt", "iter_20.pt", "iter_3.pt", "iter_30.pt", "note.txt"]


def test_deleting_keeps_the_last_one_in_any_case(tmp_path):
    for name in ("iter_1.pt", "iter_2.pt"):
        (tmp_path / name).write_bytes(b"x")
    checkpoint.delete_old(tmp_path, 2, keep=0)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_2.pt"]
