"""BatchNorm of several views at once, each by its own statistics, over the batch of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .across_ranks import gather, ranks

EPS, MOMENTUM = 1e-5, 0.1


class ViewNorm(nn.Module):
    """BatchNorm (Ioffe & Szegedy 2015) of (V, B, C) rows, under the names of torch's ``BatchNorm1d``.

    In training every view is normalised by mean and variance of its own B rows of all ranks, as if the views came one
    after the other through a ``SyncBatchNorm``; so do the running statistics, by which evaluation normalises. They are
    equal on all ranks, and persistent. Float32 throughout: half precision has too few digits for a variance.

    Args:
        features: C.
        affine: Learn a scale and a shift.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        # On the CPU: a build without memory must not lose their values.
        self.register_buffer("running_mean", torch.zeros(features, device="cpu"))
        self.register_buffer("running_var", torch.ones(features, device="cpu"))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """(V, B, C) → the same shape, float32.

        Raises:
            ValueError: In training, a single row: it has no variance.
        """
        x = x.float()
        if self.training:
            mean, variance = self._statistics(x)
        else:
            mean, variance = self.running_mean, self.running_var
        x = (x - mean.unsqueeze(-2)) * (variance + EPS).rsqrt().unsqueeze(-2)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight.float() + self.bias.float()

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(V, C) mean and biased variance of each view over all ranks, which hold as many rows; they are kept."""
        _, count = ranks(self.training)
        rows = count * x.shape[1]
        if rows < 2:
            raise ValueError("train.micro_batch_size=1: a BatchNorm needs at least 2 images, over all ranks; use more")
        # The mean and the variance of each rank, not sums of squares: these lose the variance of a large mean.
        of_ranks = gather(torch.stack((x.mean(1), x.var(1, correction=0))), count)
        means, variances = of_ranks.unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        self._keep(mean.detach(), variance.detach() * (rows / (rows - 1)))
        return mean, variance

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """The views move the running statistics one after the other."""
        for one, other in zip(mean.unbind(0), variance.unbind(0), strict=True):
            self.running_mean.lerp_(one, MOMENTUM)
            self.running_var.lerp_(other, MOMENTUM)
        self.num_batches_tracked.add_(len(mean))
