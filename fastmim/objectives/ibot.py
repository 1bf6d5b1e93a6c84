"""iBOT: a student predicts what its own moving average says of hidden patches and of other crops (Zhou et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from ..models import create_encoder
from ..models.layers import to_pair
from .base import Objective
from .groups import split_by_rank
from .heads import ProjectionHead
from .schedule import Schedule
from .self_distillation import Centre, cross_entropy, sharpened, warm_temperature
from .views import Images, View

GLOBALS = 2


class IBOT(Objective):
    """Student and teacher, each an encoder and a head, on two global crops and some local ones.

    The student sees global crops with patches hidden and local crops whole; the teacher sees the global crops whole. For
    each hidden patch the student predicts the teacher's distribution over prototypes there, and from the class token
    of every crop that of the class token of each *other* global crop.

    Args:
        out_dim: prototypes
        hidden_dim: width of the heads' MLP
        bottleneck_dim: width of the directions that the prototypes are compared with
        norm_last_layer: prototypes keep length 1; ViT-S and Swin learn it
        local_crops: small crops an image
        local_size: pixels of their edge
        global_scale: area of a global crop as a share of the image
        local_scale: area of a local crop
        patch_weight: weight of the loss of hidden patches, 0 = DINO
        student_temp: temperature of the student's softmax
        teacher_temp: temperature of the teacher's softmax of class tokens, at the end of the warm-up
        teacher_patch_temp: the same of patches
        warmup_teacher_temp: temperature of both in the first epoch
        warmup_teacher_temp_epochs: epochs until the teacher's temperatures are reached
        centre_momentum: share of a centre that stays in an update
        momentum_teacher: share of the teacher that stays in the first update, 1 in the last
        freeze_last_layer: epochs in which the student's prototypes stay as they are
        mask_prob: share of global crops with hidden patches
        mask_ratio: share of their patches that is hidden, [low, high]
        mask_start_epoch: epochs without hidden patches
        common: of every :class:`Objective`
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        out_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        local_crops: int = 10,
        local_size: int = 96,
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.25),
        patch_weight: float = 1.0,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        teacher_patch_temp: float = 0.07,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        centre_momentum: float = 0.9,
        momentum_teacher: float = 0.996,
        freeze_last_layer: int = 1,
        mask_prob: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_start_epoch: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(encoder=encoder, **common)
        self.local_crops, self.local_size = local_crops, to_pair(local_size, "local_size")
        self.global_scale, self.local_scale = global_scale, local_scale
        self.patch_weight, self.student_temp = patch_weight, student_temp
        self.warm_up = dict(start=warmup_teacher_temp, warm_up=warmup_teacher_temp_epochs)
        self.temperatures = teacher_temp, teacher_patch_temp
        self.momentum_teacher, self.freeze_last_layer = momentum_teacher, freeze_last_layer
        self.mask_prob, self.mask_ratio, self.mask_start_epoch = mask_prob, mask_ratio, mask_start_epoch
        head = dict(hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, learn_length=not norm_last_layer)
        self.head = ProjectionHead(self.encoder.num_features, out_dim, **head)
        nn.init.zeros_(self.encoder.mask_token)
        self.teacher = Teacher(
            create_encoder({**encoder, "drop_path_rate": 0.0}, impl=self.impl),
            ProjectionHead(self.encoder.num_features, out_dim, **head),
        )
        self.teacher.follow(self.encoder, self.head)
        self.centre, self.patch_centre = (Centre(s, centre_momentum) for s in ((1, out_dim), (1, 1, out_dim)))
        for name, value in (("teacher_temp", teacher_temp), ("teacher_patch_temp", teacher_patch_temp)):
            self.register_buffer(name, torch.tensor(value, device="cpu"), persistent=False)
        self._epoch, self._momentum = 0, momentum_teacher

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of a global crop."""
        stride = self.encoder.stride
        return -(-self.img_size[0] // stride), -(-self.img_size[1] // stride)

    def forward(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: (2, B, C, H, W) global crops and (n, B, C, h, w) local ones, float normalised by mean and std, or
                uint8; a (B, C, H, W) tensor alone stands for both global crops, without local ones.
            mask: (2, B, rows, columns) bool of hidden tokens of :attr:`token_grid`.

        Returns:
            ``loss`` = ``cls`` + patch_weight · ``patch``, float32, and the last two.
        """
        crops, local = self._crops(images, mask)
        rows, weights = self._hidden(mask)
        teacher_class, teacher_patch = self._teach(crops, rows)
        student_class, student_patch = self._learn(crops, local, mask, rows)
        cls = self._class_loss(student_class, sharpened(teacher_class, self.centre.value, self.teacher_temp))
        target = sharpened(teacher_patch, self.patch_centre.value, self.teacher_patch_temp)
        patch = (cross_entropy(student_patch, target, self.student_temp) * weights).sum()
        return {"loss": cls + self.patch_weight * patch, "cls": cls.detach(), "patch": patch.detach()}

    def _crops(self, images: Images, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Global crops (2B, C, H, W) and local ones (nB, C, h, w), normalised."""
        views = (images.expand(GLOBALS, *images.shape),) if isinstance(images, Tensor) else images
        crops, *local = (self.normalise(view.flatten(0, 1)) for view in views)
        expected = (GLOBALS, len(crops) // GLOBALS, *self.token_grid)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        return crops, local[0] if local else None

    def _hidden(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (R,) of the hidden tokens among those of all global crops, and the weight of each in the loss.

        A crop counts 1/(2B) whatever the number of its hidden tokens; one without any counts 0.
        """
        flat = mask.flatten(0, 1).flatten(1).bool()
        weights = (1 / (flat.sum(1).clamp(min=1) * len(flat))).repeat_interleave(flat.shape[1])
        if fk.shape_may_follow(mask):
            rows = flat.flatten().nonzero().squeeze(1)
            return rows, weights[rows]
        return torch.arange(flat.numel(), device=flat.device), weights * flat.flatten()

    @torch.no_grad()
    def _teach(self, crops: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits of class tokens (2B, K) and of ``rows`` (R, K); the sums of both go to the centres.

        The patch centre is the mean over *all* patches. The last layer is linear, so that of the directions' mean is
        the mean of their logits, and only the rows that the loss reads are projected.
        """
        head = self.teacher.head
        cls, patches = self.teacher.encoder.forward_tokens(crops)
        directions = head.directions(torch.cat((cls, patches.flatten(0, 2))))
        own, rest = directions[: len(cls)], directions[len(cls) :]
        logits = head.last_layer(torch.cat((own, rest[rows], rest.mean(0, keepdim=True))))
        if self.training:
            self.centre.add(logits[: len(cls)].sum(0), len(cls))
            self.patch_centre.add(logits[-1], 1)
        return logits[: len(cls)], logits[len(cls) : -1]

    def _learn(
        self, crops: Tensor, local: Tensor | None, mask: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student's logits of class tokens ((2 + n)B, K) and of ``rows`` (R, K)."""
        cls, patches = self.encoder.forward_tokens(crops, self._patch_mask(mask))
        tokens = [cls]
        if local is not None:
            tokens.append(self.encoder.forward_tokens(local)[0])
        classes = sum(len(part) for part in tokens)
        logits = self.head(torch.cat((*tokens, patches.flatten(0, 2)[rows])))
        return logits[:classes], logits[classes:]

    def _patch_mask(self, mask: Tensor) -> Tensor:
        """(2B, H/p, W/p): each hidden token over the patches that it is made of."""
        repeat = self.encoder.stride // self.encoder.patch_size
        wide = mask.flatten(0, 1).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
        return wide[:, : self.encoder.grid[0], : self.encoder.grid[1]]

    def _class_loss(self, student: Tensor, target: Tensor) -> Tensor:
        """Mean over images and over pairs of a global crop and another crop."""
        first, second = target.chunk(GLOBALS)
        count = len(student) // len(first)
        targets = torch.stack((second, first, *[first + second] * (count - GLOBALS)))
        losses = cross_entropy(student.unflatten(0, (count, -1)), targets, self.student_temp)
        return losses.mean(1).sum() / (GLOBALS * (count - 1))

    def views(self) -> tuple[View, ...]:
        """Two global crops, and the local ones."""
        wide = View(self.img_size, count=GLOBALS, scale=self.global_scale, interpolation="bicubic")
        small = View(self.local_size, count=self.local_crops, scale=self.local_scale, interpolation="bicubic")
        return (wide, small) if self.local_crops else (wide,)

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """Temperatures follow the epoch, the teacher's momentum the step."""
        self._epoch = step // steps_per_epoch
        delays = 0, self.mask_start_epoch
        buffers = self.teacher_temp, self.teacher_patch_temp
        for buffer, end, delay in zip(buffers, self.temperatures, delays, strict=True):
            buffer.fill_(warm_temperature(self._epoch, end=end, delay=delay, **self.warm_up))
        self._momentum = Schedule(name="cosine", base_lr=self.momentum_teacher, min_lr=1.0, total_steps=total)(step)

    def set_micro_batch(self, index: int, count: int) -> None:
        super().set_micro_batch(index, count)
        self.teacher.encoder.set_micro_batch(index, count)

    def after_step(self) -> None:
        """Both centres move."""
        self.centre.move()
        self.patch_centre.move()

    def skip_step(self) -> None:
        """Neither centre moves."""
        self.centre.forget()
        self.patch_centre.forget()

    def ema(self) -> list[tuple[nn.Module, nn.Module]]:
        """The teacher follows encoder and head."""
        return [(self.teacher.encoder, self.encoder), (self.teacher.head, self.head)]

    def ema_momentum(self) -> float:
        """Of the step that :meth:`set_step` named."""
        return self._momentum

    def freezable(self) -> Iterable[nn.Parameter]:
        """The student's prototypes, if ever."""
        return self.head.last_layer.parameters() if self.freeze_last_layer else ()

    def frozen(self) -> Iterable[nn.Parameter]:
        """The student's prototypes, in the first epochs."""
        return self.head.last_layer.parameters() if self._epoch < self.freeze_last_layer else ()

    def groups(self, weight_decay: float, policy: str) -> list[dict[str, Any]]:
        """With "parity" every matrix decays, tokens and position tables too, as in the reference."""
        return split_by_rank(self, weight_decay) if policy == "parity" else super().groups(weight_decay, policy)


class Teacher(nn.Module):
    """The moving average of encoder and head; no gradient reaches it."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head: Any = head
        self.encoder.register_parameter("mask_token", None)  # it sees everything
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, encoder: nn.Module, head: nn.Module) -> None:
        """Become equal to these."""
        for own, student in ((self.encoder, encoder), (self.head, head)):
            named = dict(student.named_parameters())
            for name, param in own.named_parameters():
                param.copy_(named[name])
