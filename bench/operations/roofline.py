"""The least time an operation can take: its bytes and operations over the device's ceilings.

Counted is what no implementation can do without. In each pass (forward, backward) every input is
read once and every output written once; whatever lies between stays on the chip. Products of
matrices count 2 operations per multiplication. What an implementation may keep instead of computing
it again is counted neither as bytes nor as operations. A floor is the larger of two times,
bytes / bandwidth and operations / rate, so that a fraction of 1 is out of reach.

Symbols: B images, N patches of an image, M memory slots, C slot width, k of top-k, e bytes of an
element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from squid_fast.utils.tf32 import tf32

from ..markdown import table
from .cases import Case, cases
from .timing import clock_seconds, event_seconds

ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes


@dataclass(frozen=True)
class Work:
    """What an operation moves (bytes) and computes (floating-point operations) at least."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def memory_lookup(
    B: int, N: int, M: int, C: int, k: int, e: int, backward: bool = False, slots: bool = False
) -> Work:
    """Gumbel lookup of [B, N, C] in [N, M, C].

    Forward: reads query and memory, writes the answer. The scores are a product over all slots,
    2 BNMC; the answer sums the k - 1 slots that are kept, 2 BN(k - 1)C.

    Backward adds: reads gradient, query and memory, writes the query's gradient. Since the gradient
    is that of the whole softmax, the weights' gradients are a product over all slots, and so is
    the query's gradient: 2 · 2 BNMC. The softmax may have been kept, so scores count once.

    With ``slots`` the memory's gradient is written too: through the scores 2 BNMC, through the
    answer 2 BN(k - 1)C.
    """
    query, memory = B * N * C, N * M * C
    product, kept = 2 * B * N * M * C, 2 * B * N * max(k - 1, 0) * C
    work = Work((2 * query + memory) * e, product + kept)
    if backward:
        work += Work((3 * query + memory) * e, 2 * product)
    if backward and slots:
        work += Work(memory * e, product + kept)
    return work


def gumbel_shrinkage(B: int, N: int, M: int, e: int, backward: bool = False) -> Work:
    """Weights of logits [B, N, M].

    Forward: reads logits, writes weights; difference, exponential, sum, quotient: 4 operations an
    entry. Backward adds: reads gradient and logits, writes the logits' gradient; the softmax again
    and p (g - Σ p g): 4 + 4 operations.
    """
    entries = B * N * M
    work = Work(2 * entries * e, 4 * entries)
    return work + Work(3 * entries * e, 8 * entries) if backward else work


def masked_shortcut(
    B: int, C: int, H: int, W: int, e: int, affine: bool = False, backward: bool = False
) -> Work:
    """Choice between two maps [B, C, H, W] by one draw for each position.

    Forward: of every element one operand is read, the one the draw chooses; one is written. The
    affine with its ReLU is 3 operations on elements and 2 C parameters in float32.
    Backward adds: reads the gradient, writes one of each map. With the affine, reads the in-painted
    map too and writes 2 C sums: 5 operations an element. Draws are not counted.
    """
    elements, parameters = B * C * H * W, 2 * C * 4 * affine
    work = Work(2 * elements * e + parameters, 3 * elements * affine)
    if backward:
        work += Work((3 + affine) * elements * e + 2 * parameters, 5 * elements * affine)
    return work


def batch_norm(
    B: int, C: int, H: int, W: int, e: int, residual: bool = False, backward: bool = False
) -> Work:
    """Batch norm with ReLU of a map [B, C, H, W], as in training.

    Forward: reads the map, and what is added, writes the result; statistics and parameters are
    4 C in float32, the running ones are read and written. Mean, variance and the affine are 7
    operations an element. Backward adds: reads gradient and map, and with a residual the result,
    whose sign it needs; writes the gradients of map and residual, and 2 C sums: 10 operations.
    """
    elements = B * C * H * W
    work = Work((2 + residual) * elements * e + 8 * C * 4, 7 * elements)
    if backward:
        work += Work((3 + 2 * residual) * elements * e + 6 * C * 4, 10 * elements)
    return work


