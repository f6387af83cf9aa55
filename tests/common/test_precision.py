import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.errors import UserError
from common.npu import device as device_module
from common.npu import precision as module
from common.npu.device import be_exact, fp32_shortcuts, obstacle_to_fused_sgd
from common.npu.precision import Precision, build_sgd, default_level

CPU, CUDA, NPU = torch.device("cpu"), torch.device("cuda", 0), SimpleNamespace(type="npu")


@pytest.fixture
def _bf16(monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda device: True)
    monkeypatch.setattr(module, "fp32_shortcuts", lambda device: [])
    monkeypatch.setattr(module, "has_infinity", lambda device: True)


@pytest.fixture
def _no_bf16(monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda device: False)
    monkeypatch.setattr("common.npu.device.has_bf16", lambda device: False)
    monkeypatch.setattr(module, "has_infinity", lambda device: device is not NPU)


@pytest.mark.usefixtures("_bf16")
@pytest.mark.parametrize(
    ("device", "level", "wanted", "dtype", "reduce"),
    [
        (CPU, "O0", "auto", torch.float32, None),
        (CPU, "O1", "auto", torch.bfloat16, None),
        (CPU, "O2", "bf16", torch.bfloat16, torch.bfloat16),
        *(
            case
            for device in (CUDA, NPU)
            for case in (
                (device, "O0", "fp16", torch.float32, None),
                (device, "O1", "auto", torch.float16, None),
                (device, "O2", "auto", torch.float16, torch.float16),
                (device, "O2", "bf16", torch.bfloat16, torch.bfloat16),
            )
        ),
    ],
)
def test_dtypes(device, level, wanted, dtype, reduce):
    precision = Precision(device, level, "128", wanted)
    assert precision.dtype is dtype
    assert precision.reduce_dtype is reduce
    assert precision.static_scale == (128 if dtype is torch.float16 else 1)
    assert not precision.scaler.is_enabled()
    assert str(precision).startswith(level)


def test_bf16_and_fp32_need_no_scale_however_it_was_asked():
    for level in ("O0", "O1", "O2"):
        precision = Precision(CPU, level, "dynamic")
        assert not precision.scaler.is_enabled()
        assert precision.static_scale == 1
        assert precision.scaler.state_dict() == {}


@pytest.mark.usefixtures("_no_bf16")
@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        (CPU, {"level": "O3"}, "--amp O3: not one of O0, O1, O2"),
        (
            CPU,
            {"level": "O1", "dtype": "fp16"},
            "--amp_dtype fp16: of no use on this cpu",
        ),
        (CUDA, {"level": "O1", "dtype": "bf16"}, "--amp_dtype bf16: of no use on this cuda"),
        (NPU, {"level": "O2", "dtype": "bf16"}, "--amp_dtype bf16: of no use on this npu"),
        (NPU, {"level": "O1", "loss_scale": "dynamic"}, "--loss_scale dynamic: this NPU hides"),
        *(
            (CUDA, {"level": "O1", "loss_scale": scale}, f"--loss_scale {scale}: not 'dynamic'")
            for scale in ("0", "-1", "inf", "nan", "auto", "")
        ),
    ],
)
def test_refusals(device, options, words):
    with pytest.raises(UserError) as error:
        Precision(device, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("level", "dtype"), [("O0", torch.float32), ("O1", torch.bfloat16)])
def test_autocast(level, dtype):
    with Precision(CPU, level).autocast():
        assert nn.Linear(3, 2)(torch.zeros(1, 3)).dtype is dtype


def train(precision, steps=3, clip_norm=0.0, spoil=None):
    """Some steps of a small network; returns its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = build_sgd(list(model.parameters()), CPU, lr=0.1, momentum=0.9, weight_decay=1e-3)
    model, optimizer = precision.prepare(model, optimizer)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model(torch.randn(16, 5)).square().sum() * (spoil or {}).get(step, 1.0)
        precision.backward(loss, optimizer)
        precision.step(optimizer, clip_norm)
    return [parameter.detach().clone() for parameter in model.parameters()]


def with_scale(scale):
    precision = Precision(CPU)
    if scale == "dynamic":
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    else:
        precision.static_scale = scale
    return precision


class Twice(nn.Conv2d):
    """Multiplies its weight in fp32 before it is used."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 1.001, self.bias)


