"""Frozen tokenizers out of a file: images in [0, 1] → codes, and back if the file has a decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..models import AUTOENCODERS, Autoencoder, create_encoder
from .dvae import code_map
from .masks import pixel_mask
from .pictures import GREY, Picture, to_rgb

_DALLE = "blocks.input.w"


class Tokenizer:
    """A trained :class:`~fastmim.models.Autoencoder` in float32, which no optimiser, checkpoint or cast reaches.

    No module: an objective that holds one has neither its parameters nor its buffers.

    Attributes:
        model: The autoencoder, without ``decoder`` where the file has none.
        digest: Of its weights; empty where they are not there (fake tensors).
    """

    def __init__(self, model: Autoencoder, digest: str) -> None:
        self.model, self.digest = model.eval().requires_grad_(False), digest
        self.codes, self.patch_size, self.in_chans = model.codes, model.patch_size, model.in_chans

    @property
    def decodes(self) -> bool:
        """Whether :meth:`pixels` works."""
        return getattr(self.model, "decoder", None) is not None

    def tensors(self) -> list[Tensor]:
        """Its weights."""
        return list(self.model.parameters())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] → (B, H/p, W/p) int64. Float32 also under autocast; the logits are the largest part,
        4·codes bytes a place."""
        with torch.autocast(images.device.type, enabled=False):
            ids: Tensor = self._on(images)(images.float())
        return ids

    def codes_of(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, C, H, W) in [0, 1] of any size → (B, *grid) codes: of the image resized to as many of its patches."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self(images)

    @torch.no_grad()
    def pixels(self, ids: Tensor) -> Tensor:
        """(B, h, w) → (B, C, h·p, w·p) in [0, 1]."""
        with torch.autocast(ids.device.type, enabled=False):
            return self._on(ids).pixels(ids)

    def _on(self, like: Tensor) -> Autoencoder:
        if next(self.model.parameters()).device != like.device:
            self.model.to(like.device)
        return self.model


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a file; no code in it is run.

    Args:
        path: The ``encoder.safetensors`` of a run with ``objective.name=dvae``, or the folder of that run. Or DALL·E's
            encoder as a state dict (.safetensors, or a file of ``torch.save``) under its own names, or both its parts
            under ``encoder.`` and ``decoder.``.

    Raises:
        ValueError: There is none, or it is no tokenizer: ``PATH: what; fix`` in one line.
    """
    path = Path(path).expanduser()
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the encoder.safetensors of a run with objective.name=dvae")
    fake = isinstance(torch.empty(0), FakeTensor)
    shapes, settings = _header(path) if path.suffix == ".safetensors" else ({}, None)
    tensors: dict[str, Tensor] = {}
    if path.suffix != ".safetensors":
        tensors = _of_torch(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if settings is None:
        settings = _dalle_settings(path, shapes)
    model = _built(settings, fake)
    if not any(name.startswith("decoder.") for name in shapes):
        model.decoder = None
    if fake:
        return Tokenizer(model, "")
    with torch.device("cpu"):
        tensors = tensors or _of_safetensors(path)
        bare = _DALLE in tensors
        tensors = {f"encoder.{name}" if bare else name: tensor.float() for name, tensor in tensors.items()}
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return Tokenizer(model, _digest(tensors))


def open_tokenizer(path: str, codes: int | None, in_chans: int) -> Tokenizer:
    """:func:`read_tokenizer` of the file that ``objective.tokenizer`` names.

    Args:
        codes: As many as it must have, if that is asked for.
        in_chans: Channels of the images.

    Raises:
        ValueError: It cannot be read, or is of another size.
    """
    try:
        found = read_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"objective.tokenizer={error}") from None
    if codes not in (None, found.codes):
        raise ValueError(f"objective.codes={codes}: the tokenizer {path} has {found.codes}; leave it out")
    if found.in_chans != in_chans:
        takes = f"takes {found.in_chans} channel{'s' * (found.in_chans != 1)}"
        raise ValueError(f"objective.tokenizer={path}: {takes}, and model.in_chans={in_chans}")
    return found


def code_picture(
    tokenizer: Tokenizer, images: Tensor, mask: Tensor, ids: Tensor, guess: Tensor, hidden: Tensor
) -> Picture:
    """The image, what the encoder sees of it, what its codes give back, and that with the guesses in hidden places.

    Codes are drawn as colours where the tokenizer has no decoder.

    Args:
        images: (B, C, H, W) in [0, 1].
        mask: (B, rows, columns), true = masked.
        ids, guess, hidden: (B, h, w): the codes of the image, those that are predicted, and where these are taken.
    """
    size = (images.shape[2], images.shape[3])
    columns = [to_rgb(images), to_rgb(images).masked_fill(pixel_mask(mask, size), GREY)]
    for one in (ids, torch.where(hidden, guess, ids)):
        drawn = to_rgb(tokenizer.pixels(one)) if tokenizer.decodes else code_map(one, 1)
        columns.append(F.interpolate(drawn, size, mode="nearest"))
    return Picture(("image", "masked", "its codes", "predicted"), [column.float().cpu() for column in columns])


def _built(settings: dict[str, Any], fake: bool) -> Any:
    with torch.device("cpu"):
        if fake:
            return create_encoder(settings)
        with torch.random.fork_rng(devices=()):  # the weights of what is trained are drawn as without a tokenizer
            return create_encoder(settings)


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any] | None]:
    """The shapes of a file's tensors, and the autoencoder that it says it holds."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            settings = json.loads((file.metadata() or {}).get("encoder", "null"))
    except Exception as error:  # safetensors raises its own type for a broken file
        raise ValueError(f"{path}: not a readable weight file ({str(error)[:200]})") from None
    if isinstance(settings, dict) and settings.get("name") not in AUTOENCODERS:
        raise ValueError(f"{path}: holds a {settings.get('name')}, no tokenizer; train one with objective.name=dvae")
    return shapes, settings if isinstance(settings, dict) else None


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def _of_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(content, Mapping)
    except Exception:  # half a dozen types for a broken file
        raise ValueError(
            f"{path}: no state dict of tensors (a pickled module is not unpickled); save its state_dict() with "
            "torch.save or safetensors where its own package is installed"
        ) from None
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _dalle_settings(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes of DALL·E's encoder from its weights.

    Raises:
        ValueError: These are others.
    """
    prefix = "" if _DALLE in shapes else "encoder."
    first, last = shapes.get(f"{prefix}{_DALLE}"), shapes.get(f"{prefix}blocks.output.conv.w")
    if first is None or last is None:
        raise ValueError(
            f"{path}: neither a tokenizer of fastmim's nor DALL·E's encoder ({_DALLE}); "
            f"its first names are {', '.join(list(shapes)[:3])}"
        )
    code = shapes.get("decoder.blocks.input.w", (128,))
    return {"name": "dalle", "in_chans": first[1], "embed_dim": first[0], "codes": last[0], "code_dim": code[0]}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
