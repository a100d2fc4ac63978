"""Inputs of the operations, and their comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.ops import norm
from squid_fast.ops.convolution import cell_weights, resized_weights
from tests.tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**16)
up_to = partial(st.integers, 1)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """The result and the gradients of all inputs for the upstream gradient ``grad``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    gradients = torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)
    zero = [torch.zeros_like(x) for x in leaves]
    return [result.detach(), *(z if g is None else g for g, z in zip(gradients, zero, strict=True))]


def compare(
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    *settings: Any,
    grad: Tensor | None = None,
    tolerance: float | None = None,
    floor: float = 0.0,
    **options: Any,
) -> list[Tensor]:
    """Value and gradients of ``fast``, which must be those of ``plain`` in float64.

    Settings and options follow the inputs, whose first has the shape of the result. ``floor`` is
    the least magnitude that errors are held against, where terms of that size cancel.
    """
    if grad is None:
        grad = normal(*inputs[0].shape, seed=99).to(inputs[0])
    actual = with_gradients(lambda *x: fast(*x, *settings, **options), inputs, grad)
    wide = [x.cpu().double() for x in (*inputs, grad)]
    expected = with_gradients(lambda *x: plain(*x, *settings, **options), wide[:-1], wide[-1])
    for got, value, given in zip(actual, expected, [inputs[0], *inputs], strict=True):
        assert got.dtype == given.dtype
        assert_close(got.cpu(), value, tolerance, floor)
    return actual


def assert_nan_stays_in_its_row(
    function: Callable[[Tensor], Tensor], x: Tensor, bad: float
) -> None:
    """One bad entry in the middle of ``x`` makes the answer of its row NaN and no other."""
    *row, entry = (size // 2 for size in x.shape)
    clean = function(x)
    x[(*row, entry)] = bad
    answer = function(x)
    assert answer[tuple(row)].isnan().all()
    answer[tuple(row)] = clean[tuple(row)]
    assert torch.equal(answer, clean)


# --- shrinkage and lookup -------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda base: base.T,
    "strided": lambda base: base[::2, 1::2],
    "expanded": lambda base: base[:1].expand(4, 10),
    "vector": lambda base: base[0],
}
"""What is tried of ``separated(6, 10)``."""


def separated(*shape: int, seed: int = 0) -> Tensor:
    """Logits whose order survives rounding to half precision, in an order of their own per row."""
    *rows, M = shape
    return torch.linspace(-2, 2, M).double()[normal(*rows, M, seed=seed).argsort(dim=-1)]


def some_k(M: int) -> list[int]:
    """Top-k's ends and some between them."""
    return sorted({1, 2, 5, M - 1, M} & set(range(1, min(M, 64) + 1)))


def tied(rows: int, M: int, levels: int, seed: int) -> Tensor:
    """Logits of few distinct values, so that the threshold is nearly always tied."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (rows, M), generator=generator).double()


def survivors(logits: Tensor, k: int) -> Tensor:
    """Top-k said without a search: what fewer than ``k`` entries equal or exceed."""
    return (logits[:, None, :] >= logits[:, :, None]).sum(dim=-1) < k


def exact_memories(N: int, C: int, scores: Tensor) -> list[Tensor]:
    """Two queries and slots whose first coordinate alone makes the scores, exact in every dtype."""
    M = len(scores)
    query, memory = torch.zeros(2, N, C).double(), (4 * normal(N, M, C)).round() / 8
    query[..., 0] = torch.tensor([0.5, 1.0]).view(2, 1)
    memory[..., 0] = scores
    return [query, memory]


def looked_up_values(query: Tensor, memory: Tensor, values: Tensor, **mode: Any) -> Tensor:
    """The reference's answer from slots that are longer by the values, which no query sees."""
    V = values.shape[-1]
    longer = torch.cat([query, query.new_zeros(*query.shape[:2], V)], dim=2)
    return reference.memory_lookup(longer, torch.cat([memory, values], dim=2), **mode)[..., -V:]


def window_maps(
    B: int, c: int, H: int, W: int, M: int, grid: tuple[int, int], seed: int = 0
) -> list[Tensor]:
    """Maps [B, c, H, W], exact in float16, and a memory [N, M, C] in float32; scores near one."""
    N, C = grid[0] * grid[1], c * H * W // (grid[0] * grid[1])
    maps = normal(B, c, H, W, seed=seed).half().double()
    return [maps, (2 * normal(N, M, C, seed=seed + 1) / C**0.5).float()]


