import pytest
import torch
from torch.nn.functional import conv2d
from torch.testing import assert_close

from ssd_mmdet import winograd
from ssd_mmdet.config import RECIPES
from ssd_mmdet.model import build_model
from ssd_mmdet.winograd import Conv2d, Winograd


def drawn(n, c, k, height, width, dtype=torch.float32):
    """Input, weight, bias, and the gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    shapes = (n, c, height, width), (k, c, 3, 3), (k,), (n, k, height, width)
    x, weight, bias, grad = (torch.randn(s, generator=draw, dtype=dtype) for s in shapes)
    return (x, weight / (9 * c) ** 0.5, bias), grad


def results(function, given, grad):
    """Output and gradients, in fp64."""
    given = [part.detach().clone().requires_grad_() for part in given]
    y = function(*given)
    kept = y.detach().clone()
    y.mul_(2).backward(grad)  # in place, as the ReLUs of the network
    return [kept.double(), *(part.grad.double() for part in given)]


def direct(*given):
    return conv2d(*given, padding=1)


@pytest.fixture
def used(monkeypatch):
    """The shapes of the inputs that went the faster way."""
    shapes = []
    apply = Winograd.apply
    monkeypatch.setattr(
        winograd.Winograd, "apply", lambda x, *rest: shapes.append(x.shape) or apply(x, *rest)
    )
    return shapes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "sizes", [(2, 64, 48, 38, 38), (3, 33, 70, 19, 24), (1, 16, 16, 75, 7), (5, 3, 4, 1, 2)]
)
def test_as_exact_as_the_direct_way(sizes, layout):
    given, grad = drawn(*sizes)
    given = [given[0].to(memory_format=layout), given[1].to(memory_format=layout), given[2]]
    exact = results(direct, [part.double() for part in given], grad.double())
    found, again = (results(Winograd.apply, given, grad) for _ in range(2))
    for own, same, peer, value in zip(
        found, again, results(direct, given, grad), exact, strict=True
    ):
        assert torch.equal(own, same)
        assert (own - value).std() <= 2 * (peer - value).std() + 1e-7 * value.std()


@pytest.mark.parametrize("sizes", [(2, 2, 3, 4, 6), (1, 3, 2, 5, 3)])
def test_gradients(sizes):
    given, _ = drawn(*sizes, dtype=torch.float64)
    given = [part.requires_grad_() for part in given]
    assert torch.autograd.gradcheck(Winograd.apply, given)
    assert torch.autograd.gradcheck(Winograd.apply, (*given[:2], None))
    assert torch.autograd.gradcheck(Winograd.apply, (given[0].detach(), *given[1:]))


def test_blocks_of_rows_are_the_whole(monkeypatch):
    given, grad = drawn(2, 8, 8, 21, 30, dtype=torch.float64)
    whole = results(Winograd.apply, given, grad)
    monkeypatch.setattr(winograd, "TILES", 60)  # two rows of tiles at a time, the last alone
    for part, expected in zip(results(Winograd.apply, given, grad), whole, strict=True):
        assert_close(part, expected)


def test_where_it_is_used(used):
    layer, x = Conv2d(256, 256, 3, padding=1), torch.randn(2, 256, 16, 16)
    expected = direct(x, layer.weight, layer.bias)
    assert_close(layer(x), expected, rtol=0, atol=1e-4)
    assert used == [x.shape]

    used.clear()
    with torch.no_grad():
        assert_close(layer(x), expected, rtol=0, atol=1e-5)
    layer(x[:1])  # small
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.bfloat16()(x.bfloat16())
    for options in ({"stride": 2}, {"dilation": 6}, {"padding": 0}, {"groups": 2}):
        given = {"padding": 1, **options}
        Conv2d(256, 256, 3, **given)(x)
    Conv2d(256, 256, 1)(x)
    Conv2d(256, 255, 3, padding=1)(x)
    assert used == []


def test_an_export_has_plain_convolution(used):
    layer, x = Conv2d(256, 256, 3, padding=1).eval(), torch.randn(2, 256, 16, 16)
    program = torch.export.export(layer, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv2d.default"]
    assert used == []


def test_layers_of_the_network(used):
    build_model(RECIPES["1p"], 80)(torch.randn(2, 3, 300, 300))
    assert [tuple(shape[1:3]) for shape in used] == [
        *[(256, 75)] * 2,
        (256, 38),
        *[(512, 38)] * 2,
        *[(512, 19)] * 3,
        *[(512, 38), (1024, 19)],  # the class convolutions
    ]
