"""Fine-tuning: an encoder learns the classes of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import encoder_settings
from .arguments import at_least, no_colours, one_of
from .base import Objective
from .classifier import Average, Classifier, warm_momentum
from .groups import split_for_tuning
from .layer_decay import depths_of, scaled_groups
from .mixing import Erasing, Mixing, erase, mix, smooth
from .views import Images, View

Pool = Literal["auto", "mean", "cls"]


class Recipe(NamedTuple):
    """What published fine-tunings do in different ways."""

    pool: str
    """Of a ViT: the mean of patches, normed after it, or the class token."""
    spare_tables: bool
    """A Swin's tables of position biases do not decay."""
    scale_peak_only: bool
    """A layer's scale multiplies the schedule's peak, not its ends."""


RECIPES = {
    "default": Recipe("mean", True, False),
    "simmim": Recipe("mean", True, True),
    "beit": Recipe("mean", False, False),
    "mae": Recipe("mean", False, False),
    "ibot": Recipe("cls", False, False),
}
"""microsoft/SimMIM and Swin-Transformer, microsoft/unilm's BEiT, facebookresearch/mae, bytedance/ibot."""


class Classify(Objective, Classifier):
    """Encoder, pooled tokens and a linear classifier, trained with the labels of images.

    Args:
        num_classes: classes; 0 = those that data.path has
        pool: tokens that the classifier reads: their mean, or the class token; auto = as the recipe's
        recipe: whose rules decide what is not said: simmim, beit, mae, ibot; default = rates scaled as a whole
        layer_decay: factor of the learning rate from one layer to the one below, 1 = none
        smoothing: of the labels
        mixup: alpha of mixup, 0 = none
        cutmix: alpha of cutmix, 0 = none
        mix_probability: share of the batches that are mixed
        cutmix_share: share of these that cutmix gets
        erasing: share of the images in which a box is erased
        auto_augment: timm's policy for the colours and shapes of crops, none = none
        multi_label: an image may have several classes, or none: a sigmoid for each
        ema_decay: share of the weights' moving average that stays in an update, such as 0.9999, in the first ones less;
            0: there is none
        common: of every :class:`Objective`
    """

    labels: Tensor
    held_out_labels: Tensor
    noise: Tensor
    takes_labels = True

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        num_classes: int = 0,
        pool: Pool = "auto",
        recipe: Literal["default", "simmim", "beit", "mae", "ibot"] = "default",
        layer_decay: float = 1.0,
        smoothing: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_probability: float = 1.0,
        cutmix_share: float = 0.5,
        erasing: float = 0.25,
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        multi_label: bool = False,
        ema_decay: float = 0.0,
        **common: Any,
    ) -> None:
        given = dict(num_classes=num_classes, pool=pool, recipe=recipe, layer_decay=layer_decay, ema_decay=ema_decay)
        mixing = dict(smoothing=smoothing, mixup=mixup, cutmix=cutmix, erasing=erasing)
        self.check(encoder=encoder, **given, **mixing, mix_probability=mix_probability, cutmix_share=cutmix_share)
        self.check_pixels(**common, auto_augment=auto_augment)
        super().__init__(encoder=encoder, **common)
        self.num_classes, self.layer_decay, self.multi_label = max(num_classes, 1), layer_decay, multi_label
        self.recipe, self.is_vit = RECIPES[recipe], self.encoder.settings["name"] == "vit"
        self.mixing = Mixing(mixup, cutmix, mix_probability, cutmix_share, smoothing)
        self.erasing, self.auto_augment = Erasing(erasing), None if auto_augment == "none" else auto_augment
        self.add_head(self.num_classes, "mean" if not self.is_vit else self.recipe.pool if pool == "auto" else pool)
        self.ema_decay, self._updates = ema_decay, 0
        self.average = Average(self, encoder, self.impl) if ema_decay else None
        shape, drawn = (self.in_chans, *(2 * e for e in self.img_size)), torch.Generator("cpu").manual_seed(0)
        self.register_buffer("noise", torch.randn(shape, generator=drawn, device="cpu"), persistent=False)
        for name in ("labels", "held_out_labels"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64, device="cpu"), persistent=False)

    def give_labels(self, labels: Tensor, held_out: Tensor | None = None) -> None:
        """Classes of the files trained on, by their number, and of those held out.

        (files,) int64, or of several classes an image (files, num_classes), 1 for each.
        """
        self.labels = labels.to(self.labels.device)
        if held_out is not None:
            self.held_out_labels = held_out.to(self.labels.device)

    @classmethod
    def check(cls, *, encoder: Mapping[str, Any], **given: Any) -> None:
        """Numbers are possible, and the pool exists; see :meth:`.Objective.check`."""
        at_least("num_classes", given["num_classes"], 0)
        one_of("recipe", given["recipe"], RECIPES)
        if not 0 < given["layer_decay"] <= 1:
            raise ValueError(f"layer_decay={given['layer_decay']}: must lie in (0, 1]; 1 = one rate for all layers")
        if given["pool"] == "cls" and encoder_settings(encoder)["name"] != "vit":
            raise ValueError("pool=cls: only a vit has a class token; use mean")
        if not 0 <= given["ema_decay"] < 1:
            raise ValueError(f"ema_decay={given['ema_decay']}: must lie in [0, 1), such as 0.9999; 0 = no average")
        Mixing(given["mixup"], given["cutmix"], given["mix_probability"], given["cutmix_share"], given["smoothing"])
        Erasing(given["erasing"])

    @classmethod
    def check_pixels(cls, *, pixels: str = "uint8", auto_augment: str = "none", **_: Any) -> None:
        """Float images have no colours to change."""
        no_colours("auto_augment", auto_augment, "none", pixels)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            images: (B, C, H, W), float normalised by mean and std, or uint8.
            mask: The labels: (B,) integer, or (B, num_classes) shares of each; of several classes an image 1 for each.

        Returns:
            ``loss`` float32: cross-entropy, or of several classes an image the mean binary one; and without these
            ``top1``, the share of images of which the largest logit is of the largest share.
        """
        logits, targets = self.logits(images), smooth(mask, self.num_classes, 0.0)
        if self.multi_label:
            return {"loss": F.binary_cross_entropy_with_logits(logits, targets)}
        right = logits.detach().argmax(1) == targets.argmax(1)
        return {"loss": F.cross_entropy(logits, targets), "top1": right.float().mean()}

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or normalised → (B, num_classes) float32."""
        return self.classify(self.normalise(images))

    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Logits of normalised images: of these weights under "", and of their average under "ema_", if there is one.

        Scores of a validation begin with that name.
        """
        found: dict[str, Callable[[Tensor], Tensor]] = {"": self.classify}
        return found if self.average is None else found | {"ema_": self.average.classify}

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """The average is of ``step`` updates."""
        self._updates = step

    def ema(self) -> list[tuple[nn.Module, nn.Module]]:
        """The average follows encoder and classifier."""
        return [] if self.average is None else [(self.average, self)]

    def ema_momentum(self) -> float:
        """``ema_decay``, in the first updates less."""
        return warm_momentum(self.ema_decay, self._updates)

    def after_loading(self) -> None:
        """The average starts as what was loaded."""
        if self.average is not None:
            self.average.follow(self)

    def inputs(
        self, images: Images, sample_ids: Tensor, files: Tensor, *, seed: int, epoch: int
    ) -> tuple[Images, Tensor]:
        """Images, in training erased and mixed, and their targets; see :meth:`.Objective.inputs`."""
        labels = self.labels[files]
        if not self.training or not isinstance(images, Tensor):
            return images, labels
        keys: dict[str, Any] = dict(seed=seed, epoch=epoch)
        images = erase(self.normalise(images), sample_ids, self.noise, self.erasing, **keys)
        targets = smooth(labels, self.num_classes, self.mixing.smoothing)
        return mix(images, targets, sample_ids, self.mixing, **keys)

    def views(self) -> tuple[View, ...]:
        """One crop, changed by timm's policy; held-out images are scaled to cover 256/224 of it."""
        return (View(self.img_size, auto_augment=self.auto_augment, margin=256 / 224),)

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B,) labels, any: there are no files to look them up by. For traces and benchmarks."""
        return sample_ids.long() % self.num_classes

    def groups(self, weight_decay: float, policy: str) -> list[dict[str, Any]]:
        """Split by layer; with "parity" tables of position biases decay where the recipe's do."""
        if policy == "parity":
            groups = split_for_tuning(self, weight_decay, self.recipe.spare_tables and not self.is_vit)
        else:
            groups = super().groups(weight_decay, policy)
        groups = scaled_groups(groups, self.layer_decay, depths_of(self.encoder.settings))
        return [group | {"scale_peak_only": self.recipe.scale_peak_only} for group in groups]
