"""Normalization over the batch: BatchNorm and InstanceNorm, whose running statistics are buffers.

`running_mean` and `running_var` are (num_features,); `num_batches_tracked` is an int64 scalar.
In training the statistics of the batch are used and folded in; in evaluation the running ones are
used, if tracked.
"""

from __future__ import annotations

import flame
import flame.nn.functional as F
from flame.core.dtypes import DType
from flame.nn import init
from flame.nn._arguments import Device, wrong_input
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
]


class _StatisticsNorm(Module):
    """Scale, shift and running statistics for each channel."""

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        bias: bool,
        device: Device,
        dtype: DType | None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        shape = (num_features,)

        def parameter(wanted: bool) -> Parameter | None:
            return Parameter(flame.empty(shape, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        tracked = track_running_stats
        zeros = flame.zeros(shape, device=device, dtype=dtype) if tracked else None
        ones = flame.ones(shape, device=device, dtype=dtype) if tracked else None
        count = flame.zeros((), device=device, dtype=flame.int64) if tracked else None
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", ones)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the running statistics: mean 0, variance 1, no batches seen."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0, no running statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )


class _BatchNorm(_StatisticsNorm):
    ranks: tuple[int, ...] = ()
    layout = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: DType | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in self.ranks or input.shape[1] != self.num_features:
            raise wrong_input(
                self,
                self.layout.format(self.num_features),
                input.shape,
                f"parameters and statistics are ({self.num_features},)",
            )
        use_batch = self.training or self.running_mean is None
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=use_batch,
            momentum=self._count_batch(),
            eps=self.eps,
        )

    def _count_batch(self) -> float:
        """The weight of this batch in the running statistics; without a momentum, all
        batches weigh the same.
        """
        counter = self.num_batches_tracked if self.training else None
        if counter is not None:
            counter.add_(1)
            if self.momentum is None:
                return 1.0 / float(counter.item())
        return 0.0 if self.momentum is None else self.momentum


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, L) for each channel C.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    ranks = (2, 3)
    layout = "(N, {0}) or (N, {0}, L)"


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) for each channel C.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    ranks = (4,)
    layout = "(N, {0}, H, W)"


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) for each channel C.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    ranks = (5,)
    layout = "(N, {0}, D, H, W)"


class _InstanceNorm(_StatisticsNorm):
    axes = 0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: DType | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        batched = input.ndim == self.axes + 2
        if not (batched or input.ndim == self.axes + 1) or (
            input.shape[-self.axes - 1] != self.num_features
        ):
            spatial = ", ".join("DHW"[-self.axes :]) if self.axes > 1 else "L"
            raise wrong_input(
                self,
                f"(N, {self.num_features}, {spatial}) or ({self.num_features}, {spatial})",
                input.shape,
                f"num_features is {self.num_features}",
            )
        result = F.instance_norm(
            input if batched else input.unsqueeze(0),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_input_stats=self.training or not self.track_running_stats,
            momentum=0.0 if self.momentum is None else self.momentum,
            eps=self.eps,
        )
        return result if batched else result.squeeze(0)


class InstanceNorm1d(_InstanceNorm):
    """Normalization of (N, C, L) over L for each sample and channel.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016.
    """

    axes = 1


class InstanceNorm2d(_InstanceNorm):
    """Normalization of (N, C, H, W) over H and W for each sample and channel.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016.
    """

    axes = 2


class InstanceNorm3d(_InstanceNorm):
    """Normalization of (N, C, D, H, W) over D, H and W for each sample and channel.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016.
    """

    axes = 3
