"""The simulation itself: tensors, autocast, scaler, optimizers and files behave as on the CPU.

What runs is torch_npu's own Python and C++ code; only CANN and the kernels are replaced.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from common.npu.device import be_exact, fp32_shortcuts

pytestmark = pytest.mark.npu_sim

X = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
OPERATIONS = {
    "scalar": lambda x: 2 * x + 1,
    "view": lambda x: x.transpose(1, 2)[:, 1:].unsqueeze(0),
    "in place": lambda x: x.clone().mul_(3).clamp_(-1, 4),
    "in place on a view": lambda x: x.clone().transpose(0, 2).mul_(2),
    "index_put": lambda x: x.clone().index_put_((torch.tensor([1], device=x.device),), x[0]),
    "several results": lambda x: x.topk(2, dim=1)[0] + x.sort(dim=1)[0][:, :2],
    "list": lambda x: torch.cat([x, x.flip(2)], dim=2),
    "list results": lambda x: torch.stack(x.split(1, dim=1)),
    "foreach": lambda x: torch.stack(torch._foreach_mul([x, x + 1], 0.5)),
    "out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "out, resized": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "index": lambda x: x[:, torch.tensor([2, 0], device=x.device)],
    "scatter": lambda x: torch.zeros_like(x).scatter_add_(2, (x > 0).long(), x),
    "types": lambda x: x.half().to(torch.bfloat16).long().bool(),
    "factory": lambda x: torch.arange(4, device=x.device) * torch.ones(4, device=x.device) + x,
    "where": lambda x: torch.where(x > 0, x, torch.zeros((), device=x.device)),
    "channels last": lambda x: x.unsqueeze(0).contiguous(memory_format=torch.channels_last) + 1,
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1) + 1,
    "empty": lambda x: x[:0] + 1,
    "matmul": lambda x: x @ x.transpose(1, 2),
    "one_hot": lambda x: nn.functional.one_hot((x > 0).long(), 2),
    "interpolate": lambda x: nn.functional.interpolate(x, size=7, mode="nearest"),
    "loss": lambda x: nn.functional.cross_entropy(x, torch.ones(2, 4, device=x.device).long()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(npu, name):
    expected, found = OPERATIONS[name](X), OPERATIONS[name](X.to(npu))
    assert found.device == npu
    assert (found.dtype, found.shape, found.stride()) == (
        expected.dtype, expected.shape, expected.stride(),
    )  # fmt: skip
    assert torch.equal(found.cpu(), expected)


def test_arrays_of_the_host_are_refused(npu):
    x = X.to(npu)
    assert torch.equal((x * torch.tensor(2.0)).cpu(), 2 * X)
    for act in (torch.add, torch.matmul, lambda x, y: torch.cat([x, y])):
        for pair in ((x, X.mT), (X, x.mT)):
            with pytest.raises(RuntimeError, match=r"same device|all tensors on the NPU"):
                act(*pair)


def test_device(npu):
    assert (torch.npu.is_available(), torch.npu.device_count()) == (True, 8)
    assert torch.npu.get_device_name(0) == "Ascend910B3"
    assert torch.npu.is_jit_compile_false()
    assert torch.npu.is_bf16_supported()
    assert torch.accelerator.current_accelerator().type == "npu"
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.max_memory_allocated()
    x = torch.zeros(1 << 20, device=npu)
    # A block that earlier tests left is not split for less than 1 MiB.
    assert 0 <= torch.npu.max_memory_allocated() - before - x.nbytes <= 1 << 20
    event = torch.npu.current_stream().record_event()
    event.synchronize()
    torch.npu.synchronize()


def test_fp32_is_exact_where_it_is_asked_for(npu):
    assert fp32_shortcuts(npu) == ["HF32 in convolutions"]
    try:
        be_exact(npu)
        assert fp32_shortcuts(npu) == []
    finally:
        torch.npu.conv.allow_hf32 = True


# Types that autocast gives, as measured with torch_npu 2.13.0 (float32 input).
CASTS = {
    torch.float16: {
        "conv2d": lambda x: nn.functional.conv2d(x, x),
        "linear": lambda x: nn.functional.linear(x, x[0, 0]),
        "matmul": lambda x: x @ x,
    },
    torch.float32: {
        "softmax": lambda x: x.softmax(-1),
        "sum": lambda x: x.sum(),
        "smooth_l1": lambda x: nn.functional.smooth_l1_loss(x, x),
        "batch_norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
        "relu": lambda x: x.relu(),
        "max_pool2d": lambda x: nn.functional.max_pool2d(x, 2),
    },
}


@pytest.mark.parametrize(
    ("dtype", "name"), [(dtype, name) for dtype, group in CASTS.items() for name in group]
)
def test_autocast(npu, dtype, name):
    x = torch.ones(2, 2, 4, 4, device=npu)
    with torch.autocast("npu", dtype=torch.float16):
        assert CASTS[dtype][name](x).dtype == dtype


def train(device, steps=6, scaler=None, half=None, **options):
    """Losses and parameters after a few steps of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 49, 5),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    draws, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        images = torch.randn(4, 3, 17, 17, generator=draws).to(device)
        labels = torch.randint(5, (4,), generator=draws).to(device)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            outputs = model(images)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        losses.append(loss.item())
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_training_equals_the_cpus(npu, how):
    expected, found = train(torch.device("cpu"), **how), train(npu, **how)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))


def test_scaled_half_precision_stays_near(npu):
    exact = train(torch.device("cpu"))[0]
    scaler = torch.amp.GradScaler("npu", init_scale=128.0)
    found = train(npu, scaler=scaler, half=torch.float16)[0]
    assert found == pytest.approx(exact, rel=0.02)
    assert found != exact
    assert scaler.get_scale() == 128


def test_the_scaler_skips_an_overflow(npu):
    weight = nn.Parameter(torch.ones(2, device=npu))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("npu", init_scale=4.0)
    for gradient, expected in ((float("inf"), 1.0), (1.0, 0.9)):
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert weight.tolist() == pytest.approx([expected] * 2)
    assert scaler.get_scale() == 2


def test_files_are_read_without_an_npu(npu, tmp_path):
    torch.save({"x": X.to(npu)}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", map_location=npu)["x"].device == npu
    program = (
        "import sys, torch; x = torch.load(sys.argv[1], map_location='cpu')['x'];"
        "assert x.shape == (2, 3, 4) and 'torch_npu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "x.pt"], check=True)


def test_random_numbers_follow_the_seed(npu):
    def draw():
        torch.manual_seed(5)
        return torch.rand(4, device=npu).cpu()

    assert torch.equal(draw(), draw())


def test_an_operator_that_needs_cann_is_refused(npu):
    import torch_npu

    with pytest.raises(RuntimeError):
        torch_npu.npu_iou(torch.ones(2, 4, device=npu), torch.ones(2, 4, device=npu))