def attended(N: int) -> int:
    """Different keys that the N patches of a grid attend to, all zeros outside it being one."""
    P = math.isqrt(N)
    near = [sum(0 <= place + d < P for d in (-1, 0, 1)) for place in range(P)]
    inside = [rows * columns - 1 for rows in near for columns in near]
    return sum(count + (count < 8) for count in inside)


def neighbourhood_attention(B: int, N: int, C: int, e: int, backward: bool = False) -> Work:
    """Attention of [B, N, C] to the neighbours.

    Forward: reads query, key, value and the two paddings, writes the answer. Two products over the
    keys attended to: 4 BC for each pair of patch and key (``attended``). Softmaxes are not counted.
    Backward adds: reads the gradient and the inputs, writes five gradients. Four products (weights,
    query, key, value); the weights may have been kept.
    """
    map_, pair = B * N * C, 2 * B * C * attended(N)
    work = Work((4 * map_ + 2 * C) * e, 2 * pair)
    return work + Work((7 * map_ + 4 * C) * e, 4 * pair) if backward else work


def upsample_concat(
    B: int, N: int, P: int, C: int, S: int, side: int, e: int, backward: bool = False
) -> Work:
    """Resize of B N maps of P x P patches, C channels, to twice their side, behind S of a skip.

    Forward: reads the maps and the skip, writes both at the larger size, which has four times the
    places. A weighted sum of two is 3 operations, along columns for half of the places, then along
    rows for all. Backward adds: reads the gradient of the C channels, writes that of the maps; that
    of the skip lies in the result's already. A sum of four is 5 operations, along columns for half
    of the places, then along rows for a quarter.
    """
    maps = B * N * C * (P * side) ** 2
    skip = 4 * B * N * S * (P * side) ** 2
    work = Work((maps + skip + 4 * maps + skip) * e, 3 * 6 * maps)
    return work + Work(5 * maps * e, 5 * 3 * maps) if backward else work


