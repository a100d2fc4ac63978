"""The masked shortcut (paper section 3.3).

If the in-painted features were all that the decoder sees, training would be hard at first; if
the input could pass beside the block, there would be nothing to learn. So in training a random
few positions take the shortcut:

    out = mask * in-painted + (1 - mask) * input,    mask ~ Bernoulli(keep_probability)

In evaluation there is no shortcut.
"""

import torch


def masked_shortcut(
    inpainted: torch.Tensor,
    shortcut: torch.Tensor,
    keep_probability: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blend of two maps [B, C, H, W] by one draw per (image, row, column), shared by the channels.

    ``mask`` [B, 1, H, W] is drawn anew unless it is given.

    >>> ones, zeros = torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    >>> mask = torch.tensor([1, 0, 1, 1]).view(1, 1, 1, 4)
    >>> masked_shortcut(ones, zeros, 0.95, mask)[0, :, 0].tolist()
    [[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]
    """
    if mask is None:
        B, _, H, W = inpainted.shape
        probability = torch.full((B, 1, H, W), keep_probability, device=inpainted.device)
        mask = torch.bernoulli(probability)
    mask = mask.to(inpainted.dtype)
    return mask * inpainted + (1 - mask) * shortcut
