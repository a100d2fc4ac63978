"""Scoring and training walked through on a card that is not there: prints what they would do.

Tensors are fake ones, which have a device, a dtype and strides but no content; ``absent_card.cpp``
has to be preloaded, so that they can lie on "cuda:0". Our launchers run and their launches are
noted; what cuDNN is asked is checked here, since PyTorch without CUDA does not know its rules.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.machine_code.compilers import H100, Launch, recorded
from squid_fast import PRESETS, SQUID, Discriminator
from squid_fast.data import ImageSet
from squid_fast.inference.model import LOGITS, FrozenModel
from squid_fast.modules import discriminator_size
from squid_fast.training import loop
from squid_fast.training.squid import SquidLearner
from squid_fast.training.state import Settings
from tests.cuda_stand_ins import Stream

CUDA, LAST = torch.device("cuda", 0), torch.channels_last
NO_LAUNCH = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
)


# --- stand-ins ------------------------------------------------------------------------------------


def stand_in() -> None:
    """Let ``torch.cuda`` speak of one H100, and fake tensors do what modules ask of tensors."""
    major, minor = (int(digit) for digit in H100.arch.removeprefix("sm_"))
    properties = SimpleNamespace(
        name="H100", major=major, minor=minor, multi_processor_count=H100.multiprocessors,
        shared_memory_per_block_optin=H100.shared_memory,
    )  # fmt: skip
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: True, "set_device": lambda device: None,
        "device": lambda device: nullcontext(), "Stream": Stream,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
    torch.backends.cudnn.is_available = lambda: True
    torch.tensor = _tensor
    nn.Module._apply = _apply  # type: ignore[method-assign]
    FakeTensor.__deepcopy__ = _deep_copy
    FakeTensor.data_ptr = _address  # of which Triton wants to know whether it is aligned


_plain_tensor = torch.tensor


def _tensor(value: Any, *, device: Any = None, **how: Any) -> Tensor:
    found = _plain_tensor(value, **how)
    if isinstance(found, FakeTensor):
        found.constant = None  # whose value would be computed with on the card
    return found if device is None else found.to(device)


def _apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    # PyTorch's own swaps the insides of two tensors, which fake ones do not allow.
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            here = parameter.detach()
            moved = fn(here)
            if moved is not here:
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


def _deep_copy(x: Any, memo: dict[int, Any]) -> Any:
    if id(x) not in memo:
        same = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        is_parameter = isinstance(x, nn.Parameter)
        memo[id(x)] = nn.Parameter(same, x.requires_grad) if is_parameter else same
    return memo[id(x)]


_storages: dict[int, Any] = {}  # kept, so that no two have the same key


def _address(x: Tensor) -> int:
    storage = x.untyped_storage()
    _storages[storage._cdata] = storage
    return (storage._cdata << 16) + x.storage_offset() * x.element_size()


# --- the walk -------------------------------------------------------------------------------------


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _as_seen(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tuple(x.shape), str(x.dtype), x.stride(), str(x.device)) for x in tensors]


def _line() -> str:
    """The line of squid_fast, outside its operators, that is running; in a backward its node."""
    frame = sys._getframe()
    while frame is not None:
        _, ours, path = frame.f_code.co_filename.rpartition("/squid_fast/")
        if ours and not path.startswith(("ops/", "kernels/")):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    node = torch._C._current_autograd_node()
    return "" if node is None else node.name()


class Walk(TorchDispatchMode):
    """Notes what would be launched, and what would be wrong with it.

    Attributes:
        launches: what is launched and the line it is launched from, in order.
        problems: the same of what must not be, with the reason.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._ours = launches
        self.launches: list[tuple[str, str]] = []
        self.problems: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func._schema.name.partition("::")[2], _tensors((args, kwargs))
        if func.namespace.startswith("squid_fast"):
            return self._own(func, name, given, args, kwargs)
        if func.namespace == "prim" or not any(x.is_cuda for x in given):
            result = func(*args, **kwargs)
            if any(x.is_cuda for x in _tensors(result)):
                self._after(func, name, given, _tensors(result))
            return result
        if name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
            bias = 2 if name == "cudnn_convolution_relu" else 4
            return self._convolution(name, given, args[:2], args[bias + 1 :], must_be_last=True)
        if name == "convolution":
            return self._convolution(name, given, args[:2], args[3:])
        if name == "convolution_backward":
            return self._convolution_backward(given, *args)
        if name == "_fused_adam_":
            return self._adam(given, args)
        implicit = torch._C.DispatchKey.CompositeImplicitAutograd
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), implicit
        ):
            with self:  # made of other operations, which inference mode does not show
                return func._op_dk(implicit, *args, **kwargs)
        result = func(*args, **kwargs)
        self._after(func, name, given, _tensors(result))
        return result

    def _problem(self, text: str) -> None:
        self.problems.append(f"{_line()}: {text}")

    def _launch(self, what: str) -> None:
        self.launches.append((what, _line()))

    def _after(self, func: Any, name: str, given: list[Tensor], found: list[Tensor]) -> None:
        """An operation of PyTorch."""
        if any(not x.is_cuda for x in given + found):
            self._problem(f"{name} of {_as_seen(given)} gives {_as_seen(found)}: host and device")
        if func.is_view or name in NO_LAUNCH or not any(x.numel() for x in found):
            return
        if name == "_to_copy" and given[0].dtype != found[0].dtype:
            name = f"{given[0].dtype} to {found[0].dtype}"
        self._launch(name)

    def _own(self, func: Any, name: str, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """An operator of ours: its launchers instead of the description that fake tensors get."""
        definition = torch._library.custom_ops.OPDEFS[func._schema.name]
        before = len(self._ours)
        with self:
            result = definition._init_fn(*args, **kwargs)
        if func.namespace != "squid_fast":  # cuDNN's, see below
            return result
        for launch in self._ours[before:]:
            self._launch(launch.kernel)
        if len(self._ours) == before and any(x.is_cuda and x.numel() for x in given):
            self._problem(f"no kernel serves {name} of {_as_seen(given)}")
        found = _tensors(result)
        places = [x.untyped_storage()._cdata for x in found if x.numel()]
        if len({*places}) < len(places) or {*places} & {x.untyped_storage()._cdata for x in given}:
            self._problem(f"results of {name} share memory, with each other or its arguments")
        promised = _as_seen(_tensors(func(*args, **kwargs)))
        if _as_seen(found) != promised:
            self._problem(f"{name} gives {_as_seen(found)}, its description {promised}")
        return result

    def _operands(self, name: str, given: list[Tensor]) -> None:
        if len({(x.dtype, x.device) for x in given}) > 1:
            self._problem(f"{name} of {_as_seen(given)}: one dtype and device are needed")

    def _layout(self, name: str, x: Tensor, weight: Tensor, *maps: Tensor) -> torch.memory_format:
        """In which cuDNN computes; what has another is copied."""
        last = LAST in (suggest_memory_format(x), suggest_memory_format(weight))
        layout = LAST if last else torch.contiguous_format
        for y in (x, weight, *maps):
            if not y.is_contiguous(memory_format=layout):
                self._launch(f"copy for {name}")
        return layout

    def _convolution(
        self, name: str, given: list[Tensor], maps: Any, where: Any, must_be_last: bool = False
    ) -> Tensor:
        self._operands(name, given)
        (x, weight), (stride, padding) = maps, where[:2]
        if must_be_last and any(
            not y.is_contiguous(memory_format=LAST) or y.data_ptr() % 16
            for y in given
            if y.ndim > 1
        ):
            self._problem(f"{name} of {_as_seen(given)}: aligned channels-last maps are needed")
        layout = self._layout(name, x, weight)
        sides = (
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
        )
        self._launch(name)
        if name == "convolution" and len(given) > 2:
            self._launch("bias of convolution")
        size = (x.shape[0], weight.shape[0], *sides)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)

    def _convolution_backward(
        self, given: list[Tensor], grad: Tensor, x: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        self._operands("convolution_backward", given)
        layout = self._layout("convolution_backward", x, weight, grad)
        results: list[Tensor | None] = [None] * 3
        for i, (shape, wanted) in enumerate(
            zip((x.shape, weight.shape, weight.shape[:1]), rest[-1], strict=True)
        ):
            if wanted:
                self._launch("convolution_backward")
                of = layout if len(shape) == 4 else torch.contiguous_format
                results[i] = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=of)
        return tuple(results)

    def _adam(self, given: list[Tensor], args: Any) -> None:
        for of_parameter in zip(*args[:4], strict=True):
            if len({*_as_seen(list(of_parameter))}) > 1:
                self._problem(f"a parameter with gradient and moments {_as_seen(of_parameter)}")
        if any(not x.is_cuda for x in given):
            self._problem("Adam has tensors on the host")
        self._launch("_fused_adam_")


