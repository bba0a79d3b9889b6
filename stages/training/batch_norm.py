"""Batch normalization over the whole batch when several processes share it."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from stages.training.processes import Processes


def synchronize_batch_norm(network: nn.Module, processes: Processes) -> None:
    """Replace it in the network where there are several processes: what is trained is the same."""
    if processes.size == 1:
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, _synchronized(child, processes.device))


def _synchronized(layer: nn.modules.batchnorm._BatchNorm, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)  # type: ignore[no-untyped-call]
        return converted
    return SyncBatchNorm(layer)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's nn.SyncBatchNorm for CPUs, which that refuses; over all dimensions but the second."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self._parameters, self._buffers = layer._parameters, layer._buffers

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        axes = [axis for axis in range(images.ndim) if axis != 1]
        shape = [1, -1] + [1] * (images.ndim - 2)
        values = images.float()
        count = values.new_full((1,), values.numel() // values.shape[1])
        total = _Sum.apply(torch.cat([values.sum(axes), count]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = values - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        result: Tensor = normalized.to(images.dtype)
        return result

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Any number of dimensions will do."""

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, momentum or 0.0)
        self.running_var.lerp_(variance, momentum or 0.0)


class _Sum(torch.autograd.Function):
    """The sum over all processes, forward and backward."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total
