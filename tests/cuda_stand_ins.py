"""What captures call of ``torch.cuda``, played on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    """A stream that notes its device and the streams it waits for."""

    def __init__(self, device: Any = None) -> None:
        self.device, self.waits = device, []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)

    def synchronize(self) -> None:
        Cuda.now.synchronised += 1


class Graph(TorchDispatchMode):
    """Records the operations of a call, and runs them anew on the tensors that they had then.

    As in a pool of memory that graphs share, a replay leaves nothing of what others computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def _fresh(self) -> Iterator[Tensor]:
        """Tensors in memory of the graph's own."""
        for _, args, kwargs, result in self._calls:
            taken = {_address(x) for x in _tensors((args, kwargs))}
            yield from (x for x in _tensors(result) if _address(x) not in taken)

    def replay(self) -> None:
        self.replays += 1
        for other in Cuda.now.graphs:
            for x in other._fresh() if other.pool == self.pool else ():
                x.fill_(torch.nan if x.is_floating_point() else 77)
        for func, args, kwargs, result in self._calls:
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if _address(old) != _address(new):
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    """Tensors whose memory can be seen, as that of weights packed by oneDNN cannot."""
    found = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return [x for x in found if x.layout is torch.strided]


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Cuda:
    """The stand-ins, and what they have been asked.

    Attributes:
        captures: for each capture the device that was entered, and the stream and pool given.
        capturing: captures under way, of which PyTorch allows one.
    """

    now: Cuda

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Cuda.now = self
        self.graphs: list[Graph] = []
        self.captures: list[tuple[Any, Stream, Any]] = []
        self.entered: list[Any] = []
        self.pools = self.synchronised = self.capturing = 0
        self.current = Stream()
        empty = torch.empty
        for name, value in {
            "Stream": Stream, "CUDAGraph": Graph, "graph": self._graph, "device": self._device,
            "stream": self._on, "current_stream": lambda device=None: self.current,
            "graph_pool_handle": self._pool,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
        monkeypatch.setattr(
            torch, "empty", lambda *shape, pin_memory=False, **how: empty(*shape, **how)
        )

    def _pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        self.entered.append(device)
        yield
        self.entered.pop()

    @contextmanager
    def _graph(
        self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.captures.append((self.entered[-1] if self.entered else None, stream, pool))
        graph.pool, graph.mode = pool, capture_error_mode
        self.graphs.append(graph)
        self.capturing += 1
        assert self.capturing == 1
        try:
            with graph:
                yield
        finally:
            self.capturing -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)
