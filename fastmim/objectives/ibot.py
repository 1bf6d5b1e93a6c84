"""iBOT: DINO, and the student predicts hidden patches as its moving average sees them (Zhou et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from .arguments import at_least
from .block_masks import IBOT_RATIOS, ibot_mask, masked_rows, most_rows, row_weights
from .dino import DINO, GLOBALS
from .self_distillation import Centre, warm_temperature
from .views import Images

TYPICAL_BATCH = 64
"""Of which :meth:`IBOT.shares` tells; smaller ones have more places to spare."""


class IBOT(DINO):
    """:class:`.DINO` whose student sees global crops with patches hidden, and predicts what the teacher says there.

    Args:
        out_dim: prototypes
        shared_head: class tokens and patches have the same prototypes, the student's
        shared_head_teacher: the same of the teacher, whose follow those of the student's class tokens
        patch_out_dim: prototypes of patches where neither is shared; 0: out_dim
        local_crops: small crops an image
        global_scale: area of a global crop as a share of the image
        local_scale: area of a local crop
        class_weight: weight of the loss of class tokens
        patch_weight: weight of the loss of hidden patches
        teacher_temp: temperature of the teacher's softmax of class tokens, at the end of its warm-up
        teacher_patch_temp: the same of patches
        warmup_teacher_patch_temp: temperature of patches until masking starts
        warmup_teacher_temp_epochs: epochs until the teacher's temperatures are reached
        mask_ratios: ranges of the share of hidden patches, of which each global crop takes one
        mask_shape: hide blocks, or single patches at random
        mask_start_epoch: epochs without hidden patches
        common: of :class:`.DINO`
    """

    teacher_patch_temp: Tensor

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        out_dim: int = 8192,
        shared_head: bool = True,
        shared_head_teacher: bool = True,
        patch_out_dim: int = 0,
        local_crops: int = 10,
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.25),
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        teacher_temp: float = 0.07,
        teacher_patch_temp: float = 0.07,
        warmup_teacher_patch_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        mask_ratios: tuple[tuple[float, float], ...] = IBOT_RATIOS,
        mask_shape: Literal["block", "random"] = "block",
        mask_start_epoch: int = 0,
        **common: Any,
    ) -> None:
        _check_own(mask_ratios=mask_ratios, class_weight=class_weight, patch_weight=patch_weight,
                   mask_start_epoch=mask_start_epoch)  # fmt: skip
        _check_heads(out_dim, shared_head, shared_head_teacher, patch_out_dim)
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
        self.mask_ratios, self.mask_shape, self.mask_start_epoch = mask_ratios, mask_shape, mask_start_epoch
        patches: dict[str, Any] = dict(start=warmup_teacher_patch_temp, end=teacher_patch_temp, delay=mask_start_epoch)
        self._patch_temperature: dict[str, Any] = dict(patches, warm_up=warmup_teacher_temp_epochs)
        self.patch_centre = Centre((1, 1, patch_out_dim or out_dim), self._centre_momentum)
        for head, shared in ((self.head, shared_head), (self.teacher.head, shared_head_teacher)):
            if not shared:
                head.separate_patches(patch_out_dim or out_dim)
        self.teacher.requires_grad_(False)
        self.after_loading()
        self.register_buffer("teacher_patch_temp", torch.tensor(teacher_patch_temp, device="cpu"), persistent=False)

    @torch.no_grad()
    def after_loading(self) -> None:
        """The teacher starts as the student; prototypes that its patches and class tokens share, as those of patches.

        So it is in the authors' code, where a shared layer has two names and that of patches is read last.
        """
        super().after_loading()
        if self.teacher.head.last_layer2 is None and self.head.last_layer2 is not None:
            self.teacher.head.last_layer.load_state_dict(self.head.last_layer2.state_dict())

    @classmethod
    def check(cls, *, encoder: Mapping[str, Any], **given: Any) -> None:
        """As :meth:`.DINO.check`; masks leave some patches visible, weights are not negative."""
        super().check(encoder=encoder, **given)
        _check_own(**given)
        _check_heads(**given)

    def _mask_token(self) -> None:
        """It starts at 0."""
        nn.init.zeros_(self.encoder.mask_token)

    def forward(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: As of :meth:`.DINO.forward`.
            mask: (2, B, rows, columns) bool of hidden tokens of :attr:`token_grid`, for each global crop.

        Returns:
            ``loss`` = class_weight · ``cls`` + patch_weight · ``patch``, float32; these two, and the monitors of
            :meth:`.DINO.class_loss`.
        """
        crops, local = self.crops(images)
        rows, weights = self._hidden(mask, len(crops))
        teacher_class, teacher_rows = self.teach(crops, rows)
        student_class, student_rows = self.learn(crops, local, self._patch_mask(mask), rows)
        cls, monitors = self.class_loss(student_class, teacher_class)
        patch = self.patch_loss(student_rows, teacher_rows, weights)
        parts = ((self.class_weight, cls), (self.patch_weight, patch))
        first, second = (part if weight == 1 else weight * part for weight, part in parts)
        return {"loss": first + second, "cls": cls.detach(), "patch": patch.detach(), **monitors}

    def patch_loss(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        """The mean over crops of the mean over their hidden patches, from the logits of these (R, K).

        Args:
            student, weights: Of the hidden patches; (R,).
            teacher: (1 + R, K), before them the mean over all patches, which counts for the centre.
        """
        temps: dict[str, Any] = dict(student_temp=self.student_temp, teacher_temp=self.teacher_patch_temp)
        mean, teacher = teacher.tensor_split([1])
        centre = self.patch_centre.value
        loss = fk.distillation(student, teacher, centre, **temps, weight=weights, impl=self.impl)
        if self.training:
            self.patch_centre.add(mean)
        return loss

    def _hidden(self, mask: Tensor, crops: int) -> tuple[Tensor, Tensor]:
        """Numbers (R,) of the hidden tokens among those of all global crops, and the weight of each in the loss."""
        expected = (GLOBALS, crops // GLOBALS, *self.token_grid)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        flat = mask.flatten(0, 1).flatten(1)
        if fk.shape_may_follow(mask):
            weights = row_weights(flat.bool()).flatten()
            rows = weights.nonzero().squeeze(1)
            return rows, weights[rows] / len(flat)
        most = most_rows(len(flat), self.token_grid, self.mask_ratios)
        rows, weights = masked_rows(flat, most)
        # Masks of another distribution: no row is left out in silence.
        return rows, weights / torch.where(flat.sum() > most, torch.nan, len(flat))

    def _patch_mask(self, mask: Tensor) -> Tensor:
        """(2B, H/p, W/p): each hidden token over the patches that it is made of."""
        repeat = self.encoder.stride // self.encoder.patch_size
        wide = mask.flatten(0, 1).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
        return wide[:, : self.encoder.grid[0], : self.encoder.grid[1]]

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(2, B, rows, columns) bool, the masks of both global crops, keyed by (seed, epoch, sample id, crop)."""
        ids, crops = sample_ids.repeat(GLOBALS), torch.arange(GLOBALS, device=sample_ids.device)
        if epoch < self.mask_start_epoch:
            mask = torch.zeros(len(ids), *self.token_grid, dtype=torch.bool, device=ids.device)
        else:
            how: dict[str, Any] = dict(grid=self.token_grid, ratios=self.mask_ratios, shape=self.mask_shape)
            crop = crops.repeat_interleave(len(sample_ids))
            mask = ibot_mask(ids, **how, seed=seed, epoch=epoch, crop=crop)
        return mask.unflatten(0, (GLOBALS, -1))

    def shares(self) -> dict[str, float]:
        """Masks hide on average the middle of their ratios; of the places for hidden rows as many are read."""
        hidden = sum((low + high) / 2 for low, high in self.mask_ratios) / len(self.mask_ratios)
        cells, crops = self.token_grid[0] * self.token_grid[1], 2 * TYPICAL_BATCH
        most = most_rows(crops, self.token_grid, self.mask_ratios)
        return {"mask_tokens": 1 - hidden, "distillation": hidden * cells * crops / most}

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """Temperatures follow the epoch, the teacher's momentum the step."""
        super().set_step(step, total, steps_per_epoch)
        self.teacher_patch_temp.fill_(warm_temperature(self._epoch, **self._patch_temperature))

    def after_step(self) -> None:
        """Both centres move."""
        super().after_step()
        self.patch_centre.move()

    def skip_step(self) -> None:
        """Neither moves."""
        super().skip_step()
        self.patch_centre.forget()


def _check_own(mask_ratios: Sequence[tuple[float, float]] = IBOT_RATIOS, **given: Any) -> None:
    if not mask_ratios or not all(0 <= low <= high < 1 for low, high in mask_ratios):
        shown = [list(pair) for pair in mask_ratios]
        raise ValueError(f"mask_ratios={shown}: ranges [low, high], each must satisfy 0 <= low <= high < 1")
    for name in ("class_weight", "patch_weight", "mask_start_epoch"):
        at_least(name, given.get(name, 0), 0)


def _check_heads(
    out_dim: int = 8192,
    shared_head: bool = True,
    shared_head_teacher: bool = True,
    patch_out_dim: int = 0,
    **_: Any,
) -> None:
    at_least("patch_out_dim", patch_out_dim, 0)
    if shared_head and not shared_head_teacher:
        raise ValueError("shared_head_teacher=false: the student has nothing to follow; use shared_head=false too")
    if patch_out_dim not in (0, out_dim) and shared_head_teacher:
        raise ValueError(
            f"patch_out_dim={patch_out_dim}: other than out_dim={out_dim} needs shared_head=false and "
            "shared_head_teacher=false; or use 0"
        )