def looked_up_windows(maps: Tensor, memory: Tensor, top_k: int, grid: tuple[int, int]) -> Tensor:
    """The reference's answers [B, c, H, W], window by window, cut out and laid flat."""
    (_, _, H, W), (rows, columns) = maps.shape, grid
    h, w, out = H // rows, W // columns, torch.empty_like(maps)
    for n in range(rows * columns):
        i, j = n // columns * h, n % columns * w
        window = maps[:, :, i : i + h, j : j + w].permute(0, 2, 3, 1)
        answer = reference.memory_lookup(window.flatten(1), memory[n], top_k)
        out[:, :, i : i + h, j : j + w] = answer.view(window.shape).permute(0, 3, 1, 2)
    return out


# --- masked shortcut ------------------------------------------------------------------------------


def blend(mask: Tensor, *maps: Tensor) -> Tensor:
    """The formula, of inpainted, shortcut and, where given, scale and shift."""
    inpainted, shortcut, *affine = maps
    if affine:
        scale, shift = (z[:, None, None] for z in affine)
        inpainted = (inpainted * scale + shift).relu()
    return torch.where(mask, inpainted, shortcut)


def shortcut_of(keep: float, seed: Tensor) -> Callable[..., Tensor]:
    """The operation as a function of the tensors that have a gradient."""

    def call(x: Tensor, y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None):
        return ops.masked_shortcut(x, y, keep, seed, scale=scale, shift=shift)

    return call


def assert_backward_repeats_the_draw(affine: bool, device: str | torch.device) -> None:
    def full(*shape: int, value: float) -> Tensor:
        return torch.full(shape, value, device=device)

    maps = [full(2, 3, 16, 16, value=value).requires_grad_() for value in (1.0, 0.0)]
    # relu(2 * 1 - 1) is 1 again.
    scale, shift = (full(3, value=2.0), full(3, value=-1.0)) if affine else (None, None)
    out = ops.masked_shortcut(*maps, 0.5, scale=scale, shift=shift)
    ops.masked_shortcut(*maps, 0.5)  # another draw in between
    grad = normal(*out.shape).to(out)
    kept, passed = torch.autograd.grad(out, maps, grad)
    assert torch.equal(kept, (2 if affine else 1) * torch.where(out == 1, grad, 0.0))
    assert torch.equal(passed, torch.where(out == 1, 0.0, grad))


# --- attention ------------------------------------------------------------------------------------


def attention_inputs(B: int, P: int, C: int, scale: float = 1.0) -> list[Tensor]:
    tensors = [normal(B, P * P, C, scale=scale, seed=s) for s in range(3)]
    return tensors + [normal(C, seed=s) for s in (3, 4)]


def compare_attention(inputs: list[Tensor], heads: int, **how: Any) -> list[Tensor]:
    # The floor: with P = 1 the gradient of the query cancels.
    fast, plain = ops.neighbourhood_attention, reference.neighbourhood_attention
    return compare(fast, plain, inputs, heads, floor=1.0, **how)


# --- batch norm -----------------------------------------------------------------------------------


def norm_inputs(shape: tuple[int, ...], residual: bool = False, seed: int = 0) -> list[Tensor]:
    """A map whose channels have means and spreads of their own, weight, bias, a residual."""
    C = shape[1]
    spread, middle = (normal(C, seed=seed + 1) / 2).exp(), 3 * normal(C, seed=seed + 2)
    x = normal(*shape, seed=seed) * spread[:, None, None] + middle[:, None, None]
    inputs = [x, *(normal(C, seed=seed + s) for s in (3, 4))]
    return inputs + [normal(*shape, seed=seed + 5)] * residual


def norm_of(batch_norm: Callable[..., Tensor], slope: float, **how: Any) -> Callable[..., Tensor]:
    """The operation, ours or the reference's, as a function of the tensors with a gradient."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return batch_norm(x, weight, bias, residual=residual, negative_slope=slope, **how)

    return call


def norm_operators(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, negative_slope: float
) -> Tensor:
    """The operators that ``ops.batch_norm`` calls for tensors of a GPU, on any device."""
    mean, rstd = norm._batch_norm_statistics(x.detach(), None, None, None, None, 0.1, 1e-5)
    return norm._batch_norm(x, mean, rstd, weight, bias, residual, negative_slope)


def running_statistics(C: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As of some batches ago."""
    return {
        "running_mean": normal(C, seed=6).to(dtype),
        "running_var": normal(C, seed=7).exp().to(dtype),
        "num_batches_tracked": torch.tensor(4),
    }


