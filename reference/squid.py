"""The generator (paper section 3.1 and figure 2): encoder, in-painting, student and teacher.

An image is cut into N = P * P patches. The encoder sees each patch alone. The *student* decodes
the in-painted features, the *teacher* the encoder's features as they are; the student is pulled
towards the teacher level by level (knowledge distillation), and both reconstruct the image.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Down, In, Out, Up, to_image, to_patches
from .inpaint import InpaintBlock
from .memory import BLOCKS


class SQUID(nn.Module):
    """The published auto-encoder: same constructor, same state dict, same outputs.

    Args:
        num_in_ch: image channels.
        features_root: F; the widths are F, 2F, 4F, 8F, 16F, 16F.
        shrink_thres: int k > 0 Gumbel, float > 0 hard, 0 no shrinkage, in every memory.
        num_slots: slots of each memory queue.
        num_patch: P, patches per side.
        level: L, how often resolution is halved.
        ratio: keep probability of the masked shortcut of the in-painting block.
        drop: dropout in the in-painting block.
        memory_channel: C of the queues, 16F / 4 * (H / P / 2**L)**2 with L = 4.
        dist: add a teacher.
        initial_combine: the decoders combine the patches to an image before step
            L - ``initial_combine``; None: only after the last step.
        mem_num_slots: slots of each decoder memory matrix.
        ops: per decoder step "concat" (with skip) or "none".
        decoder_memory: per level None or {"type", "multiplier", "num_memory"}.

    >>> model = SQUID(1, 4, 3, num_slots=8, level=2, memory_channel=16, ops=("concat", "none"))
    >>> outputs = model.eval()(torch.rand(2, 1, 16, 16))
    >>> outputs["recon"].shape, outputs["patch"].shape
    (torch.Size([2, 1, 16, 16]), torch.Size([8, 1, 8, 8]))
    """

    def __init__(
        self,
        num_in_ch: int,
        features_root: int,
        shrink_thres: int | float,
        num_slots: int = 200,
        num_patch: int = 2,
        level: int = 4,
        ratio: float = 0.95,
        drop: float = 0.0,
        memory_channel: int = 2048,
        dist: bool = False,
        initial_combine: int | None = None,
        mem_num_slots: int = 200,
        ops: tuple[str, ...] = ("concat", "concat", "none", "none"),
        decoder_memory: list[dict[str, Any] | None] | None = None,
    ) -> None:
        super().__init__()
        w = [features_root * f for f in (1, 2, 4, 8, 16, 16)]
        L, self.level, self.num_patch, self.dist = level, level, num_patch, dist
        # The step before which patches become an image; level = after the last one.
        self.combine_step = L - (initial_combine or 0)
        self.whole_skips = initial_combine or 0

        def decoder() -> nn.ModuleList:
            skip_width = [w[L - 1 - i] if op == "concat" else 0 for i, op in enumerate(ops)]
            return nn.ModuleList(
                Up(w[L - i] + skip_width[i], w[L - 1 - i], op) for i, op in enumerate(ops)
            )

        self.in_conv = In(num_in_ch, w[0])
        self.down_blocks = nn.ModuleList(Down(w[i], w[i + 1]) for i in range(L))
        self.inpaint_block = InpaintBlock(
            w[L], num_slots, num_patch**2, memory_channel, shrink_thres, ratio, drop
        )
        self.up_blocks = decoder()
        self.memory_blocks = nn.ModuleList(
            nn.Identity()
            if entry is None
            else BLOCKS[entry["type"]](
                mem_num_slots, w[i] * entry["multiplier"], entry["num_memory"], shrink_thres
            )
            for i, entry in enumerate(decoder_memory or [None] * L)
        )
        self.out_conv = Out(w[0], num_in_ch)
        if dist:
            self.teacher_ups = decoder()
            self.teacher_out = Out(w[0], num_in_ch)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Reconstruct images [B, Cin, H, W] in [0, 1]; returns the published dictionary.

        recon [B, Cin, H, W], patch [B*N, Cin, H/P, W/P], embedding [B, w_L, H/2**L, W/2**L],
        teacher_recon [B, Cin, H, W] and dist_loss [] (both None without a teacher).
        """
        P, L = self.num_patch, self.level
        x = self.in_conv(to_patches(images, P))
        skips = []
        for i, down in enumerate(self.down_blocks):
            skips.append(to_image(x, P) if i < self.whole_skips else x)
            x = down(x)
        embedding = to_image(x, P)

        student, teacher = self.inpaint_block(x), x.detach()
        dist_loss = torch.zeros((), dtype=x.dtype, device=x.device)
        for i in range(L):
            if i == self.combine_step:
                student, teacher = to_image(student, P), to_image(teacher, P)
            skip = skips[L - 1 - i]
            student = self.memory_blocks[L - 1 - i](self.up_blocks[i](student, skip))
            if self.dist:
                teacher = self.teacher_ups[i](teacher, skip.detach())
                # No stop-gradient on either side: the distillation trains the teacher too.
                dist_loss = dist_loss + F.mse_loss(student, teacher)

        def finish(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return head(to_image(x, P) if self.combine_step == L else x)

        recon = finish(self.out_conv, student)
        return {
            "recon": recon,
            "patch": to_patches(recon, P),
            "embedding": embedding,
            "teacher_recon": finish(self.teacher_out, teacher) if self.dist else None,
            "dist_loss": dist_loss if self.dist else None,
        }
