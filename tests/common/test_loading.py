import os
import signal

import pytest
from torch.utils.data import DataLoader

from common.npu import loading


def test_workers_are_as_many_as_asked_for_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(24), raising=False)
    assert [loading.workers_per_rank(count, 1) for count in (0, 5, 40)] == [0, 5, 40]
    shares = [loading.workers_per_rank(-1, ranks) for ranks in (1, 2, 8, 24, 30)]
    assert shares == [16, 11, 2, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_the_options(workers):
    options = loading.loader_options(workers, pin_memory=False)
    assert list(DataLoader([1, 2, 3], **options)) == [1, 2, 3]


def test_a_worker_outlives_both_signals_for_a_minute(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    alarms = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    try:
        loading.outlive_signals(0)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert alarms == [60]


def test_the_first_batch_is_repeated():
    loader = DataLoader([1, 2, 3])
    assert [batch.item() for batch in loading.repeat_first_batch(loader)] == [1, 1, 1]