def norm_of_pytorch(momentum: float | None, x: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """The running statistics in float64 that PyTorch's module has after ``x``."""
    plain = torch.nn.BatchNorm2d(x.shape[1], momentum=momentum).double()
    running = running_statistics(x.shape[1], torch.float64)
    plain.load_state_dict(running, strict=False)
    plain(x.double() if shift is None else x.double() + shift.double()[:, None, None])
    return {name: plain.state_dict()[name] for name in running}


# --- upsampling -----------------------------------------------------------------------------------

# P patches a side, images, channels, rows and columns of a patch, channels of the skip.
Resize = tuple[int, int, int, int, int, int]


def resize_inputs(sizes: Resize) -> list[Tensor]:
    """The patches, the skip if it has channels, and an upstream gradient."""
    P, B, C, h, w, S = sizes
    image = (2 * P * h, 2 * P * w)
    shapes = [(B * P * P, C, h, w), *[(B, S, *image)] * bool(S), (B, S + C, *image)]
    return [normal(*shape, seed=i) for i, shape in enumerate(shapes)]


# --- discriminator --------------------------------------------------------------------------------


def discriminator_parameters(
    widths: tuple[int, ...], height: int, width: int, norm: bool
) -> dict[str, Any]:
    """Arguments of ``discriminator_score`` beside the images, of that size, in float64."""
    pairs = list(zip((1, *widths), widths, strict=False))
    weights = [normal(n, c, 5, 5, scale=(25 * c) ** -0.5, seed=n + c) for c, n in pairs]
    for _ in widths:
        height, width = (height + 1) // 2, (width + 1) // 2
    return {
        "weights": weights,
        "biases": [0.3 * normal(n, seed=50 + i) for i, n in enumerate(widths)],
        "regressor": normal(widths[-1] * height * width, seed=60),
        "regressor_bias": normal(1, seed=61),
        "scales": [1 + 0.3 * normal(n, seed=70 + i) for i, n in enumerate(widths[1:])] * norm,
        "eps": 1e-3,
    }


def cast_parameters(parameters: dict[str, Any], to: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same with every tensor changed by ``to``."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [to(x) for x in value]
        return to(value) if isinstance(value, Tensor) else value

    return {name: changed(value) for name, value in parameters.items()}


def plain_discriminator_score(
    images: Tensor, weights: list[Tensor], biases: list[Tensor], regressor: Tensor,
    regressor_bias: Tensor, scales: list[Tensor], eps: float,
) -> Tensor:  # fmt: skip
    """The formula, one step after the other."""
    x = images
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.nn.functional.conv2d(x, weight, stride=2, padding=2)
        if i and scales:
            distance = x - x.mean(dim=(2, 3), keepdim=True)
            deviation = (distance.square().mean(dim=(2, 3), keepdim=True) + eps).sqrt()
            x = distance / deviation * scales[i - 1][:, None, None]
        x = x + bias[:, None, None]
        x = torch.where(x < 0, 0.2 * x, x)
    return x.flatten(1) @ regressor + regressor_bias


# --- convolution ----------------------------------------------------------------------------------

LAST = torch.channels_last


def resized_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, head: Any = None
) -> Tensor:
    """The resize to twice the side, the 3 x 3 behind it, ReLU and head, one after the other."""
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return plain_convolution(x, weight, bias, residual, head)


def plain_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    head: Any = None,
    stride: int = 1,
) -> Tensor:
    x = F.conv2d(x, weight, bias, stride, padding=1)
    x = (x if residual is None else x + residual).relu()
    return x if head is None else F.conv2d(x, head[0][None, :, None, None], head[1]).sigmoid()


def convolution_inputs(B: int, C: int, D: int, height: int, width: int) -> list[Tensor]:
    """Maps in channels-last, weights of a size at which results are about 1, and the bias."""
    weight = normal(D, C, 3, 3, scale=(9 * C) ** -0.5, seed=1)
    return [normal(B, C, height, width).to(memory_format=LAST), weight, normal(D, seed=2)]


# --- all operators --------------------------------------------------------------------------------


