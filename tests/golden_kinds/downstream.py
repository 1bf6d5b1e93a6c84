"""What fine-tuning and probes are made of: resampled tables and positions, layers' rates, votes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fastmim import create_objective
from fastmim.engine.optim import param_groups
from fastmim.evaluate.directions import Lars
from fastmim.evaluate.knn import knn_accuracy, knn_votes
from fastmim.interop.encoder_names import shift_downsample
from fastmim.models.positions import resize_positions, sincos_positions
from fastmim.models.resample import resample_bias_table, resample_class_table, resample_positions
from fastmim.models.swinv2 import SwinTransformerV2

from .common import Errors, relative

Tensors = Mapping[str, torch.Tensor]


def downstream(meta: Mapping[str, Any], tensors: Tensors, impl: str) -> Errors:
    """Every case of the file, by its name."""
    worst: Errors = {}
    for case in dict.fromkeys(re.sub(r"\.(src|dst)$", "", name) for name in tensors):
        for pattern, check, limit in TABLES:
            if found := re.fullmatch(pattern, case):
                error = check(tensors, case, *found.groups())
                kind = case.split(".")[0] if not case.startswith("abs") else ".".join(case.split(".")[:2])
                worst[kind] = (max(error, worst.get(kind, (0.0, 0))[0]), limit)
    worst["v2"] = (max(map(lambda name: window(tensors, name, impl), _windows(tensors)), default=0.0), 1e-5)
    if any(name.startswith("knn.") for name in tensors):
        worst |= knn({name.removeprefix("knn."): value for name, value in tensors.items() if name.startswith("knn.")})
    if "lars.weight" in tensors:
        worst |= lars(meta["lars"], tensors)
    return worst


def bias_table(tensors: Tensors, case: str, old: str, new: str) -> float:
    edges = (int(old),) * 2, (int(new),) * 2
    return relative(resample_bias_table(tensors[f"{case}.src"], *edges), tensors[f"{case}.dst"])


def class_table(tensors: Tensors, case: str, old: str, new: str) -> float:
    edges = (int(old),) * 2, (int(new),) * 2
    return relative(resample_class_table(tensors[f"{case}.src"], *edges), tensors[f"{case}.dst"])


def mae_positions(tensors: Tensors, case: str, old: str, new: str) -> float:
    edges = (int(old),) * 2, (int(new),) * 2
    return relative(resample_positions(tensors[f"{case}.src"], *edges), tensors[f"{case}.dst"])


def ibot_positions(tensors: Tensors, case: str, image: str, crop: str, patch: str) -> float:
    grids = [(int(edge) // int(patch),) * 2 for edge in (image, crop)]
    return relative(resize_positions(tensors[f"{case}.src"], *grids), tensors[f"{case}.dst"])


def fixed_positions(tensors: Tensors, case: str, kind: str, rows: str, columns: str, dim: str) -> float:
    own = sincos_positions((int(rows), int(columns)), int(dim), "sincos" if kind == "mae" else "sincos_moco")
    return relative(own[0], tensors[case])


TABLES = [
    (r"sincos\.(mae|moco)\.(\d+)x(\d+)_(\d+)", fixed_positions, 1e-6),
    (r"v1\.(\d+)to(\d+)", bias_table, 1e-6),
    (r"vit\.(\d+)to(\d+)", class_table, 1e-6),
    (r"abs\.mae\.(\d+)to(\d+)", mae_positions, 1e-6),
    (r"abs\.ibot\.(\d+)to(\d+)_p(\d+)", ibot_positions, 1e-6),
]


def _windows(tensors: Tensors) -> list[str]:
    return sorted({found[0] for name in tensors if (found := re.match(r"v2\.\d+from\d+", name))})


def window(tensors: Tensors, case: str, impl: str) -> float:
    """SwinV2's attention of one window, whose position bias may come from another one: table and output."""
    edge, pretrained = map(int, case.removeprefix("v2.").split("from"))
    own = {
        name.removeprefix(f"{case}.param."): value
        for name, value in tensors.items()
        if name.startswith(f"{case}.param.")
    }
    dim, heads = own["proj.bias"].numel(), own["logit_scale"].numel()
    encoder = SwinTransformerV2(
        img_size=edge, patch_size=1, embed_dim=dim, depths=(1,), num_heads=(heads,), window_size=edge,
        pretrained_window_size=pretrained, impl=impl,
    )  # fmt: skip
    block: Any = encoder.layers[0].blocks[0]
    block.attn.load_state_dict(own)
    x = tensors[f"{case}.x"].unflatten(1, (edge, edge))
    table = encoder.coordinates([(edge, edge)], [pretrained])[0]
    bias = 16 * torch.sigmoid(block.attn.cpb_mlp(table)).detach()
    errors = [relative(table, tensors[f"{case}.table"]), relative(bias, tensors[f"{case}.bias_table"])]
    (step, *_), _ = encoder.shared(encoder.all_blocks(), [], x)
    out = block.attn(x, step=step.alone())
    return max(*errors, relative(out.flatten(1, 2).detach(), tensors[f"{case}.out"]))


