"""What all tests share: one thread, the handlers of signals, real data, the NPU's way on a CPU."""

import signal
from pathlib import Path

import pytest
import torch

from common.coco.index import read_index

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
    """A run in this process takes the signals; pytest gets them back."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in taken}
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