def operator_samples() -> dict[str, list[tuple]]:
    """Arguments for each of the operators, some with gradients, some strided."""
    logits, grad = normal(3, 7).float(), normal(3, 7, seed=1).float()
    query, memory = normal(3, 2, 4).float(), normal(2, 5, 4, seed=1).float()
    a, b = normal(2, 3, 4, 4).float(), normal(2, 3, 4, 4, seed=1).float()
    seed = torch.tensor(3)
    scale, shift = normal(3, seed=2).float(), normal(3, seed=3).float()
    attention = [x.float() for x in attention_inputs(2, 2, 4)]
    kernel, point = normal(3, 1, 3, 3, seed=4).float(), normal(1, 3, 1, 1, seed=5).float()

    # In half precision, which the kernel serves.
    image, weight, bias = (x.half() for x in convolution_inputs(2, 16, 16, 3, 5))
    bias, head = bias.float(), (normal(16, seed=4).float(), normal(1, seed=5).float())
    resized, cells = resized_weights(weight, 3, 5).half(), cell_weights(weight)

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    last = [x.to(memory_format=torch.channels_last) for x in (a, b)]
    strided = a.repeat(1, 1, 2, 3).to(memory_format=torch.channels_last)[:, :, ::2, ::3]
    skip, patches = normal(2, 5, 8, 8).float(), normal(4, 3, 2, 2).float()
    scoring = []
    for normed in (True, False):
        p = cast_parameters(discriminator_parameters((2, 3), 7, 6, normed), Tensor.float)
        packed = ops.pack_discriminator(p["weights"], p["regressor"])
        rest = (p["regressor"], p["regressor_bias"], packed, 1e-5)
        lists = (p["weights"], p["biases"], p["scales"])
        images = normal(2, 1, 7, 6).float()
        scoring += [(images, *lists, *rest), (images.half().mT.contiguous().mT, *lists, *rest)]
    return {
        "discriminator_score": scoring,
        "cell_convolution": [
            (image, resized, bias, [1, 1], None, None, None),
            (image.contiguous(), cells, bias, [1, 2], image, None, None),
            (image, cells, bias, [1, 2], image.contiguous(), *head),
            (image, cell_weights(weight, 1), bias, [2, 2], None, *head),
        ],
        "gumbel_shrinkage": [
            (leaf(logits), 3),
            (logits[:, ::2], 2),
            (logits[:0], 1),
            (logits.T, 2),
        ],
        "gumbel_shrinkage_backward": [
            (grad, logits),
            (grad[:1].expand(3, 7), logits),
            (grad, logits.view(7, 3).T),
        ],
        "hard_shrinkage": [(leaf(logits), 0.3), (logits.T, 0.3)],
        "hard_shrinkage_backward": [(grad, logits, 0.3), (grad.T, logits.T, 0.3)],
        "memory_lookup": [
            (leaf(query), memory, None, "gumbel", 2, 0.0, True),
            (leaf(query), leaf(memory), None, "gumbel", 2, 0.0, False),
            (query, leaf(memory), None, "hard", 0, 0.1, True),
            (leaf(query), leaf(memory), None, "raw", 0, 0.0, True),
            (query.mT.contiguous().mT, memory, memory[..., :3], "gumbel", 2, 0.0, False),
            (query, memory, torch.cat([memory, memory], dim=2), "hard", 0, 0.1, True),
        ],
        "memory_lookup_backward": [
            (query, query, memory, scores, mode, 2, 0.1, wanted)
            for mode in ("gumbel", "hard", "raw")
            for wanted in (True, False)
            for scores in (query.new_empty(0), normal(2, 3, 5, seed=2).float())
        ],
        "window_lookup": [
            (a.half(), normal(1, 4, 5, 12).half(), None, 3, 2, 2),
            (last[0].half(), normal(3, 2, 5, 24).half(), None, 3, 1, 2),
            (strided.half(), normal(3, 2, 5, 24).half(), None, 1, 2, 1),
            (last[0], normal(3, 2, 5, 24).half(), None, 3, 1, 2),
            (a, normal(3, 4, 5, 12).half(), normal(4, 5, 7).float(), 3, 2, 2),
            (strided.half(), normal(3, 2, 5, 24).half(), normal(2, 7, 5).float().mT, 1, 2, 1),
        ],
        "masked_shortcut": [
            (leaf(a), leaf(b), 0.5, seed, None, None),
            (last[0], b, 0.5, seed, None, None),
            (*last, 0.5, seed, None, None),
            (leaf(a), leaf(b), 0.5, seed, leaf(scale), leaf(shift)),
            (last[0], leaf(b), 0.5, seed, scale, leaf(shift)),
            (leaf(last[0]), leaf(last[1]), 0.5, seed, scale, shift),
            (strided.requires_grad_(), leaf(b), 0.5, seed, scale, shift),
        ],
        "masked_shortcut_backward": [
            (a, None, 0.5, seed, None, None),
            (last[0], None, 0.5, seed, None, None),
            (a, b, 0.5, seed, scale, shift),
            (last[0], b, 0.5, seed, scale, shift),
            (*last, 0.5, seed, scale, shift),
            (strided.detach(), strided.detach(), 0.5, seed, scale, shift),
        ],
        "batch_norm_statistics": [
            (x, shift, *running_statistics(3).values(), momentum, 1e-5)
            for x in (a, last[0], strided.detach())
            for momentum in (0.1, None)
        ]
        + [(last[0], None, None, None, None, 0.1, 1e-3)],
        "batch_norm": [
            (leaf(a), shift, scale.exp(), leaf(scale), leaf(shift), None, 0.0),
            (leaf(last[0]), shift, scale.exp(), leaf(scale), leaf(shift), leaf(last[1]), 0.0),
            (leaf(last[0]), shift, scale.exp(), leaf(scale), leaf(shift), leaf(b), 1.0),
            (strided.detach().requires_grad_(), shift, scale.exp(), scale, shift, b, 0.2),
        ],
        "batch_norm_backward": [
            (grad, x, y, shift, scale.exp(), scale, shift, 0.2)
            for grad, x in ((a, b), (last[0], last[1]), (last[0], strided.detach()))
            for y in (None, b)
        ],
        "neighbourhood_attention": [
            (*map(leaf, attention), 2),
            (attention[0].mT.contiguous().mT, *attention[1:], 2),
            (*attention, 4),  # heads of width 1
        ],
        "neighbourhood_attention_backward": [(attention[0], *attention, heads) for heads in (2, 4)],
        "upsample_concat": [
            (leaf(a), None, 1),
            (leaf(a), leaf(skip), 1),
            (leaf(last[0]), skip, 1),
            (last[0], leaf(skip.to(memory_format=torch.channels_last)), 1),
            (leaf(patches), leaf(skip[:1]), 2),
            (patches.to(memory_format=torch.channels_last).requires_grad_(), None, 2),
            (strided.detach(), skip, 1),
            (a[:, :1, :1].expand(2, 3, 4, 4), skip, 1),
        ],
        "upsample_concat_backward": [
            (grad, channels, P)
            for grad in (skip, skip.to(memory_format=torch.channels_last), skip[:, :, ::2, ::2])
            for channels, P in ((5, 1), (3, 1), (2, 2))
        ],
        "split_linear": [
            (logits, ops.split(normal(5, 7).float(), 2), None),
            (logits[::2], ops.split(normal(5, 7).float(), 2), normal(5).float()),
        ],
        "stem": [
            (images, kernel, shift, 2, dtype)
            for images in (a[:, :1], (a[:, :1].abs() * 50).to(torch.uint8))
            for dtype in (torch.float32, torch.bfloat16)
        ],
        "reconstruct": [
            (a, point, shift[:1], b[:, :1], 2),
            (last[0].half(), point, shift[:1], (b[:, :1].abs() * 50).to(torch.uint8), 2),
            (a.view(8, 3, 2, 2), point, shift[:1], b[:, 1:2], 2),
        ],
    }


