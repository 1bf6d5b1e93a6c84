"""What every objective is, and all that the rest of the house asks of one.

An objective is one file here (or anywhere, named ``package.module:Class``) and one YAML. Everything outside talks to
the methods below; nothing reads an attribute that only one objective has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..models import create_encoder, encoder_settings
from .arguments import one_of, per_channel
from .gaps import filled
from .groups import split_parameters
from .pictures import Picture, check_bands, stretched, to_rgb
from .views import Images, View, augmented

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Pixels = Literal["uint8", "float32"]
"""What loaders give, as ``data.pixels`` says."""


class Objective(nn.Module):
    """Base of every objective: it owns its encoder, its heads and its loss.

    The constructor's keyword arguments are the config section ``objective``: their annotations are the types, their
    lines under ``Args:`` of the class's docstring the descriptions. What it cannot use goes on as ``**common``.
    A subclass defines :meth:`forward`, and overrides of the rest what it does differently.

    Args:
        encoder: Keyword arguments of :func:`fastmim.models.create_encoder`.
        impl: Implementation of the ops: "auto", "triton", "torch" or "reference".
        mean, std: Channel statistics in [0, 1] units, for uint8 images and pictures; default ImageNet's for
            three channels, 0.5 otherwise. With ``pixels="float32"`` in the images' own unit.
        pixels: "uint8", or "float32" for images that come normalised and have no range: no [0, 1], no colours.
        has_gaps: float images may hold NaN, no data in a band of a pixel. False: nobody looks for it.
        bands: Channels that pictures show, one or three numbers from 1 on, see :func:`.pictures.to_rgb`.

    Raises:
        ValueError: A value is out of range or does not fit the encoder, ``argument=value: what; fix`` in one line.
    """

    #: Families of encoders that it can train.
    families: ClassVar[tuple[str, ...]] = ("swin", "swinv2", "vit")

    #: What in its loss is of the micro-batch over all ranks, whatever the global batch; empty: nothing.
    of_micro_batch: ClassVar[str] = ""

    mean: Tensor
    std: Tensor
    takes_labels = False
    """Whether it learns classes; it then has ``give_labels`` and ``classifiers``, see :class:`.classify.Classify`."""

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        impl: str = "auto",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        pixels: Pixels = "uint8",
        has_gaps: bool = False,
        bands: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.check_family(encoder)
        one_of("pixels", pixels, get_args(Pixels))
        self.encoder = create_encoder(dict(encoder), impl=impl)
        self.impl = impl
        self.img_size, self.in_chans = self.encoder.img_size, self.encoder.in_chans
        check_bands(bands, self.in_chans)
        self.pixels, self.has_gaps, self.bands = pixels, has_gaps, bands
        for name, values, usual in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
            self.register_buffer(name, per_channel(name, values, usual, self.in_chans, pixels), persistent=False)

    @classmethod
    def check(cls, *_: Any, **arguments: Any) -> None:
        """Refuse arguments of the constructor that do not fit each other or the encoder; nothing is built.

        The one home of such rules: the constructor calls it, and so does the config, with ``encoder`` and every
        argument of its own by name.

        Raises:
            ValueError: ``argument=value: what; fix`` in one line.
        """

    @classmethod
    def check_pixels(cls, *, pixels: str = "uint8", has_gaps: bool = False, **arguments: Any) -> None:
        """Refuse images that it cannot learn from, as :meth:`check`, of arguments of its own and of its base.

        Float images have neither a range nor colours; ``has_gaps``: samples may be missing in them.

        Raises:
            ValueError: ``argument=value: what; fix`` in one line.
        """

    @classmethod
    def check_family(cls, encoder: Mapping[str, Any]) -> None:
        """Refuse an encoder of another family than it can train.

        Raises:
            ValueError: Names those that it can.
        """
        name = encoder_settings(encoder)["name"]
        if name not in cls.families:
            known = ", ".join(cls.families)
            raise ValueError(f"encoder={name}: {cls.__name__} trains {known}; set model.name to one of them")

    def forward(self, images: Any, mask: Tensor) -> dict[str, Tensor]:
        """Loss of a micro-batch: traceable, no data-dependent shape, no collective but :func:`.across_ranks.gather`.

        Args:
            images: :data:`Images`, as :meth:`views` asked for them.
            mask: Of :meth:`random_mask`.

        Returns:
            ``"loss"``, a float32 scalar. Every other entry is a detached scalar that the engine averages over
            micro-batches, ranks and steps as it does the loss, and writes under its name into the metrics.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def exported(self) -> Any:
        """The encoder that a run leaves behind and that probes look at: a teacher's, where that is what is wanted."""
        return self.encoder

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens that the encoder makes of an image of ``img_size``."""
        stride = self.encoder.stride
        return -(-self.img_size[0] // stride), -(-self.img_size[1] // stride)

    def views(self) -> tuple[View, ...]:
        """The crops of every image that :meth:`forward` takes."""
        return (View(self.img_size),)

    def inputs(
        self, images: Images, sample_ids: Tensor, files: Tensor, *, seed: int, epoch: int
    ) -> tuple[Images, Tensor]:
        """What :meth:`forward` takes of a loader's micro-batch: crops with their colours changed, and masks.

        Args:
            images: As the loader gives them, on the device.
            sample_ids: (B,) integer, the keys of what is drawn.
            files: (B,) integer, which file each image is of; not those of ids whose files are bad.
            seed, epoch: Further keys.
        """
        images = self.prepare(images, sample_ids, seed=seed, epoch=epoch)
        return images, self.random_mask(sample_ids, seed=seed, epoch=epoch)

    def random_mask(self, sample_ids: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, H/p, W/p) bool, true = masked, a function of (seed, epoch, sample id) alone; here nothing is hidden."""
        return torch.zeros(len(sample_ids), *self.encoder.grid, dtype=torch.bool, device=sample_ids.device)

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        """Before update ``step`` of ``total``, from 0: put what follows a schedule into 0-d buffers."""

    def set_micro_batch(self, index: int, count: int) -> None:
        """Before micro-batch ``index`` of ``count``: the weights are those of the one before, unless it is the first.

        Optional: it saves the encoder from casting its weights for each of them.
        """
        self.encoder.set_micro_batch(index, count)

    def after_step(self) -> None:
        """After each update that was applied, on every rank: reduce what forward has summed up, and use it."""

    def skip_step(self) -> None:
        """After each update that was not applied (fp16 overflowed), on every rank: forget what forward summed up."""

    def after_loading(self) -> None:
        """After the encoder was given weights from elsewhere, before training."""

    def ema(self) -> list[tuple[nn.Module, nn.Module]]:
        """(teacher, student) pairs: the engine keeps each teacher at the moving average of its student."""
        return []

    def ema_momentum(self) -> float:
        """Share of the teachers that stays in the coming update."""
        return 1.0

    def freezable(self) -> Iterable[nn.Parameter]:
        """All that :meth:`frozen` may ever name; it gets optimiser groups of its own, frozen or not as a whole."""
        return ()

    def frozen(self) -> Iterable[nn.Parameter]:
        """What the coming update leaves as it is: without gradient, so that moments and decay do not touch it."""
        return ()

    def groups(self, weight_decay: float, policy: str) -> list[dict[str, Any]]:
        """Optimiser groups of the trainable parameters, see :func:`~fastmim.objectives.groups.split_parameters`."""
        return split_parameters(self, weight_decay, policy)

    def prepare(self, images: Images, sample_ids: Tensor, *, seed: int, epoch: int) -> Images:
        """A loader's micro-batch as :meth:`forward` takes it in training, see :func:`.views.augmented`.

        Outside of autograd, of compilation and of a captured step: the place for what depends on which samples these
        are.
        """
        return augmented(images, self.views(), sample_ids, seed=seed, epoch=epoch)

    def identity(self) -> dict[str, Any]:
        """What a run of it depends on beside the config and the images, as JSON values by config key.

        A checkpoint is refused where they differ.

        Raises:
            ValueError: Training cannot begin for want of it.
        """
        return {}

    def frozen_tensors(self) -> Iterable[Tensor]:
        """Weights that every rank holds whole and nothing trains, beside parameters and buffers."""
        return ()

    def picture(self, images: Tensor, mask: Tensor) -> Picture | None:
        """What the objective sees and predicts in (B, C, H, W) images, or None if it has nothing to show."""
        return None

    def untrained(self) -> str | None:
        """What a picture would draw with that no update has touched and no file has filled; None: nothing."""
        return None

    def shares(self) -> dict[str, float]:
        """Share of its rows that an op ("mask_tokens") reads with this objective's masks; all, if it is not named."""
        return {}

    def unit_masks(self) -> Any:
        """The :class:`.unit_masks.UnitMasks` that draw its masks; None where these are of patches or tokens."""
        return None

    def example(self, batch: int) -> tuple[Images, Tensor]:
        """Images as a loader gives them, of ``batch`` samples, and their mask, on this module's device.

        For traces, profiles and benchmarks. The same at every call; no generator of the process is touched.
        """
        device = self.mean.device
        generator = torch.Generator(device).manual_seed(0)

        def crops(*shape: int) -> Tensor:
            if self.pixels == "float32":
                return torch.randn(shape, device=device, generator=generator)
            return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

        mask = self.random_mask(torch.arange(batch, device=device))
        views = self.views()
        if len(views) == views[0].count == 1:
            return crops(batch, self.in_chans, *views[0].size), mask
        return tuple(crops(view.count, batch, self.in_chans, *view.size) for view in views), mask

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 → float32 normalised by mean and std; float images pass unchanged, but for gaps, which become 0."""
        if images.dtype != torch.uint8:
            return filled(images) if self.has_gaps else images
        return images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)

    def true_pixels(self, images: Tensor) -> Tensor:
        """What a prediction is compared with: :meth:`normalise` without filling gaps, which stay NaN."""
        return images if images.is_floating_point() else self.normalise(images)

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images → [0, 1]."""
        return (images * self.std + self.mean).clamp(0, 1)

    def zero_to_one(self, images: Tensor) -> Tensor:
        """uint8, or float normalised by mean and std → float32 in [0, 1]."""
        return images.float() / 255 if images.dtype == torch.uint8 else images * self.std + self.mean

    def shown(self, images: Tensor, guess: Tensor | None = None) -> Tensor:
        """(B, C, H, W) uint8 or normalised → (B, 3, H, W) in [0, 1], as pictures show them.

        By :func:`.to_rgb`, with ``pixels="float32"`` by :func:`.stretched`.

        Args:
            guess: (B, C, H, W) normalised: show it as the images are, without data where they have none.
        """
        truth = self.true_pixels(images)
        one = truth if guess is None else guess.float().masked_fill(truth.isnan(), torch.nan)
        if self.pixels == "float32":
            return stretched(one, self.bands, truth)
        return to_rgb(self.denormalise(one), self.bands)

    def check_inputs(self, images: Tensor, mask: Tensor) -> None:
        """Refuse images or masks of another shape than the encoder was built for.

        Raises:
            ValueError: Names both shapes.
        """
        expected = (self.in_chans, *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"images must have shape (B, {shape}), got {tuple(images.shape)}")
        if tuple(mask.shape) != (images.shape[0], *self.encoder.grid):
            raise ValueError(f"mask must have shape {(images.shape[0], *self.encoder.grid)}, got {tuple(mask.shape)}")
