"""3x3 convolutions in fp32 on a CPU with 2.25 times fewer multiplications.

A CPU's direct convolution runs at the rate of a large matrix product: only less arithmetic can make
it faster. Winograd's minimal filtering F(2x2, 3x3) takes 16 multiplications for 2x2 outputs, not
36: transform 4x4 tiles of the input, which overlap, and the kernel; multiply place by place, which
is 16 matrix products over the channels; transform back. It is as exact: its sums are shorter.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015, arXiv 1509.09308,
section 4.1, whose matrices are B, G and A here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHANNELS = 256  # with fewer, in or out, the transforms of tiles take what the products save
PLACES = 512  # N * H * W; with fewer, the transform of the kernel does
TILES = 300  # about so many at once: the processor's cache holds them until they are multiplied


class Conv2d(nn.Conv2d):
    """nn.Conv2d, in training by Winograd's way where that is faster.

    Not in evaluation, whose last bits then would depend on the number of images at once.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        form = self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        if (
            form == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
            and self.padding_mode == "zeros"
            and torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and min(self.in_channels, self.out_channels) >= CHANNELS
            and x.numel() >= PLACES * self.in_channels
        ):
            return Winograd.apply(x, weight, bias)
        return super()._conv_forward(x, weight, bias)


class Winograd(torch.autograd.Function):
    """conv2d(x, weight, bias, padding=1) of x (N, C, H, W) and weight (K, C, 3, 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, transformed(weight).transpose(1, 2), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        return (
            convolve(grad, transformed(weight.flip(2, 3))) if wanted[0] else None,
            weight_gradient(x, grad) if wanted[1] else None,
            grad.sum(dim=(0, 2, 3)) if wanted[2] else None,
        )


def transformed(weight: Tensor) -> Tensor:
    """G g G^T of (K, C, 3, 3): (16, K, C)."""
    g = weight.permute(2, 3, 0, 1)
    for _ in range(2):  # along the rows, then along the columns
        outer, middle = (g[0] + g[2]) / 2, g[1] / 2
        g = torch.stack((g[0], outer + middle, outer - middle, g[2]), dim=1)
    return g.flatten(0, 1)


def convolve(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, C, H, W) with kernels (16, C, K): (N, K, H, W), channels last."""
    (n, c, height, width), k = x.shape, kernels.shape[2]
    even = n, k, height + height % 2, width + width % 2
    y = torch.empty(even, dtype=x.dtype, memory_format=torch.channels_last)
    for d, out in tiles(x, y):
        m = torch.bmm(d.view(16, -1, c), kernels).view(*d.shape[:5], k)
        if bias is not None:
            m[1, 1] += bias  # A^T m A adds it to each of the four outputs
        half = m.new_empty(4, 2, *m.shape[2:])
        for source, target in ((m, half.unbind(1)), (half, out.unbind(1))):
            torch.add(source[0], source[1], out=target[0]).add_(source[2])
            torch.sub(source[1], source[2], out=target[1]).sub_(source[3])
    cropped = y[:, :, :height, :width]
    return y if cropped.shape == y.shape else cropped.clone(memory_format=torch.channels_last)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Of x (N, C, H, W) and grad (N, K, H, W): (K, C, 3, 3), by the transforms transposed."""
    (_, c, height, width), k = x.shape, grad.shape[1]
    products = x.new_zeros(16, k, c)
    for d, y in tiles(x, nn.functional.pad(grad, (0, width % 2, 0, height % 2))):
        half = y.new_empty(2, 4, *y.shape[2:])
        m = y.new_empty(4, 4, *y.shape[2:])
        for source, target in ((y, half.unbind(1)), (half, m.unbind(1))):
            target[0].copy_(source[0])
            torch.add(source[0], source[1], out=target[1])
            torch.sub(source[0], source[1], out=target[2])
            torch.neg(source[1], out=target[3])
        left, right = m.view(16, -1, k).transpose(1, 2), d.view(16, -1, c)
        torch.baddbmm(products, left, right, out=products)
    u = products.view(4, 4, k, c)
    for _ in range(2):
        mean, half = (u[1] + u[2]) / 2, (u[1] - u[2]) / 2
        u = torch.stack((u[0] + mean, half, mean + u[3]), dim=1)
    return u.permute(2, 3, 0, 1)


def tiles(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of tiles at a time: (4, 4, N, rows, columns, C), (2, 2, N, rows, columns, K).

    B^T d B of x (N, C, H, W), and a view of y (N, K, H, W), whose sizes are rounded up to even.
    """
    (n, c, height, width), even = x.shape, y.shape[2:]
    padded = x.new_zeros(n, even[0] + 2, even[1] + 2, c)
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    inputs = padded.unfold(1, 4, 2).movedim(-1, 0)
    outputs = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(3, 5, 0, 2, 4, 1)
    at_once = max(1, 2 * TILES // (n * even[1]))
    for rows, part in zip(inputs.split(at_once, 2), outputs.split(at_once, 3), strict=True):
        half = rows.new_empty(rows.shape)
        columns = half.unfold(3, 4, 2).movedim(-1, 0)
        d = columns.new_empty(columns.shape)
        for source, target in ((rows, half), (columns, d.unbind(1))):
            torch.sub(source[0], source[2], out=target[0])
            torch.add(source[1], source[2], out=target[1])
            torch.sub(source[2], source[1], out=target[2])
            torch.sub(source[1], source[3], out=target[3])
        yield d, part
