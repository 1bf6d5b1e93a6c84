"""MoCo v3: of two crops of an image, each finds the other among those of the whole batch (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import create_encoder, encoder_settings
from .across_ranks import gather, ranks
from .arguments import no_colours
from .base import Objective
from .groups import all_decay
from .heads import norm_mlp
from .photometric import Photometric
from .pictures import Picture, attention
from .schedule import Schedule
from .self_distillation import Teacher
from .views import Images, View

VIEWS = 2


class MoCo(Objective):
    """Queries of an encoder, a projector and a predictor against keys of their moving average, without predictor.

    A query's positive is the key of the other crop of its image; its negatives are the keys of all other images of the
    micro-batch, over all ranks. Statistics of BatchNorm are those of the micro-batch over all ranks, too: with
    ``train.grad_accum_steps`` neither becomes that of the global batch.

    Args:
        hidden_dim: width of projector and predictor
        out_dim: of queries and keys
        projector_layers: linear layers of the projector
        predictor_layers: linear layers of the predictor
        temperature: of the softmax over keys
        momentum: share of the momentum encoder that stays in the first update, 1 in the last
        freeze_patch_embed: the patch projection stays as it was drawn
        scale: area of a crop as a share of the image
        augment: change the colours of crops (jitter, grey, blur, solarise); false where colours have a meaning
        common: of every :class:`Objective`
    """

    of_micro_batch = "negatives and BatchNorm statistics"

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        hidden_dim: int = 4096,
        out_dim: int = 256,
        projector_layers: int = 3,
        predictor_layers: int = 2,
        temperature: float = 0.2,
        momentum: float = 0.99,
        freeze_patch_embed: bool = True,
        scale: tuple[float, float] = (0.08, 1.0),
        augment: bool = True,
        **common: Any,
    ) -> None:
        given = dict(locals())
        self.check(**{name: value for name, value in given.items() if name not in ("self", "common", "__class__")})
        self.check_pixels(**common, augment=augment)
        super().__init__(encoder=encoder, **common)
        if augment and self.in_chans not in (1, 3):
            raise ValueError(f"augment=true: changes colours of 1 or 3 channels, not of {self.in_chans}; use false")
        self.temperature, self.scale, self.augment = temperature, scale, augment
        projector = [self.encoder.num_features, *[hidden_dim] * (projector_layers - 1), out_dim]
        self.encoder.register_parameter("mask_token", None)  # nothing is hidden
        self.head = norm_mlp(projector)
        self.predictor = norm_mlp([out_dim, *[hidden_dim] * (predictor_layers - 1), out_dim])
        if freeze_patch_embed:
            self.encoder.patch_embed.proj.requires_grad_(False)
        still = create_encoder({**encoder, "drop_path_rate": 0.0}, impl=self.impl)
        self.momentum_encoder = Teacher(still, norm_mlp(projector))
        self.after_loading()
        self._first_momentum, self._momentum = momentum, momentum

    @classmethod
    def check(cls, *, encoder: Mapping[str, Any], **given: Any) -> None:
        """Sizes and shares are possible, and the encoder knows where a patch is; see :meth:`Objective.check`."""
        for name in ("hidden_dim", "out_dim", "projector_layers", "predictor_layers"):
            if given[name] < 1:
                raise ValueError(f"{name}={given[name]}: must be at least 1")
        if not given["temperature"] > 0:
            raise ValueError(f"temperature={given['temperature']}: must be > 0, for example 0.2")
        if not 0 <= given["momentum"] <= 1:
            raise ValueError(f"momentum={given['momentum']}: must lie in [0, 1]")
        if not 0 < given["scale"][0] <= given["scale"][1] <= 1:
            raise ValueError(f"scale={list(given['scale'])}: must satisfy 0 < low <= high <= 1")
        settings = encoder_settings(encoder)
        where = ("abs_pos_embed", "rel_pos_bias", "shared_rel_pos_bias")
        if settings["name"] == "vit" and not any(settings[kind] for kind in where):
            raise ValueError(
                "abs_pos_embed=false: the ViT would not know where a patch is; use abs_pos_embed=sincos_moco"
            )

    @classmethod
    def check_pixels(cls, *, pixels: str = "uint8", augment: bool = True, **_: Any) -> None:
        """Float images have no colours to change."""
        no_colours("augment", augment, False, pixels)

    def forward(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a micro-batch; in training with the keys and statistics of all ranks.

        Args:
            images: Two crops (B, C, H, W) of each image in the form of :meth:`views`, float normalised by mean and
                std, or uint8; a (B, C, H, W) tensor alone stands for both.
            mask: Not read.

        Returns:
            ``loss`` float32, and what tells of a collapse: ``accuracy``, the share of queries whose own key is the
            nearest; ``feature_std``, the deviation over images of the encoder's normalised features, times √D: it goes
            to 0 where every image gets the same.
        """
        crops = self.crops(images)
        features = self.encoder.class_tokens(crops).unflatten(0, (VIEWS, -1))
        loss, accuracy = self.contrast(self.predictor(self.head(features)), self.keys(crops))
        return {"loss": loss, "accuracy": accuracy, "feature_std": spread(features)}

    def crops(self, images: Images) -> Tensor:
        """(2B, C, H, W), view after view, normalised."""
        views = images.expand(VIEWS, *images.shape) if isinstance(images, Tensor) else torch.cat(tuple(images))
        expected = (self.in_chans, *self.img_size)
        if views.ndim != 5 or len(views) != VIEWS or tuple(views.shape[2:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"images must be {VIEWS} crops of shape (B, {shape}), got {tuple(views.shape)}")
        return self.normalise(views.flatten(0, 1))

    @torch.no_grad()
    def keys(self, crops: Tensor) -> Tensor:
        """(2B, C, H, W) → (2, B, out_dim)."""
        features: Tensor = self.momentum_encoder.encoder.class_tokens(crops)
        keys: Tensor = self.momentum_encoder.head(features.unflatten(0, (VIEWS, -1)))
        return keys

    def contrast(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """ctr(q₁, k₂) + ctr(q₂, k₁) of (2, B, D), and how many queries find their key (Chen et al. 2021, equation 1).

        ctr is the cross-entropy of q·k/T over all keys, times 2T. Float32: logits of half precision differ by less
        than their last digit. Torch's own cross-entropy: the keys are no more than the batch, (B, ranks·B) logits a
        view, so that an op which keeps fewer passes over them would save nothing that could be measured.
        """
        rank, count = ranks(self.training)
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = (F.normalize(x.float(), dim=-1) for x in (queries, keys))
            own = rank * keys.shape[1] + torch.arange(keys.shape[1], device=keys.device)
            keys = gather(keys.flip(0), count).transpose(0, 1).flatten(1, 2)
            logits = (queries @ keys.mT / self.temperature).flatten(0, 1)
            labels = own.repeat(VIEWS)
            loss = F.cross_entropy(logits, labels) * (VIEWS * 2 * self.temperature)
        return loss, (logits.detach().argmax(-1) == labels).float().mean()

    def views(self) -> tuple[View, ...]:
        """Two crops; the second one is seldom blurred but may be solarised."""
        crop: dict[str, Any] = dict(size=self.img_size, scale=self.scale, interpolation="bilinear")
        if not self.augment:
            return (View(**crop, count=VIEWS),)
        colours = Photometric(blur_p=1.0), Photometric(blur_p=0.1, solarize_p=0.2)
        return tuple(View(**crop, photometric=how) for how in colours)

    def picture(self, images: Tensor, mask: Tensor) -> Picture:
        """See :func:`~fastmim.objectives.pictures.attention`; the encoder's."""
        return attention(self.shown(images), self.encoder.attention(self.normalise(images)))

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """The momentum is that of the next step.

        The reference moves the momentum encoder before it computes the keys of step s, from the weights of step s and
        with the momentum of step s. They are those that the update of step s − 1 has left: so it moves then. Before
        step 0 there is nothing to move, and after the last step it stays, with a momentum of 1.
        """
        curve = Schedule(name="cosine", base_lr=self._first_momentum, min_lr=1.0, total_steps=total)
        self._momentum = curve(step + 1)

    def set_micro_batch(self, index: int, count: int) -> None:
        super().set_micro_batch(index, count)
        self.momentum_encoder.encoder.set_micro_batch(index, count)

    def after_loading(self) -> None:
        """The momentum encoder starts as the encoder."""
        self.momentum_encoder.follow(self.encoder, self.head)

    def ema(self) -> list[tuple[nn.Module, nn.Module]]:
        """The momentum encoder follows encoder and projector; statistics of BatchNorm are its own."""
        return [(self.momentum_encoder.encoder, self.encoder), (self.momentum_encoder.head, self.head)]

    def ema_momentum(self) -> float:
        """See :meth:`set_step`."""
        return self._momentum

    def groups(self, weight_decay: float, policy: str) -> list[dict[str, Any]]:
        """With "parity" every tensor decays, as in the reference."""
        return all_decay(self, weight_decay) if policy == "parity" else super().groups(weight_decay, policy)


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """(V, B, D) → √D · the mean deviation over B of the components of vectors of length 1: near 1 where they spread."""
    directions = F.normalize(features.detach().float(), dim=-1)
    deviation = directions.std(1, correction=0).mean()
    return deviation * directions.shape[-1] ** 0.5
