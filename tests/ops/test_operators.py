"""What holds for all operators: opcheck, compiled as eager, and errors that say what was given."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from shutil import which

import pytest
import torch
from torch import Tensor

from squid_fast import ops
from tests.ops.samples import assert_compiled_equals_eager, compile_cases, operator_samples


@pytest.mark.parametrize("name", operator_samples())
def test_opcheck(name: str) -> None:
    for sample in operator_samples()[name]:
        torch.library.opcheck(getattr(torch.ops.squid_fast, name), sample)


def test_these_are_all_operators() -> None:
    registered = {
        schema.name.removeprefix("squid_fast::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("squid_fast::")
    }
    assert registered == set(operator_samples())


no_compiler = pytest.mark.skipif(
    not any(map(which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler"
)


# Inductor alone asserts the strides that the fakes promise; on a CPU it needs a C++ compiler.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=no_compiler)])
@pytest.mark.parametrize("name", compile_cases())
def test_compiled_equals_eager(name: str, backend: str) -> None:
    assert_compiled_equals_eager(name, backend, "cpu")


def test_compiled_shortcut_draws_anew_at_every_call() -> None:
    torch.compiler.reset()
    a, b = torch.ones(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    compiled = torch.compile(
        lambda: ops.masked_shortcut(a, b, 0.5), fullgraph=True, backend="aot_eager"
    )
    share = (compiled() != compiled()).double().mean().item()
    assert abs(share - 0.5) < 4.5 * 0.5 / 2048**0.5


# --- errors ---------------------------------------------------------------------------------------

Z = torch.zeros
X, MAP, KERNEL = Z(2, 4), Z(1, 1, 2, 4), Z(2, 1, 3, 3)
attend = ops.neighbourhood_attention
W = Z(1, 1, 3, 3, 2, 1, 1, 3)  # of a 3 x 3 convolution of 2 to 3 channels
convolve = partial(ops.cell_convolution, Z(1, 2, 4, 5))
# What is said, by which call.
ERRORS: dict[str, Callable[[], Tensor]] = {
    "top_k is 0, but there are 4 memory slots; it must lie between 1 and 4.": (
        lambda: ops.gumbel_shrinkage(X, 0)
    ),
    "top_k is 5, but there are 4 memory slots": lambda: ops.gumbel_shrinkage(X, 5),
    "logits is torch.int64; a floating-point dtype is needed.": (
        lambda: ops.gumbel_shrinkage(X.long(), 2)
    ),
    "logits is a scalar": lambda: ops.gumbel_shrinkage(X.sum(), 1),
    "logits is torch.int32": lambda: ops.hard_shrinkage(X.int(), 0.5),
    "threshold is 0.0; it must be positive and finite.": lambda: ops.hard_shrinkage(X, 0.0),
    "threshold is inf": lambda: ops.hard_shrinkage(X, torch.inf),
    "threshold is nan": lambda: ops.hard_shrinkage(X, torch.nan),
    "query is [2, 3, 4] and memory [5, 4]; they must be [B, N, C] and [N, M, C]": (
        lambda: ops.memory_lookup(Z(2, 3, 4), Z(5, 4), 2)
    ),
    "query is [2, 3, 4] and memory [5, 6, 4]; a query [B, 5, 4] would fit this memory.": (
        lambda: ops.memory_lookup(Z(2, 3, 4), Z(5, 6, 4), 2)
    ),
    "a query [B, 1, 7] would fit": lambda: ops.memory_lookup(X, Z(6, 7), 2),
    "query is torch.int64": lambda: ops.memory_lookup(X.long(), Z(6, 4), 2),
    "top_k=2 and threshold=0.5 are both given; give one.": (
        lambda: ops.memory_lookup(X, Z(6, 4), 2, threshold=0.5)
    ),
    "top_k is 7, but there are 6 memory slots": lambda: ops.memory_lookup(X, Z(6, 4), 7),
    "threshold is -1.0": lambda: ops.memory_lookup(X, Z(6, 4), threshold=-1.0),
    "values is [1, 1, 4]; [1, 2, V] would fit this memory.": (
        lambda: ops.memory_lookup(X[:, None], X[None], 1, values=X[None, :1])
    ),
    "values are given while query, memory or values require a gradient": (
        lambda: ops.memory_lookup(X[:, None], X[None], 1, values=X[None].clone().requires_grad_())
    ),
    "maps is [2, 4] and slots [2, 4]; they must be [B, c, H, W] and [parts, N, M, C].": (
        lambda: ops.window_lookup(X, X, 1)
    ),
    "x is torch.int64; a floating-point dtype is": lambda: ops.split(X.long(), 3),
    "slots is torch.float32 and maps torch.bfloat16; they must agree, or slots be of half prec": (
        lambda: ops.window_lookup(MAP.bfloat16(), MAP, 1)
    ),
    "slots is torch.bfloat16 and maps torch.float64": (
        lambda: ops.window_lookup(MAP.double(), MAP.bfloat16(), 1)
    ),
    "grid is 1 x 3; it must divide maps of 2 x 4.": (
        lambda: ops.window_lookup(MAP, Z(1, 3, 2, 1), 1, (1, 3))
    ),
    "slots is [1, 2, 3, 8]; [parts, 2, M, 4] would fit 1 x 2 windows of maps [1, 1, 2, 4].": (
        lambda: ops.window_lookup(MAP, Z(1, 2, 3, 8), 1, (1, 2))
    ),
    "top_k is 4, but there are 3 memory slots": (lambda: ops.window_lookup(MAP, Z(1, 1, 3, 8), 4)),
    "values is [1, 2, 5] of torch.float32; [1, 3, V] of torch.float32 would fit these maps and": (
        lambda: ops.window_lookup(MAP, Z(1, 1, 3, 8), 2, values=Z(1, 2, 5))
    ),
    "values is [3, 5] of": lambda: ops.window_lookup(MAP, Z(1, 1, 3, 8), 2, values=Z(3, 5)),
    "values is [1, 3, 5] of torch.float16; [1, 3, V] of torch.float32 would fit": (
        lambda: ops.window_lookup(MAP, Z(1, 1, 3, 8), 2, values=Z(1, 3, 5).half())
    ),
    "maps, slots or values require a gradient, which this lookup does not have": (
        lambda: ops.window_lookup(MAP, Z(1, 1, 3, 8).requires_grad_(), 2)
    ),
    "maps, slots or values require a gradient": (
        lambda: ops.window_lookup(MAP, Z(1, 1, 3, 8), 2, values=Z(1, 3, 5).requires_grad_())
    ),
    "inpainted is [1, 2, 3, 3] and shortcut [1, 2, 3, 4]": (
        lambda: ops.masked_shortcut(Z(1, 2, 3, 3), Z(1, 2, 3, 4), 0.5)
    ),
    "inpainted is [2, 4]": lambda: ops.masked_shortcut(X, X, 0.5),
    "inpainted is torch.float32 and shortcut torch.bfloat16": (
        lambda: ops.masked_shortcut(MAP, MAP.bfloat16(), 0.5)
    ),
    "keep_probability is 1.5; it must lie in [0, 1].": lambda: ops.masked_shortcut(MAP, MAP, 1.5),
    "scale is given without shift; an affine needs both, [1] each.": (
        lambda: ops.masked_shortcut(MAP, MAP, 0.5, scale=torch.ones(1))
    ),
    "scale is [1] and shift [2]; both must be [1].": (
        lambda: ops.masked_shortcut(MAP, MAP, 0.5, scale=torch.ones(1), shift=torch.ones(2))
    ),
    "x is [2, 4] of torch.float32; floating-point [B, C, H, W] is needed.": (
        lambda: ops.batch_norm(X, X[0], X[0])
    ),
    "x is [1, 3, 1, 1]: Expected more than 1 value per channel": (
        lambda: ops.batch_norm(Z(1, 3, 1, 1), Z(3), Z(3))
    ),
    "weight is [2]; for x [1, 1, 2, 4] it must be [1].": lambda: ops.batch_norm(MAP, Z(2), Z(1)),
    "running_mean is [3]; for x [1, 1, 2, 4] it must be [1].": (
        lambda: ops.batch_norm(MAP, Z(1), Z(1), Z(3), Z(1), Z(()))
    ),
    "running_mean and running_var alone cannot be moved; give running_mean, running_var, num_": (
        lambda: ops.batch_norm(MAP, Z(1), Z(1), Z(1), Z(1))
    ),
    "residual is [1, 1, 2, 4] of torch.bfloat16; it must be [1, 1, 2, 4] of torch.float32": (
        lambda: ops.batch_norm(MAP, Z(1), Z(1), residual=MAP.bfloat16())
    ),
    "negative_slope is -0.5; it must lie in [0, 1].": (
        lambda: ops.batch_norm(MAP, Z(1), Z(1), negative_slope=-0.5)
    ),
    "query is [1, 4, 2], key [1, 4, 3] and value [1, 4, 2]": (
        lambda: attend(Z(1, 4, 2), Z(1, 4, 3), Z(1, 4, 2), X[0], X[0], 1)
    ),
    "N is 5; a square grid": lambda: attend(*[Z(1, 5, 2)] * 3, X[0], X[0], 1),
    "x is torch.int64; a floating-point": lambda: ops.cell_convolution(
        Z(1, 2, 4, 5).long(), W, Z(3)
    ),
    "x is [2, 4] and weights [1, 1, 3, 3, 2, 1, 1, 3]; they must be [B, C, H, W] and [kinds": (
        lambda: ops.cell_convolution(X, W, Z(3))
    ),
    "x is [1, 2, 4, 5] and weights [3, 2, 3, 3]": lambda: convolve(Z(3, 2, 3, 3), Z(3)),
    "x is torch.float32 and weights torch.float64": lambda: convolve(W.double(), Z(3)),
    "step is (0, 1); it must lie between 1 and the window's (3, 3).": (
        lambda: convolve(W, Z(3), (0, 1))
    ),
    "step is (1, 4)": lambda: convolve(W, Z(3), (1, 4)),
    "weights are of 2 x 3 kinds of cells; maps of 4 x 5 cells have 1 or 3 and 1 or 3.": (
        lambda: convolve(W.expand(2, 3, *W.shape[2:]), Z(3))
    ),
    "bias is [2] of torch.float32; it must be [3] of torch.float32.": lambda: convolve(W, Z(2)),
    "bias is [3] of torch.float64": lambda: convolve(W, Z(3).double()),
    "residual is [1, 3, 4, 4] of torch.float32; it must be [1, 3, 4, 5] of torch.float32.": (
        lambda: convolve(W, Z(3), residual=Z(1, 3, 4, 4))
    ),
    "the head's weight is [1] of": lambda: convolve(W, Z(3), head=(Z(1), Z(1))),
    "the head's bias is [3] of": lambda: convolve(W, Z(3), head=(Z(3), Z(3))),
    "an input requires a gradient, which this convolution does not have.": (
        lambda: convolve(W, Z(3).requires_grad_())
    ),
    "C is 4 and num_heads 3; the heads must divide C.": (
        lambda: attend(*[Z(1, 4, 4)] * 3, X[0], X[0], 3)
    ),
    "pad_key is [4] and pad_value [4]; both must be [6].": (
        lambda: attend(*[Z(1, 4, 6)] * 3, X[0], X[0], 3)
    ),
    "x is [2, 4]; it must be [B, C, H, W], with C, H and W at least 1.": (
        lambda: ops.upsample_concat(X)
    ),
    "x is [1, 0, 2, 4]; it must be": lambda: ops.upsample_concat(MAP[:, :0]),
    "x is torch.int64; a floating-point dtype": lambda: ops.upsample_concat(MAP.long()),
    "num_patch is 0 and x [1, 1, 2, 4]": lambda: ops.upsample_concat(MAP, num_patch=0),
    "num_patch is 2 and x [6, 1, 2, 4]; num_patch must be at least 1, and its square must divide": (
        lambda: ops.upsample_concat(MAP.expand(6, 1, 2, 4), num_patch=2)
    ),
    "skip is [1, 3, 4, 7]; [1, S, 4, 8] would fit this x.": (
        lambda: ops.upsample_concat(MAP, Z(1, 3, 4, 7))
    ),
    "skip is [4, 3, 4, 8]; [1, S, 8, 16] would fit": (
        lambda: ops.upsample_concat(MAP.expand(4, 1, 2, 4), Z(4, 3, 4, 8), num_patch=2)
    ),
    "images are [2, 4]; they must be [B, Cin, H, W].": lambda: ops.stem(X, KERNEL, Z(2), 1),
    "images are torch.int64; uint8 or a floating-point dtype fits.": (
        lambda: ops.stem(MAP.long(), KERNEL, Z(2), 1)
    ),
    "num_patch is 3 and images are 2 x 4; it must divide their sides.": (
        lambda: ops.stem(MAP, KERNEL, Z(2), 3)
    ),
    "weight is [2, 1, 1, 1]; [F, 1, 3, 3] would fit these images.": (
        lambda: ops.stem(MAP, KERNEL[..., :1, :1], Z(2), 2)
    ),
    "bias is [3]; [2] would fit this weight.": lambda: ops.stem(MAP, KERNEL, Z(3), 2),
    "dtype is torch.int8; a floating-point dtype is needed.": (
        lambda: ops.stem(MAP, KERNEL, Z(2), 2, torch.int8)
    ),
    "stem is given a tensor that requires a gradient": (
        lambda: ops.stem(MAP, KERNEL, Z(2).requires_grad_(), 2)
    ),
    "x is [1, 1, 2, 4]; [1, F, 4, 4] or, of patches, [4, F, 2, 2] would fit images [1, 1, 4, 4].": (
        lambda: ops.reconstruct(MAP, Z(1, 1, 1, 1), Z(1), Z(1, 1, 4, 4), 2)[0]
    ),
    "weight is [1, 2, 1, 1] and bias [1]; [1, 1, 1, 1] and [1] would fit.": (
        lambda: ops.reconstruct(MAP, Z(1, 2, 1, 1), Z(1), MAP, 2)[0]
    ),
    "x is torch.int64; a floating": lambda: ops.reconstruct(MAP.long(), KERNEL, Z(1), MAP, 2)[0],
    "x is [2, 4] and weight [2, 4]; they must be [..., T] and [2, S, T].": (
        lambda: ops.split_linear(X, X)
    ),
    "bias is [3]; [5] would fit this weight.": lambda: ops.split_linear(X, Z(2, 5, 4), Z(3)),
    "x is torch.float16; torch.float32 is needed.": (
        lambda: ops.split_linear(X.half(), Z(2, 5, 4))
    ),
    "bias is torch.float64; torch.float32 is needed.": (
        lambda: ops.split_linear(X, Z(2, 5, 4), Z(5).double())
    ),
    "split_linear is given a tensor that requires a gradient": (
        lambda: ops.split_linear(X, Z(2, 5, 4).requires_grad_())
    ),
    "reconstruct is given a tensor that requires a gradient": (
        lambda: ops.reconstruct(MAP, Z(1, 1, 1, 1).requires_grad_(), Z(1), MAP, 2)[0]
    ),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_name_the_value(sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ERRORS[sentence]()
