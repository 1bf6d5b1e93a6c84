"""The ``config.json`` and ``preprocessor_config.json`` of a folder of transformers, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..models import AUTOENCODERS
from ..models.layers import to_pair
from ..models.rules import patch_grid, policy_matters, stage_maps, window_sizes
from .settings import mlp_ratio

_SWIN_EPS, _VIT_EPS = 1e-5, 1e-6
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
# Of transformers, for what an older file leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "swin": dict(image_size=224, patch_size=4, num_channels=3, embed_dim=96, depths=[2, 2, 6, 2],
                 num_heads=[3, 6, 12, 24], window_size=7, mlp_ratio=4.0, qkv_bias=True, layer_norm_eps=1e-5),
    "vit": dict(image_size=224, patch_size=16, num_channels=3, hidden_size=768, num_hidden_layers=12,
                num_attention_heads=12, intermediate_size=3072, qkv_bias=True, layer_norm_eps=1e-12),
}  # fmt: skip
_DEFAULTS["swinv2"] = _DEFAULTS["swin"] | {"pretrained_window_sizes": 0}
_DEFAULTS["vit_mae"] = _DEFAULTS["vit"]
_DEFAULTS["beit"] = _DEFAULTS["vit"] | dict(
    layer_scale_init_value=0.1, use_relative_position_bias=False, use_shared_relative_position_bias=False,
    use_absolute_position_embeddings=False,
)  # fmt: skip
_MODELS = {"swin": "SwinModel", "swinv2": "Swinv2Model", "vit": "ViTModel", "beit": "BeitModel"}


def why_not_huggingface(settings: Mapping[str, Any]) -> str | None:
    """Why transformers has no model of its own for an encoder of these settings; None where it has one."""
    if settings["name"] in AUTOENCODERS:
        return "transformers has no such autoencoder"
    return _why_not_vit(settings) if settings["name"] == "vit" else _why_not_swin(settings)


def _why_not_vit(settings: Mapping[str, Any]) -> str | None:
    tables = settings["rel_pos_bias"] or settings["shared_rel_pos_bias"]
    if _is_plain(settings):
        if tables or settings["init_values"] or not settings["abs_pos_embed"]:
            return "transformers' ViTModel has absolute positions alone, and no LayerScale"
        return None
    rows, columns = to_pair(settings["img_size"], "img_size")
    if rows != columns:
        return "transformers' BeitModel has positions of squares alone"
    return None


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether it is a ViTModel: all of query, key and value have a bias, or none. BeitModel's keys have none."""
    return bool(settings["key_bias"]) or not settings["qkv_bias"]


def _why_not_swin(settings: Mapping[str, Any]) -> str | None:
    if settings["extra_norm_period"]:
        return "transformers has no norms after every n-th block (model.extra_norm_period)"
    if settings["norm_eps"] != _SWIN_EPS:
        return f"transformers' Swin has norms with an epsilon of {_SWIN_EPS:g} alone (model.norm_eps)"
    if 1 in _pretrained(settings):
        return "transformers divides by 0 for a model.pretrained_window_size of 1"
    pairs = zip(_our_windows(settings), _their_windows(settings, _window(settings)), strict=True)
    for stage, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            return f"transformers computes other windows in stage {stage + 1} of an image of {settings['img_size']} px"
    return None


def _window(settings: Mapping[str, Any]) -> int:
    return max(max(window) for window in window_sizes(settings))


