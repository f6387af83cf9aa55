"""Batch norms whose statistics are those of the images of all ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.npu import distributed
from common.npu.operators import constant

IMAGES_AND_PIXELS = (0, 2, 3)  # dimensions of a feature map (N, C, H, W)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that takes mean and variance over the batches of all ranks in training.

    It needs one small collective forward and one backward, which all ranks must come to in the same
    order. Their batches may differ in size. torch's SyncBatchNorm runs on CUDA alone, and there
    each call makes the host wait for the device, as it selects the ranks with images by a mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """Return the batch norm of a feature map (N, C, H, W), without counting the batch."""
        if not self.training:
            return super().forward(x)
        normalised, mean, variance, count = _BatchNormOverRanks.apply(
            x, self.weight, self.bias, self.eps
        )
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return normalised


class _BatchNormOverRanks(torch.autograd.Function):
    """The batch norm of a rank's feature map by the statistics of all ranks.

    Statistics are fp32 where the feature map is in half precision.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics_over_ranks(x)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        normalised = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        return normalised, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        reciprocal = torch.rsqrt(variance + ctx.eps)
        # What the gradients are as long as mean and variance are constants. CUDA's kernel takes
        # `mean` and `reciprocal`, that of a CPU `mean` and `variance`: each insists on its own.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, reciprocal, False, ctx.eps, [False, True, True]
        )
        means = torch.cat([grad_weight, grad_bias])
        if distributed.exchanges():
            dist.all_reduce(means)
        weight_mean, bias_mean = (means / count).chunk(2)
        # With z = (x - mean) / deviation, the gradient of x is
        # weight / deviation * (grad - bias_mean - z * weight_mean).
        scale = weight * reciprocal
        slope = -scale * reciprocal * weight_mean
        offset = -scale * bias_mean - slope * mean
        grad_x = grad * _for_maps(scale) + (x * _for_maps(slope) + _for_maps(offset))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _for_maps(values: Tensor) -> Tensor:
    """Return values of C channels in the shape in which they meet feature maps."""
    return values.view(1, -1, 1, 1)


def _statistics_over_ranks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance (C,) over all ranks, and how many values a channel has ()."""
    num_channels = x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, IMAGES_AND_PIXELS, correction=0)
    count = constant((x.numel() / num_channels,), x.device)
    of_rank = torch.cat([mean, variance, count])
    of_ranks = [of_rank]
    if distributed.exchanges():
        of_ranks = [torch.empty_like(of_rank) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, of_rank)
    means, variances, counts = torch.stack(of_ranks).split([num_channels, num_channels, 1], dim=1)
    total = counts.sum()
    shares = counts / total
    mean = (means * shares).sum(dim=0)
    variance = ((variances + (means - mean).square()) * shares).sum(dim=0)
    return mean, variance, total


def synchronise_norms(model: nn.Module) -> int:
    """Let the batch norms that train take their statistics over all ranks; return their number.

    The names of the weights stay, and frozen batch norms stay as they are.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.weight.requires_grad:
            module.__class__ = SyncBatchNorm2d
            count += 1
    return count