class Small(nn.Module):
    """Has weights that are used twice, in one place or in two, in fp32, frozen, or not at all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.repeated = nn.Conv2d(4, 4, 1, bias=False)
        self.same = nn.ModuleList([self.repeated, self.repeated])
        self.norm = nn.BatchNorm2d(4)
        self.twice = Twice(4, 4, 1)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.unused = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.repeated(self.first(x)))
        for layer in self.same:
            x = layer(x).relu()
        x = self.frozen(self.twice(x))
        return self.last(x.mean((2, 3)))


def gradients_of(model, network):
    """The outputs and gradients of a step under autocast; `network` is the model, wrapped or not"""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with Precision(CPU, "O1").autocast():
        outputs = network(torch.randn(2, 3, 8, 8))
    outputs.float().square().sum().backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("group_bytes", [1, 100, 25 << 20])
def test_weights_cast_in_groups_give_the_same_bits(monkeypatch, group_bytes, layout):
    monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
    torch.manual_seed(0)
    model = Small().to(memory_format=layout)
    plain = copy.deepcopy(model)
    outputs, gradients = gradients_of(plain, plain)
    network, _ = Precision(CPU, "O1").prepare(model, None)
    assert len(network.groups) == {1: 7, 100: 2, 25 << 20: 1}[group_bytes]
    grouped_outputs, grouped_gradients = gradients_of(model, network)
    assert torch.equal(outputs, grouped_outputs)
    for name, gradient in gradients.items():
        grouped = grouped_gradients[name]
        if gradient is None:
            assert grouped is None
        else:
            assert grouped.dtype is torch.float32
            assert grouped.stride() == model.get_parameter(name).stride()
            assert torch.equal(gradient, grouped)
    assert gradients["unused.weight"] is gradients["frozen.weight"] is None
    for (name, expected), found in zip(
        plain.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name


def test_groups_are_neighbours_and_the_first_is_what_is_left(monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", 100)
    network, _ = Precision(CPU, "O1").prepare(Small(), None)
    assert [set(group) for group in network.groups] == [
        {"first.weight", "first.bias", "repeated.weight"},
        {"unused.weight", "unused.bias", "last.weight", "last.bias"},
    ]


def test_in_fp32_the_network_is_as_it_was():
    model = Small()
    assert Precision(CPU).prepare(model, None) == (model, None)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("scale", [128.0, 1000.0, "dynamic"])
def test_a_scale_changes_no_step(scale, clip_norm):
    plain = train(Precision(CPU), clip_norm=clip_norm)
    scaled = train(with_scale(scale), clip_norm=clip_norm)
    for a, b in zip(scaled, plain, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    if scale == 128.0 and not clip_norm:  # a power of two rounds nothing
        assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))


@pytest.mark.parametrize("scale", [None, 128.0, "dynamic"])
def test_clipping_bounds_the_global_norm(scale):
    precision = Precision(CPU) if scale is None else with_scale(scale)
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(CPU_ONE)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    # The third has no gradient: an unused parameter must not be an error.
    loss = (parameters[0] * 300).sum() + (parameters[1] * 400).sum()
    precision.backward(loss, optimizer)
    norm = precision.step(optimizer, clip_norm=10.0)
    assert_close(norm, torch.tensor(590000.0).sqrt())
    moved = torch.cat([p.detach() for p in parameters[:2]])
    assert_close(moved.norm(), torch.tensor(10.0))
    assert_close(moved[3] / moved[0], torch.tensor(400 / 300))


@pytest.mark.parametrize("scale", [None, 128.0, "dynamic"])
def test_clipping_each_bounds_every_norm(scale):
    precision = Precision(CPU) if scale is None else with_scale(scale)
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    loss = (parameters[0] * 1e6).sum() + (parameters[1] * 0.25).sum() + (parameters[2] * 0).sum()
    precision.backward(loss, optimizer)
    precision.step(optimizer, clip_each=2.0)
    for parameter, moved in zip(parameters, (1.0, 0.25, 0.0), strict=True):
        assert_close(parameter.detach(), torch.full((4,), -moved))


CPU_ONE = torch.ones(1)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_dynamic_scale_skips_an_overflow_and_falls(clip_norm):
    precision = with_scale("dynamic")
    before = train(precision, steps=1, clip_norm=clip_norm)
    precision = with_scale("dynamic")
    after = train(precision, steps=2, clip_norm=clip_norm, spoil={1: float("inf")})
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert precision.scaler.get_scale() == 128

    other = with_scale("dynamic")
    other.scaler.load_state_dict(precision.scaler.state_dict())
    assert other.scaler.get_scale() == 128


def test_default_level(monkeypatch):
    for fast, level in ((True, "O1"), (False, "O0")):
        monkeypatch.setattr(module, "has_bf16", lambda device, fast=fast: fast)
        assert default_level(CPU, "O2") == level
        assert default_level(CUDA, "O2") == "O2"


def test_sgd_is_the_plain_one():
    results = []
    for build in (
        lambda p: build_sgd(p, CPU, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 7)), nn.Parameter(torch.ones(2, 2))]
        optimizer = build(parameters)
        for _ in range(4):
            optimizer.zero_grad()
            sum((p**3).sum() for p in parameters).backward()
            optimizer.step()
        results.append([p.detach() for p in parameters])
        assert len(optimizer.param_groups) == 1
    assert_close(*results)


def test_sgd_after_a_first_step_that_overflowed():
    weight = nn.Parameter(torch.ones(3))
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        optimizer = build_sgd([weight], CPU, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu")
        for gradient in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(weight.sum() * gradient).backward()
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(weight.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize(("device", "fused"), [(CPU, True), (NPU, False)])
@pytest.mark.usefixtures("_no_bf16")
def test_sgd_is_fused_where_the_device_can(device, fused):
    optimizer = build_sgd([nn.Parameter(torch.ones(1))], device, lr=0.1)
    assert optimizer.defaults["fused"] is fused
    assert optimizer.defaults["foreach"] is not fused


@pytest.mark.parametrize(
    ("kernel", "cann", "obstacle"),
    [(False, True, "this torch_npu has no"), (True, False, "this CANN has no"), (True, True, None)],
)
def test_an_npus_sgd_is_fused_where_torch_npu_and_cann_have_it(monkeypatch, kernel, cann, obstacle):
    monkeypatch.setattr(device_module, "has_bf16", lambda device: True)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, key: kernel
    )
    monkeypatch.setattr(device_module, "_cann_has", lambda function: cann)
    found = obstacle_to_fused_sgd(NPU)
    if obstacle is None:
        assert found is None
    else:
        assert found.startswith(obstacle)


def test_fp32_on_cuda_is_exact_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    precision = Precision(CUDA, "O0")
    assert str(precision) == "O0 (float32, loss scale 1), TF32 in convolutions (see --exact)"
    be_exact(CUDA)
    assert str(precision) == "O0 (float32, loss scale 1)"
    assert fp32_shortcuts(CPU) == []


AMP = """
import contextlib
calls = []

