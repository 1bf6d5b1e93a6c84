"""DINO: a student predicts what its own moving average says of other crops of the image (Caron et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.distillation.monitors import mean_target_entropy, view_agreement

from ..models import create_encoder, encoder_settings
from ..models.layers import to_pair
from ..models.recomputed import repeated
from ..models.rules import patch_grid
from .arguments import at_least, no_colours
from .base import Objective
from .groups import split_by_rank
from .heads import ProjectionHead
from .photometric import Photometric
from .pictures import Picture, attention
from .schedule import Schedule
from .self_distillation import Centre, Teacher, warm_temperature
from .views import Images, View

GLOBALS = 2
MONITORED = 64
"""Images of a micro-batch from which :meth:`DINO.class_loss` tells of a collapse."""


class DINO(Objective):
    """Student and teacher, each an encoder and a head, on two global crops of an image and some local ones.

    The teacher sees the global crops. From the class token of every crop the student predicts the teacher's
    distribution over prototypes of each *other* global crop.

    Args:
        out_dim: prototypes
        hidden_dim: width of the heads' MLP
        bottleneck_dim: width of the directions that the prototypes are compared with
        norm_last_layer: prototypes keep length 1; ViT-S and Swin learn it
        local_crops: small crops an image
        local_size: pixels of their edge
        crop_chunks: groups of small crops that are held one at a time, for a second forward pass of them; 0: hold all
        global_scale: area of a global crop as a share of the image
        local_scale: area of a local crop
        augment: change the colours of crops (jitter, grey, blur, solarise); false where colours have a meaning
        student_temp: temperature of the student's softmax
        teacher_temp: temperature of the teacher's softmax, at the end of its warm-up
        warmup_teacher_temp: temperature of the teacher in the first epoch
        warmup_teacher_temp_epochs: epochs until the teacher's temperature is reached
        centre_momentum: share of the centre that stays in an update
        momentum_teacher: share of the teacher that stays in the first update, 1 in the last
        freeze_last_layer: epochs in which the student's prototypes stay as they are
        common: of every :class:`Objective`
    """

    student_temp: Tensor
    teacher_temp: Tensor

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        local_crops: int = 8,
        local_size: int = 96,
        crop_chunks: int = 0,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        augment: bool = True,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        centre_momentum: float = 0.9,
        momentum_teacher: float = 0.996,
        freeze_last_layer: int = 1,
        **common: Any,
    ) -> None:
        given = dict(locals())
        self.check(**{name: value for name, value in given.items() if name not in ("self", "common", "__class__")})
        self.check_pixels(**common, augment=augment)
        super().__init__(encoder=encoder, **common)
        self.local_crops, self.local_size = local_crops, to_pair(local_size, "local_size")
        self.crop_chunks = crop_chunks
        self.global_scale, self.local_scale = global_scale, local_scale
        self.augment = augment
        if augment and self.in_chans not in (1, 3):
            raise ValueError(f"augment=true: changes colours of 1 or 3 channels, not of {self.in_chans}; use false")
        warm_up = warmup_teacher_temp_epochs
        self._temperature: dict[str, Any] = dict(start=warmup_teacher_temp, end=teacher_temp, warm_up=warm_up)
        self._last_momentum, self._freeze, self._centre_momentum = momentum_teacher, freeze_last_layer, centre_momentum
        width, learnt = self.encoder.num_features, not norm_last_layer
        head: dict[str, Any] = dict(hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, learn_length=learnt)
        head["impl"] = self.impl
        self.head = ProjectionHead(width, out_dim, **head)
        self._mask_token()
        still = create_encoder({**encoder, "drop_path_rate": 0.0}, impl=self.impl)
        self.teacher = Teacher(still, ProjectionHead(width, out_dim, **head))
        self.teacher.follow(self.encoder, self.head)
        self.centre = Centre((1, out_dim), centre_momentum)
        self.register_buffer("student_temp", torch.tensor(student_temp, device="cpu"), persistent=False)
        self.register_buffer("teacher_temp", torch.tensor(teacher_temp, device="cpu"), persistent=False)
        self._epoch, self._momentum = 0, momentum_teacher

    def _mask_token(self) -> None:
        """Nothing is hidden."""
        self.encoder.register_parameter("mask_token", None)

    @classmethod
    def check(cls, *, encoder: Mapping[str, Any], **given: Any) -> None:
        """Sizes, temperatures and shares are possible, and local crops fit the encoder; see :meth:`Objective.check`."""
        for name in ("out_dim", "hidden_dim", "bottleneck_dim"):
            at_least(name, given[name], 1)
        for name in ("local_crops", "crop_chunks", "warmup_teacher_temp_epochs", "freeze_last_layer"):
            at_least(name, given[name], 0)
        if given["crop_chunks"] > given["local_crops"]:
            raise ValueError(f"crop_chunks={given['crop_chunks']}: more groups than local_crops={given['local_crops']}")
        for name in (name for name in given if name.endswith("_temp")):
            if not given[name] > 0:
                raise ValueError(f"{name}={given[name]}: must be > 0, for example 0.04 (teacher) or 0.1 (student)")
        for name in ("centre_momentum", "momentum_teacher"):
            if not 0 <= given[name] <= 1:
                raise ValueError(f"{name}={given[name]}: must lie in [0, 1]")
        for name in ("global_scale", "local_scale"):
            if not 0 < given[name][0] <= given[name][1] <= 1:
                raise ValueError(f"{name}={list(given[name])}: must satisfy 0 < low <= high <= 1")
        cls._check_encoder(encoder_settings(encoder), given)

    @classmethod
    def check_pixels(cls, *, pixels: str = "uint8", augment: bool = True, **_: Any) -> None:
        """Float images have no colours to change."""
        no_colours("augment", augment, False, pixels)

    @staticmethod
    def _check_encoder(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        if given["local_crops"]:
            try:
                patch_grid(to_pair(given["local_size"], "local_size"), settings["patch_size"])
            except ValueError as error:
                raise ValueError(str(error).replace("img_size", "local_size")) from None
        if settings["name"] != "vit":
            return
        if settings["shared_rel_pos_bias"] or settings["rel_pos_bias"]:
            raise ValueError("rel_pos_bias=true: a ViT's relative positions fit one size of crop; use abs_pos_embed")
        if not settings["abs_pos_embed"]:
            raise ValueError("abs_pos_embed=false: the ViT would not know where a patch is; use abs_pos_embed=true")

    def forward(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: (2, B, C, H, W) global crops and (n, B, C, h, w) local ones, float normalised by mean and std, or
                uint8; a (B, C, H, W) tensor alone stands for both global crops, without local ones.
            mask: Not read.

        Returns:
            ``loss`` float32, also as ``cls``, and the monitors of :meth:`class_loss`.
        """
        crops, local = self.crops(images)
        teacher, _ = self.teach(crops)
        student, _ = self.learn(crops, local)
        loss, monitors = self.class_loss(student, teacher)
        return {"loss": loss, "cls": loss.detach(), **monitors}

    def crops(self, images: Images) -> tuple[Tensor, Tensor | None]:
        """Global crops (2B, C, H, W), view after view, and local ones (nB, C, h, w), normalised."""
        views = [images.expand(GLOBALS, *images.shape)] if isinstance(images, Tensor) else list(images)
        if len(views[0]) < GLOBALS:  # two views, whose colours are changed in different ways
            views = [torch.cat(views[:GLOBALS]), *views[GLOBALS:]]
        if tuple(views[0].shape[2:]) != (self.in_chans, *self.img_size):
            expected = ", ".join(map(str, (self.in_chans, *self.img_size)))
            raise ValueError(f"global crops must have shape (2, B, {expected}), got {tuple(views[0].shape)}")
        crops, *local = (self.normalise(view.flatten(0, 1)) for view in views)
        return crops, local[0] if local else None

    def class_loss(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over images and over pairs of a global crop and another crop, and what tells of a collapse.

        ``teacher_entropy``: of the teacher's distributions, in nats. ``mean_entropy``: of their mean over images; it
        falls to the other where every image gets the same distribution. ``agreement``: share of the images of whose
        one global crop the student says the code that the teacher says of the other. The last two from a few images.
        """
        student, teacher = student.unflatten(0, (-1, len(teacher) // GLOBALS)), teacher.unflatten(0, (GLOBALS, -1))
        centre, heat = self.centre.value, self.teacher_temp
        temps: dict[str, Any] = dict(student_temp=self.student_temp, teacher_temp=heat)
        loss, entropy = fk.distillation_and_entropy(student, teacher, centre, **temps, pairs="views", impl=self.impl)
        few = teacher[:, :MONITORED]
        return loss, {
            "teacher_entropy": entropy,
            "mean_entropy": mean_target_entropy(few, centre, heat),
            "agreement": view_agreement(student[:GLOBALS, :MONITORED].detach(), few.flip(0)),
        }

    @torch.no_grad()
    def teach(self, crops: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The teacher's logits of class tokens (2B, K); with numbers ``rows`` of patch tokens those of their mean over
        all patches and of these, (1 + R, K), else none. Class tokens count for the centre.

        The last layer is linear: that of the mean direction is the mean of all patches' logits, and only the rows that
        the loss reads are projected.
        """
        head = self.teacher.head
        cls, patches = self.teacher.encoder.forward_tokens(crops)
        count = len(cls)
        read = head.directions(cls if rows is None else torch.cat((cls, patches.flatten(0, 2))))
        own, rest = read.tensor_split([count])
        if rows is not None:
            rest = torch.cat((rest.mean(0, keepdim=True), rest[rows]))
        logits, hidden = head.logits(own, rest)
        if self.training:
            self.centre.add(logits)
        return logits, hidden

    def learn(
        self, crops: Tensor, local: Tensor | None, mask: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The student's logits of the class tokens of all crops ((2 + n)B, K), and of ``rows`` of patches (R, K)."""
        # What is computed first is last in the backward pass, when the activations of the global crops are gone.
        small = [] if local is None or not self.crop_chunks else self._in_groups(local)
        cls, patches = self.encoder.forward_tokens(crops, mask)
        if local is not None and not small:
            small = [self._class_tokens(local)]
        return self.predict([cls, *small], patches, rows)

    def predict(self, tokens: list[Tensor], patches: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The student's logits of (n, D) class tokens, one after the other, and of ``rows`` of (B, h, w, D) patches."""
        sizes = [sum(map(len, tokens)), 0 if rows is None else len(rows)]
        read = self.head.directions(torch.cat(tokens if rows is None else (*tokens, patches.flatten(0, 2)[rows])))
        classes, hidden = self.head.logits(*read.split(sizes))
        return classes, hidden

    def _in_groups(self, local: Tensor) -> list[Tensor]:
        """The student's class tokens of each group of local crops (nB, C, h, w), whose activations are not kept."""
        return [repeated(self._class_tokens, group) for group in local.chunk(self.crop_chunks)]

    def _class_tokens(self, crops: Tensor) -> Tensor:
        return self.encoder.forward_tokens(crops)[0]

    def views(self) -> tuple[View, ...]:
        """Two global crops, and the local ones; the second global crop is seldom blurred but may be solarised."""
        wide: dict[str, Any] = dict(size=self.img_size, scale=self.global_scale, interpolation="bicubic")
        small: dict[str, Any] = dict(size=self.local_size, scale=self.local_scale, interpolation="bicubic")
        if not self.augment:
            views = [View(**wide, count=GLOBALS)]
        else:
            colours = Photometric(blur_p=1.0), Photometric(blur_p=0.1, solarize_p=0.2)
            views = [View(**wide, photometric=how) for how in colours]
            small["photometric"] = Photometric(blur_p=0.5)
        return (*views, View(**small, count=self.local_crops)) if self.local_crops else tuple(views)

    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """See :func:`~fastmim.objectives.pictures.attention`; the teacher's."""
        return attention(self.shown(images), self.teacher.encoder.attention(self.normalise(images)))

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """The temperature follows the epoch, the teacher's momentum the step."""
        self._epoch = step // steps_per_epoch
        self.teacher_temp.fill_(warm_temperature(self._epoch, **self._temperature))
        self._momentum = Schedule(name="cosine", base_lr=self._last_momentum, min_lr=1.0, total_steps=total)(step)

    def set_micro_batch(self, index: int, count: int) -> None:
        super().set_micro_batch(index, count)
        self.teacher.encoder.set_micro_batch(index, count)

    def after_step(self) -> None:
        """The centre moves."""
        self.centre.move()

    def skip_step(self) -> None:
        """It stays."""
        self.centre.forget()

    def exported(self) -> Any:
        """The teacher's."""
        return self.teacher.encoder

    def after_loading(self) -> None:
        """The teacher starts as the student."""
        self.teacher.follow(self.encoder, self.head)

    def ema(self) -> list[tuple[nn.Module, nn.Module]]:
        """The teacher follows encoder and head."""
        return [(self.teacher.encoder, self.encoder), (self.teacher.head, self.head)]

    def ema_momentum(self) -> float:
        """Of the step that :meth:`set_step` named."""
        return self._momentum

    def frozen(self) -> Iterable[nn.Parameter]:
        """The student's prototypes, in the first epochs."""
        return self.head.prototypes() if self._epoch < self._freeze else ()

    def freezable(self) -> Iterable[nn.Parameter]:
        """The student's prototypes, if ever."""
        return self.head.prototypes() if self._freeze else ()

    def groups(self, weight_decay: float, policy: str) -> list[dict[str, Any]]:
        """With "parity" every matrix decays, tokens and position tables too, as in the reference."""
        return split_by_rank(self, weight_decay) if policy == "parity" else super().groups(weight_decay, policy)