class _Constructing(TorchDispatchMode):
    """Answers what constructors read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_local_scalar_dense":
            return 1
        return func(*args, **(kwargs or {}))


def score(preset: str, precision: Any, batch: int, dtype: torch.dtype) -> Walk:
    """What a graph of scoring is captured from, with all scores."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        launches = stack.enter_context(recorded(H100))
        model = SQUID.from_preset(preset).eval()
        pair = model, Discriminator(discriminator_size(model.image_size)).eval()
        frozen = FrozenModel(*pair, precision, CUDA)
        # "compile": without oneDNN's calls, of which fake tensors know nothing.
        on_host = FrozenModel(*pair, "float32", "cpu", backend="compile")
        images = torch.zeros(batch, 1, model.image_size, model.image_size, dtype=dtype, device=CUDA)
        asked = (tuple(LOGITS), dtype == torch.float32)
        with torch.inference_mode(), Walk(launches) as walk:
            found = frozen._tabulate(images, *asked)
        with torch.inference_mode():
            expected = on_host._tabulate(images.cpu(), *asked)
        for x, y in zip(found, expected, strict=True):
            if _as_seen([x])[0][:3] != _as_seen([y])[0][:3]:
                walk.problems.append(f"the result is {_as_seen([x])}, on a CPU {_as_seen([y])}")
    return walk


