"""What the kinds of golden files share."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from fastmim.engine.local import LocalEngine

Errors = dict[str, tuple[float, float]]
"""Of each kind of result the worst relative error and its limit."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors) of a file; a table in JSON has no tensors."""
    if path.suffix == ".json":
        return json.loads(path.read_text()), {}
    with safe_open(path, "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def relative(found: Any, wanted: Any) -> float:
    """Largest difference over the largest wanted number."""
    found, wanted = (
        np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (found, wanted)
    )
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-12))


def encoder_of(meta: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """The encoder's arguments; ``own`` are those that an objective's files do not state."""
    names = ("img_size", "patch_size", "embed_dim", "num_heads", "depths", "depth", "window_size", "mlp_ratio",
             "qkv_bias", "init_values")  # fmt: skip
    return {"name": meta["arch"], **{name: meta[name] for name in names if name in meta}, **own}


def weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")}


def overrides(**sections: Mapping[str, Any]) -> list[str]:
    """``section.key=value`` for :func:`fastmim.load_config`."""
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in sections.items() for key, value in keys.items()]


def steps(engine: LocalEngine, batches: Any, before: Callable[[int], None] = lambda step: None) -> Any:
    """(scalars, gradient norms) of one update a batch."""
    scalars, norms = [], []
    for step, (images, mask) in enumerate(batches):
        before(step)
        engine.train_on(images, mask)
        row = engine.read()
        norms.append(row.pop("grad_norm"))
        scalars.append(row)
    return scalars, norms


def ends(
    own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], kind: str, own_name: Callable[[str], str]
) -> float:
    """Worst error of [L2 norm, dot with a vector seeded by the name] of the final tensors ``<kind><official name>``.

    ``own`` are the run's tensors by the names that ``own_name`` makes of official ones; those it lacks are left out.
    """
    worst = 0.0
    for name in [key.removeprefix(kind) for key in tensors if key.startswith(kind)]:
        if own_name(name) not in own:  # DINO's encoder has no token for hidden patches
            continue
        weight = own[own_name(name)].detach().double().numpy().ravel().copy()
        if name.endswith("qkv.bias"):  # the keys' gradient is zero but for noise
            weight[len(weight) // 3 : 2 * len(weight) // 3] = 0
        direction = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight.size)
        worst = max(worst, relative([np.linalg.norm(weight), weight @ direction], tensors[f"{kind}{name}"]))
    return worst
