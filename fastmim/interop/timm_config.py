"""The ``config.json`` beside an exported encoder, by which timm and transformers build the model that the weights fit.

timm reads it for ``create_model("local-dir:FOLDER", pretrained=True)`` and for models of the Hugging Face hub
(``timm.models._hub.load_model_config_from_path``), transformers for its ``TimmWrapperModel``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models import AUTOENCODERS, SIZES, encoder_settings
from ..models.layers import to_pair
from ..models.rules import patch_grid, policy_matters, window_sizes

_SWIN_EPS = 1e-5
WEIGHTS_FILE = "model.safetensors"
"""The name under which timm and transformers look for weights first."""

# A name of timm's for each family and size; every number is given in model_args, whatever the name would mean.
_NAMES = {
    "swin": ("swin_{}_patch4_window7_224", ("tiny", "small", "base", "large")),
    "swinv2_window8": ("swinv2_{}_window8_256", ("tiny", "small")),
    "swinv2_window12": ("swinv2_{}_window12_192", ("base", "large")),
    "vit": ("beit_{}_patch16_224", ("base", "large")),
    "plain": ("vit_{}_patch16_224", ("tiny", "small", "base", "large")),
}


def why_not_timm(encoder: Mapping[str, Any]) -> str | None:
    """Why timm has no model for these arguments of :func:`~fastmim.models.create_encoder`; None where it has one."""
    settings = encoder_settings(encoder)
    if settings["name"] in AUTOENCODERS:
        return "timm has no discrete autoencoders"
    if settings.get("extra_norm_period"):
        return "timm's SwinV2 has no norms after every n-th block (model.extra_norm_period, which SwinV2-H and -G have)"
    if settings.get("norm_eps", _SWIN_EPS) != _SWIN_EPS:
        return f"a config.json cannot say that norms have another epsilon (model.norm_eps) than timm's {_SWIN_EPS:g}"
    if settings.get("key_bias"):
        absolute = settings["abs_pos_embed"] and not (settings["shared_rel_pos_bias"] or settings["rel_pos_bias"])
        if not absolute or settings["init_values"]:
            return "timm's ViT with a bias on keys has absolute positions alone, and LayerScale under other names"
    for rows, columns in _tables(settings):
        offsets = (2 * rows - 1) * (2 * columns - 1)
        if rows != columns and math.isqrt(offsets) ** 2 == offsets:
            side = (math.isqrt(offsets) + 1) // 2
            return f"timm would take position biases of {rows} x {columns} tokens for those of {side} x {side}"
    return None


def _tables(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rows, columns) of tokens over whose offsets a table of biases reaches; timm tells by its length alone."""
    if settings["name"] == "swin":
        return window_sizes(settings)
    if settings["name"] == "vit" and (settings["shared_rel_pos_bias"] or settings["rel_pos_bias"]):
        return [patch_grid(to_pair(settings["img_size"], "img_size"), settings["patch_size"])]
    return []


