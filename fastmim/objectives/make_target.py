"""The target that the keys of a config ask for, and the rules between them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from .arguments import one_of
from .class_targets import Bins, Clusters, Codes
from .clusters import read_clusters
from .losses import PIXEL_LOSSES
from .targets import Pixels, Target, check_norm, check_target_stride
from .tokenizer import open_tokenizer

TargetName = Literal["pixels", "bins", "clusters", "tokens"]
MOST_BINS = 256

_OWN: dict[str, dict[str, Any]] = {
    "pixels": dict(norm_target=0, norm_patch=False, loss="l1", beta=1),
    "bins": dict(bins=8),
    "clusters": dict(clusters=None),
    "tokens": dict(tokenizer=None),
}
"""Keys that say something of one target alone, and what they are where nothing is said."""


def make_target(
    *,
    target: str,
    target_stride: int | None,
    norm_target: int,
    norm_patch: bool,
    loss: str,
    beta: float,
    bins: int,
    clusters: str | None,
    tokenizer: str | None,
    encoder_stride: int,
    mean: Tensor,
    std: Tensor,
    has_gaps: bool,
    impl: str,
) -> Target:
    """A target by its name.

    Args:
        target to tokenizer: Of :class:`.simmim.SimMIM`.
        encoder_stride: Pixels per edge of the encoder's tokens.
        mean, std: (C, 1, 1) statistics of the images.
        has_gaps: NaN in the images is no data.
        impl: Implementation of the ops.

    Raises:
        ValueError: A file is not there, or does not fit the images.
    """
    stride, in_chans = _stride(target, target_stride, encoder_stride), len(mean)
    if target == "bins":
        return Bins(bins, stride, mean, std, impl=impl)
    if clusters is not None:
        try:
            colours = read_clusters(clusters, in_chans)
        except ValueError as error:
            raise ValueError(f"objective.clusters={error}") from None
        return Clusters(colours, stride, mean, std, impl=impl)
    if tokenizer is not None:
        return Codes(open_tokenizer(tokenizer, None, in_chans), stride, mean, std, impl=impl)
    patch = encoder_stride if norm_patch else 0
    return Pixels(in_chans, stride, norm_target, patch, loss, beta, has_gaps=has_gaps, impl=impl)


def check_target(
    size: tuple[int, int],
    encoder_stride: int,
    *,
    target: str,
    target_stride: int | None,
    norm_target: int,
    norm_patch: bool,
    loss: str,
    beta: float,
    bins: int,
    clusters: str | None,
    tokenizer: str | None,
    **_: Any,
) -> int:
    """Refuse arguments of :func:`make_target` that do not fit each other or images of ``size`` (H, W).

    Returns:
        The edge of a predicted pixel.

    Raises:
        ValueError: ``argument=value: what; fix`` in one line.
    """
    one_of("target", target, get_args(TargetName))
    one_of("loss", loss, PIXEL_LOSSES)
    given: dict[str, Any] = dict(norm_target=norm_target, norm_patch=norm_patch, loss=loss, beta=beta)
    given |= dict(bins=bins, clusters=clusters, tokenizer=tokenizer)
    for owner, keys in _OWN.items():
        said = [key for key, default in keys.items() if given[key] != default]
        if said and owner != target:
            value = str(given[said[0]]).lower() if given[said[0]] is True else given[said[0]]
            raise ValueError(f"{said[0]}={value}: target={target} has none; leave it out, or use target={owner}")
    stride = _stride(target, target_stride, encoder_stride)
    check_target_stride(stride, encoder_stride, size)
    check_norm(norm_target, norm_patch, size, encoder_stride)
    if not 2 <= bins <= MOST_BINS:
        raise ValueError(f"bins={bins}: must lie in 2 … {MOST_BINS}, for example 8")
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0, for example 1")
    if beta != 1 and loss != "smooth_l1":
        raise ValueError(f"beta={beta}: loss={loss} has none; use loss=smooth_l1, or leave it out")
    if target == "clusters" and clusters is None:
        raise ValueError("clusters=null: give a file that `fastmim data clusters IMAGES --out FILE` has made")
    if target == "tokens" and tokenizer is None:
        raise ValueError("tokenizer=null: give the encoder.safetensors of a run with objective.name=dvae")
    return stride


def _stride(target: str, given: int | None, encoder_stride: int) -> int:
    """Edge of a predicted pixel: what is given, else one pixel, and of a code 16 as in BEiT."""
    if given is not None:
        return given
    if target != "tokens":
        return 1
    return 16 if encoder_stride % 16 == 0 else encoder_stride
