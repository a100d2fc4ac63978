"""Training on several processes that torchrun started.

Every process takes its share of each batch, in the order of ranks, so that a run is the same run
on any number of processes: gradients are means over all of them, batch norm is synchronised, and
``MemoryQueue.update`` gathers the features of all ranks. Logs, checkpoints and bundles are written
by the process of rank 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ..utils.extras import require

_TIMEOUT = timedelta(hours=1)  # in which rank 0 must have validated
_STOP_EVERY = 16  # steps between two questions whether to stop, where asking stalls a GPU


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: number of this process, from 0.
        count, local_count: number of processes on all machines, and on this one.
    """

    rank: int = 0
    count: int = 1
    local_count: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """The processes that torchrun describes in the environment; without it, this one alone."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        rank, count, local = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
        return cls(rank, count, local)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part [B / count, ...] of a whole batch [B, ...], in the order of ranks."""
        return batch.chunk(self.count)[self.rank] if self.count > 1 else batch

    def check_batch(self, size: int) -> None:
        """Raise ``ValueError`` unless a batch of that size can be shared out evenly."""
        if size % self.count:
            below, above = size // self.count * self.count, -(-size // self.count) * self.count
            fitting = " or ".join(str(n) for n in (below, above) if n)
            raise ValueError(
                f"the batch of {size} images cannot be shared out over {self.count} processes; a "
                f"batch of {fitting} would fit."
            )

    def fabric_arguments(self, device: torch.device) -> dict[str, Any]:
        """Arguments of Lightning's ``Fabric`` for these processes."""
        if self.count == 1:
            if device.type != "cuda":
                return {"devices": 1}
            unnumbered = device == torch.device("cuda")
            return {"devices": [torch.cuda.current_device() if unnumbered else device.index]}
        strategy = require("lightning_fabric.strategies", "train").DDPStrategy(
            timeout=_TIMEOUT,
            broadcast_buffers=False,  # they are equal on all ranks anyway, and the queues are large
            gradient_as_bucket_view=True,
        )
        nodes = self.count // self.local_count
        return {"devices": self.local_count, "num_nodes": nodes, "strategy": strategy}

    def agree(self, flag: bool, device: torch.device, step: int, last: bool) -> bool:
        """Whether the flag is true in any process.

        On GPUs the processes only compare it at every 16th step and after the ``last`` of an epoch.
        """
        if self.count == 1:
            return flag
        if device.type == "cuda" and step % _STOP_EVERY and not last:
            return False
        flags = torch.tensor(int(flag), device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Leave the group of processes, at the end of the run."""
        if self.count > 1:
            dist.destroy_process_group()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all processes' equally large batches, on CPUs, where PyTorch has none."""

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = dist.get_world_size() * x.numel() // x.shape[1]
        mean = all_reduce(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        normed = centred * scale[:, None, None] + self.bias[:, None, None]
        return normed.to(input.dtype)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Replace the batch norms of a module by synchronised ones; its state dict keeps its names."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            synchronise_batch_norm(child, device)
        elif device.type == "cuda":
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            child.__class__ = SyncBatchNorm2d