def timm_config(
    encoder: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    pixels: str = "uint8",
    weights: str = WEIGHTS_FILE,
) -> dict[str, Any]:
    """The content of ``config.json``: a headless model of timm's, and how its images are prepared.

    Args:
        encoder: What was trained, in arguments of :func:`~fastmim.models.create_encoder`.
        mean, std: Per channel or one for all, of values in [0, 1], or of float samples as they are stored.
        interpolation: Of the crops.
        pixels: "uint8" or "float32".
        weights: Name of the weight file beside; timm takes any if there is one alone.

    Raises:
        ValueError: timm has no such model.
    """
    if reason := why_not_timm(encoder):
        raise ValueError(reason)
    settings = encoder_settings(encoder)
    vit, plain = settings["name"] == "vit", bool(settings.get("key_bias"))
    channels, size = settings["in_chans"], to_pair(settings["img_size"], "img_size")
    pool = {"global_pool": "token" if plain else "avg"}  # pretrained with its class token
    cfg: dict[str, Any] = {
        "input_size": [channels, *size], "fixed_input_size": True, "interpolation": interpolation, "crop_pct": 0.9,
        "crop_mode": "center", "mean": _per_channel(mean, channels), "std": _per_channel(std, channels),
        "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj",
        "classifier": "head" if vit else "head.fc",
    }  # fmt: skip
    notes = []
    if settings.get("policy") == "default" and policy_matters(settings):
        notes.append("trained with maps padded before they are shifted: fastmim_kernels.accelerate(model, "
                     "policy='default') computes that, timm alone shifts first")  # fmt: skip
    if pixels == "float32":
        notes.append("mean and std are of samples as they are stored, not of values in [0, 1]: timm's own transforms, "
                     "which divide by 255, do not prepare such images")  # fmt: skip
    if notes:
        cfg["notes"] = notes
    return {
        "architecture": _architecture(settings),
        "num_classes": 0,
        "num_features": settings["embed_dim"] * (1 if vit else 2 ** (len(settings["depths"]) - 1)),
        **pool,
        "model_args": {**(_plain_args if plain else _vit_args if vit else _swin_args)(settings), **pool},
        "pretrained_cfg": cfg,
        **({} if weights == WEIGHTS_FILE else {"transformers_weights": weights}),
    }


def _architecture(settings: Mapping[str, Any]) -> str:
    """The name of timm's of the same size; of a size of one's own, the smallest of its family."""
    family = "plain" if settings.get("key_bias") else settings["name"]
    names = {
        f"{settings['name']}_{size}": pattern.format(size)
        for key, (pattern, sizes) in _NAMES.items() if key.partition("_")[0] == family for size in sizes
    }  # fmt: skip
    shape = ("embed_dim", "depths", "depth")
    for size, name in names.items():
        if all(settings.get(key) == SIZES[size].get(key) for key in shape):
            return name
    return next(iter(names.values()))


def _vit_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    return _shared_args(settings) | {
        "depth": settings["depth"],
        "init_values": settings["init_values"] or 0,  # null would be dropped on the way, and the name's taken
        "use_shared_rel_pos_bias": settings["shared_rel_pos_bias"],
        "use_rel_pos_bias": settings["rel_pos_bias"],
        "use_abs_pos_emb": bool(settings["abs_pos_embed"]),
        "use_fc_norm": False,  # the norm of pretraining stands before the pooling
    }


def _plain_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    return _shared_args(settings) | {"depth": settings["depth"]}


def _swin_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _shared_args(settings) | {"depths": settings["depths"], "window_size": settings["window_size"]}
    if settings["name"] == "swinv2":
        given = settings["pretrained_window_size"]
        arguments["pretrained_window_sizes"] = [given] * len(settings["depths"]) if isinstance(given, int) else given
    return arguments


def _shared_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in
            ("img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias")}  # fmt: skip


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)


def settings_of_timm(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a ``config.json`` of timm's says that no weight shows: sizes, windows and heads; and ``statistics``.

    The model of its ``architecture`` and ``model_args`` is built without memory, and asked.

    Raises:
        ValueError: timm knows no such model, or it is none of ours.
    """
    import timm

    name = str(config["architecture"])
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0, **config.get("model_args", {}))
        size = to_pair(model.patch_embed.img_size, "img_size")
        found: dict[str, Any] = {"img_size": size}
        if hasattr(model, "layers"):
            attention = [layer.blocks[0].attn for layer in model.layers]
            found["window_size"] = tuple(max(one.window_size[axis] for one in attention) for axis in (0, 1))
            spans = [getattr(one, "pretrained_window_size", (0, 0)) for one in attention]
            if any(max(span) for span in spans):
                found["pretrained_window_size"] = tuple(max(span) for span in spans)
        else:
            found["num_heads"] = model.blocks[0].attn.num_heads
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"config.json: architecture={name}: no Swin, SwinV2 or ViT of timm's ({reason})") from None
    cfg = config.get("pretrained_cfg", {})
    return found, {key: cfg[key] for key in ("mean", "std", "interpolation") if cfg.get(key)}
