"""The frozen network whose ends are kernels: images of bytes in, reconstructions and errors out."""

from __future__ import annotations

import pytest
import torch

from squid_fast.inference.network import FrozenGenerator, Stem
from tests.factories import tiny_squid
from tests.kernels.devices import DEVICE
from tests.ops.scoring import grey, pixels_of, sliced
from tests.tolerances import assert_close


@pytest.mark.parametrize("combine", [None, 1])
def test_the_network_in_half_precision_reads_bytes(combine: int | None) -> None:
    model = tiny_squid(initial_combine=combine).eval()
    with torch.no_grad():
        model.out_conv.conv.weight *= 300  # else all reconstructions look the same
    pixels = grey(2, model.image_size, model.image_size, torch.uint8)
    half, single = (
        FrozenGenerator(model, dtype, torch.channels_last).to(DEVICE)
        for dtype in (torch.float16, torch.float32)
    )
    assert isinstance(half.in_conv.first, Stem)
    with torch.inference_mode():
        recon, errors = (x.cpu() for x in half.reconstruct(pixels.to(DEVICE)))
        expected = single(pixels_of(pixels).float().to(DEVICE)).cpu()
    assert expected.std() > 0.02
    assert (recon - expected).square().mean().sqrt() < 0.05 * expected.std()
    squares = sliced((recon - pixels_of(pixels)).square(), model.num_patch)
    assert_close(errors, squares.mean(dim=(2, 3, 4)))
