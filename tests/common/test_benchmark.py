"""The speed of a detector, and the size of a network."""

import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from common.fps import benchmark
from common.fps.benchmark import measure_speed, report_speed
from common.fps.network_size import count_flops, num_parameters, size_line
from common.npu.precision import Precision

CPU = torch.device("cpu")


class Network(nn.Module):
    """A convolution and a batch norm that has two names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        norm = nn.BatchNorm2d(4)
        self.norms = nn.ModuleList([norm, norm])

    def forward(self, images):
        return self.norms[1](self.norms[0](self.conv(images)))


class SlowDetector:
    """Takes 4, 2 and 1 ms for an image."""

    def __init__(self):
        self.device = CPU
        self.precision = Precision(CPU)
        self.model = Network()
        self.batch_sizes = []

    def prepare(self, images):
        self.batch_sizes.append(len(images))
        time.sleep(0.004 * len(images))
        return torch.zeros(len(images), 3, 20, 30)

    def run_network(self, inputs):
        if len(inputs) == 32:
            raise torch.OutOfMemoryError
        time.sleep(0.002 * len(inputs))
        return self.model(inputs)

    def finish(self, outputs, images):
        time.sleep(0.001 * len(images))


IMAGES = [np.zeros((9, 9, 3), np.uint8)] * 2


def test_each_phase_is_measured():
    detector = SlowDetector()
    speed = measure_speed(detector, IMAGES, batch_size=3, seconds=0.2)
    assert set(detector.batch_sizes) == {3}
    assert len(detector.batch_sizes) == speed.rounds + benchmark.WARM_UP_ROUNDS
    assert benchmark.FEWEST_ROUNDS <= speed.rounds <= 10
    for phase, least in (("prepare", 12), ("network", 6), ("detect", 3)):
        p50, p90, p99 = speed.percentiles[phase]
        assert least <= p50 <= p90 <= p99
    p50_of_a_batch = sum(times[0] for times in speed.percentiles.values())
    assert speed.images_per_second == pytest.approx(3000 / p50_of_a_batch, rel=0.5)


def test_the_table_is_logged_and_added_to_the_metrics(tmp_path):
    lines = []
    file = tmp_path / "out/metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"AP": 0.5}))
    report_speed(SlowDetector(), IMAGES, (32, 1, 64), file, lines.append, seconds=0.05)
    assert lines[0].startswith("benchmark on cpu, network O0 (float32, loss scale 1): 0.0 M")
    assert [line.split()[0] for line in lines[2:]] == ["1", "32"]
    assert lines[3].endswith("does not fit the device's memory")
    metrics = json.loads(file.read_text())
    assert metrics["AP"] == 0.5
    assert metrics["benchmark"]["flops"] == 2 * 4 * 27 * 20 * 30
    (row,) = metrics["benchmark"]["batches"]
    assert row["batch_size"] == 1


def test_the_size_of_a_network_leaves_it_as_it_was():
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert num_parameters(network) == 4 * 27 + 8
    assert count_flops(network, height=20, width=30) == 2 * 4 * 27 * 20 * 30
    assert size_line(network, height=20, width=30) == (
        "network: 0.0 M parameters, 0.0 GFLOPs an image of 30 x 20 pixels (multiplication and "
        "addition are two)"
    )
    for name, value in network.state_dict().items():
        assert value.device == CPU
        assert torch.equal(value, before[name])
