"""What all tests share: one thread, the handlers of signals, real data, the NPU's way on a CPU."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from common.coco.index import read_index
from common.npu import checkpoint
from tests.downloads import TOOLS, Server
from tests.small_models import ALL, module, run_state, small_recipe

TINY = Path(__file__).parent / "data" / "tiny_coco"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the golden values were computed; also far quicker on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _handlers():
    """A run in this process takes the signals; pytest gets them back.

    Under `nohup` or in the background some are ignored, here and in what the tests start.
    """
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.getsignal(number) for number in usual}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, usual[number])
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_train():
    """Fifty real images of COCO's training set."""
    return read_index(str(TINY / "annotations/instances_train2017.json"), str(TINY / "train2017"))


@pytest.fixture(scope="session")
def tiny_val():
    """Fifty real images of COCO's validation set."""
    return read_index(str(TINY / "annotations/instances_val2017.json"), str(TINY / "val2017"))


@pytest.fixture
def foreign(monkeypatch):
    """Classes as in mmcv and mmengine, in a module that is there only while a file is written."""

    class ConfigDict(dict):
        def __getstate__(self):
            return self

        def __setstate__(self, state):
            self.update(state)

    class Config:
        def __getstate__(self):
            return ConfigDict(model=ConfigDict(type="SSD"), scales=[(300, 300)]), "a.py", "text"

    class HistoryBuffer:
        def __init__(self):
            self.history, self.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

        def mean(self):
            return self.history.mean()

    module = types.ModuleType("mmlike")
    monkeypatch.setitem(sys.modules, "mmlike", module)
    for one in (ConfigDict, Config, HistoryBuffer):
        one.__qualname__ = one.__name__
        setattr(module, one.__name__, one)
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"  # pickled as a call of getattr
    for one in (ConfigDict, Config, HistoryBuffer, HistoryBuffer.mean):
        one.__module__ = "mmlike"
    return module


@pytest.fixture(scope="session")
def detectors(tmp_path_factory):
    """`detectors[model]`: the checkpoint of a small detector of three classes."""
    folder = tmp_path_factory.mktemp("detectors")
    paths = {}
    for model in ALL:
        torch.manual_seed(0)
        network = module(model, "model").build_model(small_recipe(model), 3)
        paths[model] = folder / model.replace("/", "_") / "iter_1.pt"
        checkpoint.save(paths[model], run_state(model, network.state_dict()))
    return paths


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: their names; 10.77.0.1 and 10.77.0.2."""
    hosts = [f"onestage{os.getpid()}{end}" for end in "ab"]
    try:
        for host in hosts:
            _ip("netns", "add", host)
        cable = ["type", "veth", "peer", "name", "cable", "netns", hosts[1]]
        _ip("-n", hosts[0], "link", "add", "cable", *cable)
        for host, address in zip(hosts, ("10.77.0.1", "10.77.0.2"), strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", host, "link", "set", device, "up")
        yield hosts
    except FileNotFoundError:
        pytest.skip("two hosts need `ip` of iproute2")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
    finally:
        for host in hosts:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "delete", host], capture_output=True)


@pytest.fixture
def file_server():
    """A `Server` of files on this machine."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture(params=["curl", "wget", "python"])
def path_env(request, tmp_path):
    """PATH with this one way to download and nothing else that the scripts do not need."""
    tools = list(TOOLS)
    if request.param != "python":
        tools.append(request.param)
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
        (folder / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(folder)}