def inpaint_block(
    B: int, N: int, M: int, C: int, width: int, k: int, e: int, backward: bool = False
) -> Work:
    """The whole in-painting block on [B N, width, h, w], C = width / 4 · h · w.

    Forward: reads its input, its parameters and the memory, writes its output. Products: the two
    1 × 1 convolutions, the lookup, four projections of the attention (C → C each), the two layers
    of the feed-forward net (C → C/4 → C), the attention. Norms and activations are not counted.
    Backward adds: reads gradient, input, parameters and memory, writes the gradients of input and
    parameters; every product has two gradients, the lookup those of ``memory_lookup``.
    """
    narrow, rows = width // 4, B * N
    places = C // narrow
    map_ = rows * width * places
    code = N.bit_length()
    weights = width * narrow + (narrow + code) * width + 4 * C * C + 2 * C * (C // 4)
    layers = 2 * rows * (places * (width * narrow + (narrow + code) * width))
    layers += 2 * rows * (4 * C * C + 2 * C * (C // 4))
    lookup = memory_lookup(B, N, M, C, k, e, backward).flops
    attention = neighbourhood_attention(B, N, C, e, backward).flops
    memory = N * M * C
    moved, products = 2 * map_ + weights + memory, layers
    if backward:
        moved += 3 * map_ + 2 * weights + memory
        products += 2 * layers
    return Work(moved * e, products + lookup + attention)


def discriminator_score(
    B: int, side: int, e: int, norm: bool, widths: tuple[int, ...] = (16, 32, 64, 128, 128)
) -> Work:
    """Scores of images [B, 1, side, side].

    Reads images and parameters, writes scores. Five 5 x 5 convolutions that halve the sides, a norm
    behind all but the first (weight and bias, in place of the convolution's bias), and a dot
    product. Only products are counted.
    """
    channels, parameters, products = 1, 1, 0
    places = side
    for i, width in enumerate(widths):
        places = (places + 1) // 2
        parameters += 25 * channels * width + width * (1 + (norm and i > 0))
        products += places**2 * 25 * channels * width
        channels = width
    last = channels * places**2
    moved = B * side**2 + parameters + last + B
    return Work(moved * e, 2 * B * (products + last))


def stem(B: int, P: int, side: int, F: int, images: str, e: int, backward: bool = False) -> Work:
    """The first convolution of images [B, 1, side, side], forward only.

    Reads the images, of 1 or 4 bytes a pixel, and 10 F weights; writes F numbers a pixel, each of 9
    products.
    """
    pixels = B * side * side
    moved = pixels * ((1 if images == "uint8" else 4) + F * e) + 10 * F * e
    return Work(moved, 2 * 9 * F * pixels)


def reconstruct(
    B: int, P: int, side: int, F: int, images: str, e: int, backward: bool = False
) -> Work:
    """The last convolution and the errors of images [B, 1, side, side], forward only.

    Reads F numbers and the image's 1 or 4 bytes a pixel; writes the reconstruction in float32 and
    an error for each of P P patches. F products a pixel; sigmoids and squares are not counted.
    """
    pixels = B * side * side
    moved = pixels * ((1 if images == "uint8" else 4) + F * e + 4) + 4 * B * P * P
    return Work(moved, 2 * F * pixels)


def cell_convolution(
    B: int, C: int, D: int, side: int, resized: bool, behind: str, e: int,
    backward: bool = False,
) -> Work:  # fmt: skip
    """3 x 3 of maps [B, C, side, side] to D channels, resized to twice the side before; forward.

    Reads the maps, 9 C D weights and the residual, writes the result; or, with a head, one number
    in float32 for each pixel. 9 C D products for each pixel of the result, and D of the head.
    """
    pixels, head = B * side * side, "head" in behind
    out = pixels * (4 if resized else 1)
    numbers = pixels * C + 9 * C * D + out * D * (("residual" in behind) + (not head))
    return Work(numbers * e + 4 * out * head, 2 * out * D * (9 * C + head))


def window_lookup(B: int, N: int, c: int, side: int, grid: int, M: int, k: int, e: int) -> Work:
    """Gumbel lookup of the grid x grid windows of B N maps [c, side, side], for scoring.

    Reads maps and slots, these in float32, writes the answers. The products are those of
    ``memory_lookup``, counted once, though exact ones of half precision with float32 take three.
    """
    numbers = c * side * side  # of a map, and of one slot of every window
    moved = 2 * B * N * numbers * e + M * numbers * 4
    return Work(moved, 2 * B * N * numbers * (M + max(k - 1, 0)))


def queue_lookup(B: int, N: int, M: int, C: int, k: int, e: int) -> Work:
    """Lookup of [B, N, C] in [N, M, C] as exact as float32, summing values [N, M, 3 C].

    Reads query, slots and values, writes their sums. A product over all slots takes six of
    bfloat16; the sum is that of k - 1 values.
    """
    moved = (B * N + N * M) * (C + 3 * C)
    return Work(moved * e, 6 * 2 * B * N * M * C + 2 * B * N * max(k - 1, 0) * 3 * C)


def split_linear(B: int, N: int, T: int, S: int, e: int) -> Work:
    """Linear layer of B N rows [T] to [S] in three products of bfloat16.

    Reads rows, weights and bias, writes the result.
    """
    rows = B * N
    return Work((rows * (T + S) + S * T + S) * e, 3 * 2 * rows * S * T)


COUNTS: dict[str, Callable[..., Work]] = {
    "memory_lookup": memory_lookup,
    "gumbel_shrinkage": gumbel_shrinkage,
    "masked_shortcut": masked_shortcut,
    "neighbourhood_attention": neighbourhood_attention,
    "batch_norm": batch_norm,
    "upsample_concat": upsample_concat,
    "inpaint_block": inpaint_block,
    "discriminator_score": discriminator_score,
    "stem": stem,
    "reconstruct": reconstruct,
    "cell_convolution": cell_convolution,
    "window_lookup": window_lookup,
    "queue_lookup": queue_lookup,
    "split_linear": split_linear,
}


def work_of(case: Case) -> Work:
    """The work of a case: its sizes are the arguments of the counting function of its name."""
    s = dict(case.sizes) | {"e": ELEMENT[case.dtype], "backward": case.direction != "forward"}
    if case.operation == "memory_lookup":
        s["slots"] = case.direction == "forward_backward_slots"
    if case.operation == "gumbel_shrinkage":
        del s["k"]
    if case.operation in ("window_lookup", "queue_lookup", "split_linear"):
        del s["backward"]
    if case.operation == "masked_shortcut":
        del s["layout"]
    if case.operation in ("masked_shortcut", "batch_norm"):
        s["B"] *= s.pop("N")
        s["H"] = s["W"] = s.pop("side")
    if case.operation == "discriminator_score":
        del s["backward"]
        s["norm"] = s.pop("mode") == "instance"
    return COUNTS[case.operation](**s)


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best, measured: bytes/s copied (read and written), operations/s."""

    bytes_per_s: float
    bfloat16: float
    float32: float

    def floor(self, work: Work, dtype: str) -> float:
        """The least seconds that the work takes in products of that dtype."""
        rate = self.float32 if dtype == "float32" else self.bfloat16
        return max(work.bytes / self.bytes_per_s, work.flops / rate)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The shortest of some calls: a ceiling is what is reached at best."""
    timed = event_seconds if device.type == "cuda" else clock_seconds
    return min([timed(call) for _ in range(repeats + 2)][2:])


def _matrix_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def measure(device: torch.device) -> Ceilings:
    """Ceilings of this device: a large copy, large products of random matrices.

    On a GPU the float32 rate is the better of two: float32 units, and a third of the TensorFloat-32
    rate, since three such products make one that is as exact (``tf32x3`` in Triton).
    """
    cuda = device.type == "cuda"
    count = 2**25  # of float32: 128 MiB, beyond any cache
    if cuda:
        count = min(2**30, torch.cuda.mem_get_info(device)[0] // 16)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    bandwidth = 8 * count / _seconds(partial(target.copy_, source), device)
    del source, target
    side = 8192 if cuda else 1024
    bfloat16 = _matrix_rate(side, torch.bfloat16, device)
    float32 = _matrix_rate(side, torch.float32, device)
    if cuda:
        with tf32(convolutions=False, products=True):
            float32 = max(float32, _matrix_rate(side, torch.float32, device) / 3)
        torch.cuda.empty_cache()
    return Ceilings(bandwidth, bfloat16, float32)


def floors(device: torch.device, selection: str) -> str:
    """The ceilings of a device and, as a table, the floors of a selection of cases."""
    ceilings = measure(device)
    rows = []
    for case in cases(device, selection):
        work = work_of(case)
        floor = ceilings.floor(work, case.unit)
        bound = "bytes" if work.bytes / ceilings.bytes_per_s >= floor else "operations"
        figures = [f"{x:.2f}" for x in (work.bytes / 1e6, work.flops / 1e9, floor * 1e6)]
        rows.append([case.operation, case.direction, case.label, case.dtype, *figures, bound])
    head = ["operation", "direction", "sizes", "dtype", "MB", "GFLOP", "µs", "bound by"]
    note = (
        f"Ceilings: {ceilings.bytes_per_s / 1e9:.0f} GB/s, bfloat16 "
        f"{ceilings.bfloat16 / 1e12:.3g} TFLOP/s, float32 {ceilings.float32 / 1e12:.3g} TFLOP/s"
    )
    return table(head, rows, text=(0, 1, 2, 3, 7), note=note)