def compile_cases(
    device: str | torch.device = "cpu",
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    seed = torch.tensor(3, device=device)
    cases = {
        "gumbel": (lambda x: ops.gumbel_shrinkage(x, 3), [normal(5, 9)]),
        "hard": (lambda x: ops.hard_shrinkage(x, 0.3), [normal(5, 9)]),
        "lookup": (lambda *x: ops.memory_lookup(*x, 3), [normal(5, 2, 4), normal(2, 6, 4, seed=1)]),
        "shortcut": (
            lambda *x: ops.masked_shortcut(*x, 0.5, seed),
            [normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)],
        ),
        "attention": (lambda *x: ops.neighbourhood_attention(*x, 2), attention_inputs(2, 2, 4)),
        "norm": (norm_of(norm_operators, 0.0), norm_inputs((2, 3, 4, 4), residual=True)),
        "upsampling": (
            lambda *x: ops.upsample_concat(*x, num_patch=2),
            [normal(8, 3, 2, 3), normal(2, 4, 8, 12, seed=1)],
        ),
    }
    return {name: (call, [x.to(device) for x in inputs]) for name, (call, inputs) in cases.items()}


def assert_compiled_equals_eager(name: str, backend: str, device: str | torch.device) -> None:
    torch.compiler.reset()
    function, inputs = compile_cases(device)[name]
    inputs = [x.float() for x in inputs]
    grad = normal(*function(*inputs).shape, seed=9).to(inputs[0])
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = (with_gradients(f, inputs, grad) for f in (compiled, function))
    assert all(map(torch.equal, *results))