def initialize(model, optimizer, opt_level, loss_scale):
    calls.append(("initialize", opt_level, loss_scale))
    return model, optimizer

@contextlib.contextmanager
def scale_loss(loss, optimizer):
    calls.append("scale")
    yield loss * 4
    calls.append("unscale")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad /= 4
"""


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """Puts a package `apex` of the given files first on the path."""

    def install(**files):
        (tmp_path / "apex").mkdir()
        for name, text in files.items():
            (tmp_path / "apex" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_apex_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"--amp_backend apex: .*leave it to native"):
        Precision(CUDA, "O2", "128", backend="apex")
    Precision(CUDA, "O0", backend="apex")  # nothing to do for it


def test_the_other_package_of_that_name(apex):
    apex(__init__="from_pypi = True")
    with pytest.raises(UserError, match=r"apex: No module named .*PyPI's apex is a web toolkit"):
        Precision(CUDA, "O2", "128", backend="apex")


@pytest.mark.parametrize("scale", ["128", "dynamic"])
def test_apex_is_used_in_its_order(apex, scale):
    apex(__init__="from apex import amp", amp=AMP)
    precision = Precision(CUDA, "O2", scale, backend="apex")
    assert precision.reduce_dtype is None
    assert precision.static_scale == 1  # no scale of ours beside apex's
    assert not precision.scaler.is_enabled()
    parameters = train(precision, steps=2)

    import apex as package

    assert package.amp.calls == [
        ("initialize", "O2", scale),
        "scale",
        "unscale",
        "scale",
        "unscale",
    ]
    plain = train(Precision(CPU), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, plain, strict=True))
    assert not precision.autocast()._enabled
    assert str(precision).startswith("apex O2")