def _our_windows(settings: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """(rows, columns) of each stage's window, then of the shift of every second block: those of :mod:`.models.swin`."""
    stages = zip(stage_maps(settings), window_sizes(settings), settings["depths"], strict=True)
    return [
        (*window, *(0 if edge <= w or depth == 1 else w // 2 for edge, w in zip(edges, window, strict=True)))
        for edges, window, depth in stages
    ]


def _their_windows(settings: Mapping[str, Any], window: int) -> list[tuple[int, ...]]:
    """The same of transformers, whose windows are squares.

    SwinModel has tables of one window; it shrinks the window, without its table, to a smaller map. Swinv2Model shrinks
    it to the rows of a map of which half a token is cut, where ours are padded.
    """
    found: list[tuple[int, ...]] = []
    grid = patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"])
    for stage, (edges, depth) in enumerate(zip(stage_maps(settings), settings["depths"], strict=True)):
        if settings["name"] == "swin":
            edge, free = window, min(edges) > window
        else:
            rows = grid[0] // 2**stage
            edge, free = min(rows, window), rows > min(rows, window)
        shift = window // 2 if free and depth > 1 else 0
        found.append((edge, edge, shift, shift))
    return found


def _pretrained(settings: Mapping[str, Any]) -> list[int]:
    given = settings.get("pretrained_window_size", 0)
    return [given] * len(settings["depths"]) if isinstance(given, int) else list(given)


def huggingface_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        settings: Of :func:`fastmim.models.encoder_settings`.

    Raises:
        ValueError: transformers has no such model.
    """
    if reason := why_not_huggingface(settings):
        raise ValueError(reason)
    image, vit = to_pair(settings["img_size"], "img_size"), settings["name"] == "vit"
    kind = settings["name"] if not vit or _is_plain(settings) else "beit"
    shared = {
        "architectures": [_MODELS[kind]],
        "model_type": kind,
        "image_size": image[0] if image[0] == image[1] else list(image),
        "patch_size": settings["patch_size"],
        "num_channels": settings["in_chans"],
        "qkv_bias": settings["qkv_bias"],
        "hidden_act": "gelu",
    }
    return shared | (_vit_config(settings, kind) if vit else _swin_config(settings, kind))


def _vit_config(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    width = settings["embed_dim"]
    config = {
        "hidden_size": width,
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["num_heads"],
        "intermediate_size": int(width * settings["mlp_ratio"]),
        "layer_norm_eps": _VIT_EPS,
    }
    if kind == "beit":
        config |= {
            "layer_scale_init_value": float(settings["init_values"] or 0),
            "use_relative_position_bias": settings["rel_pos_bias"],
            "use_shared_relative_position_bias": settings["shared_rel_pos_bias"],
            "use_absolute_position_embeddings": bool(settings["abs_pos_embed"]),
            "use_mean_pooling": False,  # else the model has no norm before the pooling
        }
    return config


def _swin_config(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {key: list(settings[key]) for key in ("depths", "num_heads")}
    config |= {"embed_dim": settings["embed_dim"], "mlp_ratio": float(settings["mlp_ratio"])}
    config |= {"window_size": _window(settings), "layer_norm_eps": settings["norm_eps"]}
    return config | ({"pretrained_window_sizes": _pretrained(settings)} if kind == "swinv2" else {})


def notes_on(settings: Mapping[str, Any]) -> list[str]:
    """What transformers computes otherwise, with the same weights."""
    if settings.get("policy") == "parity" and policy_matters(settings):
        return ["trained with maps shifted before they are padded (model.policy=parity); transformers pads first"]
    return []


def preprocessor_config(
    settings: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    pixels: str = "uint8",
) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``: resizing to the image, and its statistics.

    Those of ``pixels="float32"`` are of samples as they are stored, which are not divided by 255.
    """
    height, width = to_pair(settings["img_size"], "img_size")
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _RESAMPLE[interpolation],
        "do_rescale": pixels == "uint8",
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def statistics_of(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """``mean``, ``std`` and ``interpolation`` of a ``preprocessor_config.json``, those that it says."""
    names = {number: name for name, number in _RESAMPLE.items()}
    found = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std"),
             "interpolation": names.get(preprocessor.get("resample", -1))}  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def settings_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of :func:`fastmim.models.create_encoder` that a ``config.json`` says, and what differs here.

    Raises:
        ValueError: No encoder of ours is such a model.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"config.json: model_type={kind!r}: known are {', '.join(_DEFAULTS)}")
    said = _DEFAULTS[kind] | {key: value for key, value in config.items() if value is not None}
    if said.get("hidden_act", "gelu") != "gelu" or said.get("use_absolute_embeddings"):
        raise ValueError("config.json: another activation than gelu, or a Swin with absolute positions, is not known")
    settings = {"name": "vit", "img_size": said["image_size"], "patch_size": said["patch_size"],
                "in_chans": said["num_channels"], "qkv_bias": said["qkv_bias"]}  # fmt: skip
    eps = _SWIN_EPS if kind.startswith("swin") else _VIT_EPS
    notes = [] if math.isclose(said["layer_norm_eps"], eps) else [
        f"its norms have an epsilon of {said['layer_norm_eps']:g}, here it is {eps:g}: features differ a little"
    ]  # fmt: skip
    if kind.startswith("swin"):
        settings |= {key: said[key] for key in ("embed_dim", "window_size", "mlp_ratio")}
        settings |= {"name": kind, **{key: tuple(said[key]) for key in ("depths", "num_heads")}}
        if kind == "swinv2":
            settings["pretrained_window_size"] = _one_or_each(said["pretrained_window_sizes"])
        return settings, notes
    settings |= {
        "embed_dim": said["hidden_size"],
        "depth": said["num_hidden_layers"],
        "num_heads": said["num_attention_heads"],
        "mlp_ratio": mlp_ratio(said["intermediate_size"], said["hidden_size"]),
        "key_bias": kind != "beit" and said["qkv_bias"],
        "abs_pos_embed": {"vit": True, "vit_mae": "sincos"}.get(kind, said.get("use_absolute_position_embeddings")),
    }
    if kind == "beit":
        settings |= {"init_values": said["layer_scale_init_value"] or None,
                     "rel_pos_bias": said["use_relative_position_bias"],
                     "shared_rel_pos_bias": said["use_shared_relative_position_bias"]}  # fmt: skip
    return settings, notes


def _one_or_each(sizes: Any) -> int | tuple[int, ...]:
    each = [sizes] if isinstance(sizes, int) else list(sizes)
    return each[0] if len(set(each)) == 1 else tuple(each)
