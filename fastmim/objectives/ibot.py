"""iBOT: DINO, and the student predicts hidden patches as its moving average sees them (Zhou et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from .dino import DINO, GLOBALS
from .self_distillation import Centre, class_loss, cross_entropy, hidden_weights, sharpened, warm_temperature
from .views import Images


class IBOT(DINO):
    """:class:`.DINO` whose student sees global crops with patches hidden, and predicts what the teacher says there.

    Args:
        out_dim: prototypes, of class tokens and patches alike
        local_crops: small crops an image
        global_scale: area of a global crop as a share of the image
        local_scale: area of a local crop
        class_weight: weight of the loss of class tokens
        patch_weight: weight of the loss of hidden patches
        teacher_temp: temperature of the teacher's softmax of class tokens, at the end of its warm-up
        teacher_patch_temp: the same of patches
        warmup_teacher_patch_temp: temperature of patches until masking starts
        warmup_teacher_temp_epochs: epochs until the teacher's temperatures are reached
        mask_prob: share of global crops with hidden patches
        mask_ratio: share of their patches that is hidden, [low, high]
        mask_start_epoch: epochs without hidden patches
        common: of :class:`.DINO`
    """

    teacher_patch_temp: Tensor

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        out_dim: int = 8192,
        local_crops: int = 10,
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.25),
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        teacher_temp: float = 0.07,
        teacher_patch_temp: float = 0.07,
        warmup_teacher_patch_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        mask_prob: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_start_epoch: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(
            encoder=encoder,
            out_dim=out_dim,
            local_crops=local_crops,
            global_scale=global_scale,
            local_scale=local_scale,
            teacher_temp=teacher_temp,
            warmup_teacher_temp_epochs=warmup_teacher_temp_epochs,
            **common,
        )
        self.class_weight, self.patch_weight = class_weight, patch_weight
        self.mask_prob, self.mask_ratio, self.mask_start_epoch = mask_prob, mask_ratio, mask_start_epoch
        patches: dict[str, Any] = dict(start=warmup_teacher_patch_temp, end=teacher_patch_temp, delay=mask_start_epoch)
        self._patch_temperature: dict[str, Any] = dict(patches, warm_up=warmup_teacher_temp_epochs)
        self.patch_centre = Centre((1, 1, out_dim), self._centre_momentum)
        self.register_buffer("teacher_patch_temp", torch.tensor(teacher_patch_temp), persistent=False)

    def _mask_token(self) -> None:
        """It starts at 0."""
        nn.init.zeros_(self.encoder.mask_token)

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of a global crop."""
        stride = self.encoder.stride
        return -(-self.img_size[0] // stride), -(-self.img_size[1] // stride)

    def forward(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: As of :meth:`.DINO.forward`.
            mask: (2, B, rows, columns) bool of hidden tokens of :attr:`token_grid`, for each global crop.

        Returns:
            ``loss`` = class_weight · ``cls`` + patch_weight · ``patch``, float32, and the last two.
        """
        crops, local = self.crops(images)
        rows, weights = self._hidden(mask, len(crops))
        teacher_class, (teacher_mean, teacher_rows) = self._teach_patches(crops, rows)
        student_class, student_rows = self.learn(crops, local, self._patch_mask(mask), rows)
        target = sharpened(teacher_class, self.centre.value, self.teacher_temp)
        cls = class_loss(student_class, target, self.student_temp)
        target = sharpened(teacher_rows, self.patch_centre.value, self.teacher_patch_temp)
        patch = (cross_entropy(student_rows, target, self.student_temp) * weights).sum()
        if self.training:
            self.patch_centre.add(teacher_mean, 1)
        loss = self.class_weight * cls + self.patch_weight * patch
        return {"loss": loss, "cls": cls.detach(), "patch": patch.detach()}

    def _teach_patches(self, crops: Tensor, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        classes, patches = self.teach(crops, rows)
        return classes, (patches[0], patches[1:])

    def _hidden(self, mask: Tensor, crops: int) -> tuple[Tensor, Tensor]:
        """Numbers (R,) of the hidden tokens among those of all global crops, and the weight of each in the loss."""
        expected = (GLOBALS, crops // GLOBALS, *self.token_grid)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        weights = hidden_weights(mask.flatten(0, 1).flatten(1).bool()).flatten()
        if not fk.shape_may_follow(mask):
            return torch.arange(len(weights), device=weights.device), weights
        rows = weights.nonzero().squeeze(1)
        return rows, weights[rows]

    def _patch_mask(self, mask: Tensor) -> Tensor:
        """(2B, H/p, W/p): each hidden token over the patches that it is made of."""
        repeat = self.encoder.stride // self.encoder.patch_size
        wide = mask.flatten(0, 1).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
        return wide[:, : self.encoder.grid[0], : self.encoder.grid[1]]

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """Temperatures follow the epoch, the teacher's momentum the step."""
        super().set_step(step, total, steps_per_epoch)
        self.teacher_patch_temp.fill_(warm_temperature(self._epoch, **self._patch_temperature))

    def after_step(self) -> None:
        """Both centres move."""
        super().after_step()
        self.patch_centre.move()