def train(preset: str, precision: Any, batch: int) -> Walk:
    """Two steps, as they are captured: the generator's turn, and the discriminator's alone."""
    configuration = PRESETS[preset]
    recipe = dataclasses.replace(configuration.recipe, batch_size=batch, n_critic=2)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        launches = stack.enter_context(recorded(H100))
        model = SQUID(**configuration.model)
        settings = Settings(model.config, recipe, 0, precision, batch, "")
        with _Constructing():
            learner = SquidLearner(model, settings, CUDA)
        assert learner.graphs
        eager = copy.copy(learner)
        eager.graphs = False
        side = model.image_size
        pixels = torch.zeros(batch, 1, side, side, dtype=torch.uint8, device=CUDA)
        chosen = torch.zeros(batch, dtype=torch.int64, device=CUDA)
        step = loop._step_of(eager, ImageSet(pixels, chosen, [""] * batch), settings)
        with Walk(launches):
            for number in range(2):  # in which gradients and moments come to be
                step(chosen, number)
        with Walk(launches) as walk:
            for number in range(2):
                for name, loss in step(chosen, number).items():
                    if _as_seen([loss]) != [((), "torch.float32", (), str(CUDA))]:
                        walk.problems.append(f"the loss {name} is {_as_seen([loss])}")
    return walk


def main() -> None:
    stand_in()
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        if kind == "score":
            *arguments, dtype = arguments
            walk = score(*arguments, getattr(torch, dtype))
        else:
            walk = train(*arguments)
        print(json.dumps({"launches": walk.launches, "problems": walk.problems}), flush=True)


if __name__ == "__main__":
    main()