def knn(part: Tensors) -> Errors:
    """Votes for every class and accuracies, of each k."""
    train, labels, test, truth = (part[name] for name in ("train", "train_labels", "test", "test_labels"))
    ks = sorted(int(name.removeprefix("votes")) for name in part if name.startswith("votes"))
    classes = part[f"votes{ks[0]}"].shape[1]
    tables = [votes for _, votes in knn_votes(train, labels, test, classes=classes, neighbours=ks)]
    accuracy = knn_accuracy(train, labels, test, truth, classes=classes, neighbours=ks)
    errors: Errors = {}
    for k in ks:
        errors[f"{k}-NN votes"] = (relative(torch.cat([votes[k] for votes in tables]), part[f"votes{k}"]), 1e-5)
        errors[f"{k}-NN accuracy"] = (relative(accuracy[k], part[f"top{k}"]), 1e-6)
    return errors


def lars(said: str, tensors: Tensors) -> Errors:
    """A weight and a bias after steps with given gradients."""
    numbers = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.e-]+)", said)}
    weight, bias = tensors["lars.weight"].T[None, :, None].clone(), tensors["lars.bias"][None, None, None].clone()
    direction = Lars([weight, bias], numbers["weight_decay"], numbers["momentum"], trust=numbers["trust_coefficient"])
    for of_weight, of_bias in zip(tensors["lars.grads_weight"], tensors["lars.grads_bias"], strict=True):
        steps = direction([weight, bias], [of_weight.T[None, :, None], of_bias[None, None, None]])
        for param, step in zip((weight, bias), steps, strict=True):
            param.sub_(numbers["lr"] * step)
    return {
        "LARS weight": (relative(weight[0, :, 0].T, tensors["lars.weight_end"]), 1e-5),
        "LARS bias": (relative(bias[0, 0, 0], tensors["lars.bias_end"]), 1e-5),
    }


# Layers


RECIPES = {"SimMIM": "simmim", "Swin-Transformer": "simmim", "beit": "beit", "ibot": "ibot", "mae": "mae"}
VIT = {"simmim": dict(rel_pos_bias=True, shared_rel_pos_bias=False, init_values=0.1)}
VIT |= {"beit": VIT["simmim"], "mae": dict(key_bias=True, abs_pos_embed=True, init_values=None,
                                          shared_rel_pos_bias=False)}  # fmt: skip
VIT["ibot"] = VIT["mae"]


def layer_decay(table: Mapping[str, Any], tensors: Tensors, impl: str) -> Errors:
    """Scale and decay of every parameter of each model; a parameter in the wrong group is an error of 1."""
    errors: Errors = {}
    for case, wanted in table.items():
        source, model = case.rsplit(" ", 1)
        recipe = RECIPES[re.split(r"[/ ]", source)[-1]]
        encoder = {"name": model} | (VIT[recipe] if model.startswith("vit") else {})
        with torch.device("meta"):
            made = create_objective(
                "classify", encoder=encoder, num_classes=1000, recipe=recipe, layer_decay=wanted["layer_decay"],
                impl=impl,
            )  # fmt: skip
        found = {}
        for group in param_groups(made, 0.05, policy="parity"):
            for name in group["param_names"]:
                found[name.removeprefix("encoder.")] = (group["lr_scale"], group["weight_decay"] > 0)
        worst = 0.0
        stated = [
            (shift_downsample(name), layer["lr_scale"], decays)
            for layer in wanted["by_layer"].values()
            for key, decays in (("decay", True), ("no_decay", False))
            for name in layer[key]
        ]
        for name, scale, decays in stated:
            own_scale, own_decays = found.pop(name, (0.0, not decays))
            worst = max(worst, abs(own_scale / scale - 1), float(own_decays != decays))
        errors[case] = (max(worst, float(len(found))), 1e-9)
    return errors
