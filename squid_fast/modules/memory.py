"""Space-aware memories, stacked: the N memories of a block are one tensor [N, M, C].

State dicts keep the published form, one entry ``{i}.memMatrix`` [M, C] for each memory.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from .. import ops


def describe_shrinkage(shrink_thres: int | float) -> str:
    """What the published argument ``shrink_thres`` chooses, which depends on its Python type."""
    if shrink_thres == 0:
        return "no shrinkage: raw dot products are the weights"
    if isinstance(shrink_thres, int):
        return f"Gumbel shrinkage, top {shrink_thres} (which keeps {shrink_thres - 1} slots)"
    return f"hard shrinkage, threshold {shrink_thres} (give an int for Gumbel shrinkage)"


class _Memory(nn.Module):
    """Slots [N, M, C] and their lookup.

    Args:
        num_slots, slot_dim: M and C.
        shrink_thres: int k > 0 Gumbel shrinkage, float > 0 hard shrinkage, 0 none.
        num_memory: N; None for a single memory with queries [B, C], whose state dict has the one
            key ``memMatrix``, as the published class.
    """

    slots: Tensor

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        shrink_thres: int | float = 5,
        num_memory: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(shrink_thres, bool) or not 0 <= shrink_thres < math.inf:
            raise ValueError(
                f"shrink_thres is {shrink_thres!r}; it must be 0, an int k > 0 (Gumbel shrinkage) "
                "or a float > 0 (hard shrinkage)."
            )
        if isinstance(shrink_thres, int) and shrink_thres > num_slots:
            raise ValueError(
                f"shrink_thres is {shrink_thres}, but a memory has only {num_slots} slots; the "
                "k of Gumbel shrinkage cannot exceed the slots."
            )
        if isinstance(shrink_thres, float) and shrink_thres >= 1:
            warnings.warn(
                f"shrink_thres is {shrink_thres!r}, a float, which chooses "
                f"{describe_shrinkage(shrink_thres)}; hard thresholds are usually far below 1.",
                stacklevel=2,
            )
        self.shrink_thres = shrink_thres
        self.single = num_memory is None
        self._register(torch.empty(num_memory or 1, num_slots, slot_dim))
        self.reset_parameters()
        self.register_state_dict_post_hook(self._split)

    def _register(self, slots: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the slots anew."""
        bound = 1 / math.sqrt(self.slots.shape[2])
        self.slots.uniform_(-bound, bound)

    def look_up(self, query: Tensor, values: Tensor | None = None) -> Tensor:
        """Answers in the shape of ``query``, [B, N, C] (or [B, C] for a single memory).

        With ``values`` [N, M, V] their sums [B, N, V], weighted as the slots would be.
        """
        memory = self.slots[0] if self.single else self.slots
        if self.shrink_thres == 0:
            return ops.memory_lookup(query, memory, values=values)
        if isinstance(self.shrink_thres, int):
            return ops.memory_lookup(query, memory, self.shrink_thres, values=values)
        return ops.memory_lookup(query, memory, threshold=self.shrink_thres, values=values)

    def forward(self, query: Tensor) -> Tensor:
        return self.look_up(query)

    def extra_repr(self) -> str:
        N, M, C = self.slots.shape
        return f"N={N}, M={M}, C={C}, {describe_shrinkage(self.shrink_thres)}"

    def _keys(self, prefix: str) -> list[str]:
        if self.single:
            return [f"{prefix}memMatrix"]
        return [f"{prefix}{i}.memMatrix" for i in range(self.slots.shape[0])]

    @staticmethod
    def _split(
        module: _Memory, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        slots = state_dict.pop(f"{prefix}slots", None)
        if slots is not None:  # there are none under a parametrisation
            state_dict.update(zip(module._keys(prefix), _apart(slots), strict=True))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if "slots" not in {**self._parameters, **self._buffers}:  # but under a parametrisation
            args = strict, missing_keys, unexpected_keys, error_msgs
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            return
        published, shape = self._keys(prefix), self.slots.shape[1:]
        absent = [key for key in published if key not in state_dict]
        assign = local_metadata.get("assign_to_params_buffers", False)
        wrong = []
        for value, key in ((state_dict[key], key) for key in published if key in state_dict):
            if not isinstance(value, Tensor):
                wrong.append(f"{key} is of the type {type(value).__name__}, not a tensor")
            elif value.shape != shape:
                wrong.append(f"{key} is {list(value.shape)}, the model's is {list(shape)}")
            elif value.is_meta and not (assign or self.slots.is_meta):
                wrong.append(f"{key} is on the meta device, without values")
        missing_keys.extend(absent)
        error_msgs.extend(wrong)
        if not absent and not wrong:
            slots = torch.stack([state_dict[key].detach() for key in published])
            if assign:
                learned = isinstance(self.slots, nn.Parameter)
                self.slots = nn.Parameter(slots, self.slots.requires_grad) if learned else slots
            else:
                with torch.no_grad():
                    self.slots.copy_(slots)
        known = {*published, *self._load_extra(state_dict, prefix, local_metadata)}
        # Each memory was a submodule in the published code, so its key has a dot too many for
        # PyTorch's own search for unexpected keys.
        unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in known)

    def _load_extra(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> list[str]:
        """Load what a subclass keeps besides the slots; returns the keys it knows."""
        return []


class MemoryMatrix(_Memory):
    """Learnable slots, as in MemAE (Gong et al. 2019): gradients reach queries and slots.

    >>> memory = MemoryMatrix(num_slots=10, slot_dim=4, shrink_thres=3, num_memory=9)
    >>> memory(torch.rand(2, 9, 4)).shape  # position n asks memory n
    torch.Size([2, 9, 4])
    """

    def _register(self, slots: Tensor) -> None:
        self.slots = nn.Parameter(slots)


class MemoryQueue(_Memory):
    """Slots that are features of recent training images (paper section 3.2), never learned.

    In training mode a lookup remembers its queries, and ``update()``, to be called after the
    optimiser's step, writes them over the oldest slots, as in a ring buffer. Of a batch larger
    than M the newest M stay; a second ``update()`` does nothing. Where ``torch.distributed`` runs,
    all processes have to call ``update()``: it gathers their features in the order of ranks, so
    that each holds the queue that one process with the whole batch would. The position in the
    ring, ``ptr``, is kept in the metadata of the state dict, which the published code ignores.

    >>> queue = MemoryQueue(num_slots=4, slot_dim=2, shrink_thres=0).train()
    >>> answers = queue(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> queue.update()
    >>> queue.slots[0, :2].tolist(), int(queue.ptr)
    ([[1.0, 2.0], [3.0, 4.0]], 2)
    """

    ptr: Tensor

    def _register(self, slots: Tensor) -> None:
        self.register_buffer("slots", slots)
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64), persistent=False)
        self.pending: Tensor | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.ptr.zero_()

    def forward(self, query: Tensor) -> Tensor:
        if self.training:
            self.pending = query.detach()
        return self.look_up(query)

    @torch.no_grad()
    def update(self) -> None:
        """Enqueue the features of the last training batch, [B, N, C]."""
        if self.pending is None:
            return
        features = _gathered(self.pending[:, None] if self.single else self.pending)
        self.pending = None
        M, B = self.slots.shape[1], features.shape[0]
        # All B features pass through the ring, of which the newest M stay.
        newest = torch.arange(max(B - M, 0), B, device=self.ptr.device)
        features = features[-M:].transpose(0, 1).to(self.slots.dtype)
        self.slots.index_copy_(1, (self.ptr + newest) % M, features)
        self.ptr.add_(B).remainder_(M)

    @staticmethod
    def _split(
        module: _Memory, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        _Memory._split(module, state_dict, prefix, local_metadata)
        assert isinstance(module, MemoryQueue)
        if not module.ptr.is_meta:
            local_metadata["ptr"] = int(module.ptr)

    def _load_extra(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> list[str]:
        key = f"{prefix}ptr"  # formats without metadata carry it as an entry
        ptr = state_dict.get(key, local_metadata.get("ptr", 0))
        position = torch.as_tensor(ptr, device=self.slots.device).reshape(()) % self.slots.shape[1]
        if self.ptr.device != self.slots.device:  # these were assigned
            self.ptr = torch.empty_like(self.ptr, device=self.slots.device)
        with torch.no_grad():
            self.ptr.copy_(position)
        return [key]


def _apart(slots: Tensor) -> list[Tensor]:
    """The slots [M, C] of each memory, as views of ``slots`` that have storages of their own.

    What writes files of whole storages, as ``safetensors.torch.save_model``, can save them then.
    """
    plain = type(slots) is Tensor and slots.is_contiguous() and not slots.is_inference()
    if len(slots) == 1 or slots.device.type not in ("cpu", "cuda") or not plain:
        return list(slots)
    views, storage, offset = list(slots), slots.untyped_storage(), slots.storage_offset()
    for i, view in enumerate(views):
        size = view.numel() * view.element_size()
        start = offset * view.element_size() + i * size
        # Nothing is written, and autograd is not to think so.
        with torch.no_grad(), _unsafe_preserve_version_counter(view):
            view.set_(storage[start : start + size], 0, view.shape, view.stride())
    return views


def _gathered(features: Tensor) -> Tensor:
    """Features [B, N, C] of all processes, concatenated, from those of this process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return features
    features = features.contiguous()
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features)
    return torch.cat(parts)


class SharedMemoryQueue(MemoryQueue):
    """One queue for all patches wherever they lie, to measure the effect of space-awareness.

    It has the slots of all places together, N * M, and the interface of a ``MemoryQueue`` of N
    memories. Its state dict has the one key ``memMatrix``.
    """

    def __init__(
        self, num_slots: int, slot_dim: int, shrink_thres: int | float = 5, num_memory: int = 9
    ) -> None:
        super().__init__(num_slots * num_memory, slot_dim, shrink_thres, None)

    def look_up(self, query: Tensor, values: Tensor | None = None) -> Tensor:
        own = None if values is None else values[0]
        return super().look_up(query.flatten(0, 1), own).unflatten(0, query.shape[:2])

    @torch.no_grad()
    def update(self) -> None:
        if self.pending is not None:
            self.pending = self.pending.flatten(0, 1)
        super().update()


class _MemoryBlock(nn.Module):
    """Look up a decoder map and, in training, mix the answer with it by a masked shortcut.

    Args:
        num_memory: windows or patches of a map, a square number.
        ratio: chance that a position takes the answer in training, kept as ``mask_ratio``. The
            published models have 0.95 here whatever their own ``ratio`` is.
    """

    single = False

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        num_memory: int = 9,
        shrink_thres: int | float = 5,
        ratio: float = 0.95,
    ) -> None:
        super().__init__()
        self.num_memory = num_memory
        self.mask_ratio = ratio
        self.memory = MemoryMatrix(
            num_slots, slot_dim, shrink_thres, None if self.single else num_memory
        )

    def look_up(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        answer = self.look_up(x)
        if not self.training:
            return answer
        if x.is_contiguous(memory_format=torch.channels_last):
            # What follows has the layout of the answer, and would be copied at every convolution.
            answer = answer.contiguous(memory_format=torch.channels_last)
        return ops.masked_shortcut(answer, x, self.mask_ratio)


class MemoryMatrixBlock(_MemoryBlock):
    """Window i of every map, be it a patch or the whole image, looks up matrix i.

    A window is flattened in the order (row, column, channel).
    """

    def look_up(self, x: Tensor) -> Tensor:
        """[B', c, h, w] -> [B', c, h, w]."""
        side = math.isqrt(self.num_memory)
        B, c, h, w = x.shape
        windows = x.permute(0, 2, 3, 1).reshape(B, side, h // side, side, w // side, c)
        answer = self._ask(windows.transpose(2, 3).reshape(B, self.num_memory, -1))
        answer = answer.view(B, side, side, h // side, w // side, c).transpose(2, 3)
        return answer.reshape(B, h, w, c).permute(0, 3, 1, 2)

    def _ask(self, windows: Tensor) -> Tensor:
        return self.memory(windows)


class MemoryMatrixBlockV3(_MemoryBlock):
    """Patch n looks up matrix n, flattened in the order (channel, row, column)."""

    def look_up(self, x: Tensor) -> Tensor:
        """[B*N, c, h, w] -> [B*N, c, h, w]."""
        query = x.reshape(x.shape[0] // self.num_memory, self.num_memory, -1)
        return self.memory(query).view(x.shape)


class MemoryMatrixBlockV4(MemoryMatrixBlock):
    """Not space-aware: one matrix for the whole map, its windows laid end to end."""

    single = True

    def _ask(self, windows: Tensor) -> Tensor:
        return self.memory(windows.flatten(1))


BLOCKS: dict[str, type[_MemoryBlock]] = {
    block.__name__: block for block in (MemoryMatrixBlock, MemoryMatrixBlockV3, MemoryMatrixBlockV4)
}
