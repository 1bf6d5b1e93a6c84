"""``accelerate`` on small timm models: timm's own results in float64 are the truth, for outputs and every gradient."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp, RmsNorm
from timm.models import swin_transformer as v1
from torch import Tensor, nn

import fastmim_kernels as fk
from tests.kernels.oracle import FLOOR, relative_error
from tests.kernels.test_nn import randomise

NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
SMALL = dict(embed_dim=16, depths=(2, 2), num_heads=(1, 2), num_classes=5, drop_path_rate=0.0)


def create(name: str, **options: Any) -> nn.Module:
    model = timm.create_model(name, pretrained=False, **{**SMALL, **options}).eval()
    randomise(model)
    return model


def accelerated(model: nn.Module, **options: Any) -> nn.Module:
    ours = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fk.accelerate(ours, **options)
    assert report.replaced and not report.left
    return ours


def images(*size: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


def results(model: nn.Module, x: Tensor, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs and gradients; parameters of one name in all blocks as one tensor.

    A gradient of one or two values (SwinV2's logit scales) may cancel, and its relative error then says nothing.
    """
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    out = (forward or model)(x)
    out = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(4)
    sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in out).backward()
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[re.sub(r"\d+", "N", name)].append(parameter.grad.flatten())
    return {"input": x.grad, **{f"output {i}": o.detach() for i, o in enumerate(out)},
            **{name: torch.cat(grads) for name, grads in found.items()}}


def check(ours: nn.Module, theirs: nn.Module, x: Tensor, forward: Callable[[nn.Module], Any] = lambda model: model,
          factor: float = 2.0) -> None:
    got, plain = results(ours, x, forward(ours)), results(theirs, x, forward(theirs))
    precise = copy.deepcopy(theirs).double()
    truth = results(precise, x.double(), forward(precise))
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        assert got[name].dtype == plain[name].dtype
        error, limit = relative_error(got[name], value), factor * relative_error(plain[name], value) + FLOOR
        assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g}"


GEOMETRIES: dict[str, dict[str, Any]] = {
    "divisible": dict(img_size=32, window_size=4),
    "pads where it shifts": dict(img_size=(44, 52), window_size=4),
    "window = map, then wider": dict(img_size=28, window_size=7),
    "wider, partitioned": dict(img_size=24, window_size=7, always_partition=True),
    "rectangular": dict(img_size=(40, 36), window_size=(5, 3)),
    "a window a stage": dict(img_size=32, window_size=[(4, 2), (3, 4)]),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name: str, geometry: dict[str, Any]) -> None:
    model = create(name, **geometry)
    check(accelerated(model), model, images(*model.patch_embed.img_size))


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_than_built_for(name: str) -> None:
    """A map whose padding and mask are found at each forward, and one that set_input_size changes."""
    model = create(name, img_size=64, window_size=4, dynamic_img_size=True)
    ours = accelerated(model)
    check(ours, model, images(36, 44))
    check(ours, model, images(12, 12))  # a map of 3: smaller than the window it is partitioned into
    for module in (model, ours):
        module.set_input_size(img_size=(48, 40), window_size=(3, 5))
    check(ours, model, images(48, 40))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_draws_the_same_paths(name: str, checkpointing: bool) -> None:
    model = create(name, img_size=32, window_size=4, drop_path_rate=0.6).train()
    ours = accelerated(model)
    for module in (model, ours):
        module.set_grad_checkpointing(checkpointing)
    expected = results(model, images(32, 32, batch=8))
    for key, value in results(ours, images(32, 32, batch=8)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4 * expected[key].abs().max().item())
    unscaled = results(model.eval(), images(32, 32, batch=8))
    assert relative_error(expected["output 0"], unscaled["output 0"]) > 0.05  # paths were dropped


class Dense(nn.Module):
    """A segmentation head on the maps of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Conv2d(c, 2, 1) for c in backbone.feature_info.channels())

    def forward(self, x: Tensor) -> Tensor:
        maps = [m if m.shape[1] == head.in_channels else m.permute(0, 3, 1, 2)
                for m, head in zip(self.backbone(x), self.heads, strict=True)]
        size = maps[0].shape[-2:]
        return sum(nn.functional.interpolate(head(m), size) for head, m in zip(self.heads, maps, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapper", ["list", "getter"])
def test_dense_head_on_features(name: str, wrapper: str) -> None:
    backbone = create(name, img_size=(40, 36), window_size=4, features_only=True, feature_cls=wrapper,
                      num_classes=0, out_indices=(0, 1))
    model = Dense(backbone).eval()
    check(accelerated(model), model, images(40, 36))


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_and_head(name: str) -> None:
    model = create(name, img_size=32, window_size=4)
    ours = accelerated(model)
    check(ours, model, images(32, 32), lambda m: lambda x: m.forward_intermediates(x, intermediates_only=True))
    for module in (model, ours):
        module.reset_classifier(3, global_pool="max")
    ours.load_state_dict(model.state_dict())
    check(ours, model, images(32, 32))


def test_fx_features() -> None:
    """The replaced modules are leaves of the graph that timm traces."""
    model = create(NAMES[0], img_size=32, window_size=4)
    extractor = timm.layers.create_feature_extractor(accelerated(model), ["layers.0", "layers.1"])
    for ours, theirs in zip(extractor(images(32, 32)).values(),
                            model.forward_intermediates(images(32, 32), intermediates_only=True), strict=True):
        torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs)


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1, qk_norm=True, drop_path_rate=0.0, class_token=False,
                                              global_pool="avg")])
def test_vit(options: dict[str, Any]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3,
                              **options).eval()
    randomise(model)
    ours = copy.deepcopy(model)
    report = fk.accelerate(ours)
    assert {k: len(v) for k, v in report.replaced.items()} == {"VitBlock": 2, "Mlp": 2}
    assert all("scaled_dot_product_attention" in reason for reason in report.left.values())
    check(ours, model, images(32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name: str) -> None:
    """bfloat16 by autocast, and as the dtype of the parameters: no worse than timm's own, and of its dtypes."""
    model = create(name, img_size=32, window_size=4)
    x = images(32, 32, batch=8)

    def cast(m: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=t.dtype == torch.float32):
                return m.forward_features(t)
        return forward

    check(accelerated(model), model, x, cast)
    low = copy.deepcopy(model).bfloat16()
    check(accelerated(low), low, x.bfloat16(), lambda m: m.forward_features)


@pytest.mark.parametrize("name", NAMES)
def test_in_place(name: str) -> None:
    """Objects, parameters, buffers and keys stay; a second call, copies and pickles change nothing."""
    model = create(name, img_size=32, window_size=4)
    modules, state = dict(model.named_modules()), dict(model.state_dict())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    plain = copy.deepcopy(model)
    first = fk.accelerate(model)
    assert dict(model.named_modules()) == modules
    for before, after in ((parameters, model.named_parameters()), (buffers, model.named_buffers())):
        assert {n: id(t) for n, t in before.items()} == {n: id(t) for n, t in after}
    assert list(model.state_dict()) == list(state)
    second = fk.accelerate(model, impl="reference")
    assert second.already == first.replaced and not second.replaced
    assert model.layers[0].blocks[0].attn.impl == "reference"
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(plain.state_dict())
        check(other, plain, images(32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_materialised_from_meta(name: str) -> None:
    model = create(name, img_size=32, window_size=4)
    with torch.device("meta"):
        ours = timm.create_model(name, **SMALL, img_size=32, window_size=4).eval()
    fk.accelerate(ours)
    ours.to_empty(device="cpu")
    for module in ours.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    ours.load_state_dict(model.state_dict())
    check(ours, model, images(32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name: str) -> None:
    """Whose nodes show what runs: three blocks and a merging on the ops, and nothing of timm's in between."""
    model = accelerated(create(name, img_size=32, window_size=3, depths=(1, 2)))
    ran: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        ran.update(re.sub(r".*\.", "", str(node.target).removesuffix(".default")) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = results(model, images(32, 32))
    for key, value in results(compiled, images(32, 32)).items():
        torch.testing.assert_close(value, expected[key.replace("_orig_mod.", "")])
    assert [ran[op] for op in ("window_attention", "mlp", "patch_merge", "position_bias")] == [3, 3, 1, 3]
    # Swin: one before each stage and two a block, but for the last of a stage; SwinV2: two a block, and the merging's.
    assert ran["residual_norm"] == (6 if name.startswith("swin_") else 7)
    assert not any("softmax" in op or "gelu" in op for op in ran)


def test_traces_as_timm() -> None:
    model = create(NAMES[0], img_size=32, window_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(accelerated(model), images(32, 32))
    torch.testing.assert_close(traced(images(32, 32)), model(images(32, 32)))


def test_frozen_parameters_get_no_gradient() -> None:
    model = create(NAMES[1], img_size=32, window_size=4)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    check(accelerated(model), model, images(32, 32))


class Doubled(v1.SwinTransformerBlock):
    """A user's block that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def left_behind() -> Iterator[Any]:
    """(change to the model, kind that stays, its reason)."""
    def swish(model: nn.Module) -> None:
        model.layers[0].blocks[1].mlp.act = nn.SiLU()

    def glu(model: nn.Module) -> None:
        model.layers[0].blocks[1].mlp = GluMlp(16, 32, 16)

    def rms(model: nn.Module) -> None:
        model.layers[0].blocks[1].norm2 = RmsNorm(16)

    def doubled(model: nn.Module) -> None:
        model.layers[0].blocks[1].__class__ = Doubled

    def no_affine(model: nn.Module) -> None:
        model.layers[1].downsample.norm = nn.LayerNorm(64, elementwise_affine=False)

    def lora(model: nn.Module) -> None:
        model.layers[0].blocks[1].attn.qkv = Lora(model.layers[0].blocks[1].attn.qkv)

    def attention(model: nn.Module) -> None:
        model.layers[0].blocks[1].attn = Windowless(model.layers[0].blocks[1].attn)

    yield attention, "layers.0.blocks.1", "SwinTransformerBlock: attn is Windowless"
    yield swish, "layers.0.blocks.1.mlp", "Mlp: act is SiLU"
    yield glu, "layers.0.blocks.1.mlp", "GluMlp: no drop-in"
    yield rms, "layers.0.blocks.1", "SwinTransformerBlock: norm2 is RmsNorm"
    yield doubled, "layers.0.blocks.1", "Doubled: a subclass of SwinTransformerBlock, which may compute something else"
    yield no_affine, "layers.1.downsample", "PatchMerging: norm has no weight and bias over the channels"
    yield lora, "layers.0.blocks.1", "SwinTransformerBlock: attn.qkv is Lora"


class Windowless(nn.Module):
    """Not attention at all."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.proj = attn.proj

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(x)


class Lora(nn.Linear):
    """A linear layer with something added, whose ``weight`` is not all there is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down, self.up = (nn.Parameter(0.3 * torch.ones(1, n)) for n in (base.in_features, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.down.mT) @ self.up


@pytest.mark.filterwarnings("ignore:accelerate")
@pytest.mark.parametrize("change, path, reason", list(left_behind()), ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("late", [False, True])
def test_what_is_unknown_stays(change: Callable[[nn.Module], None], path: str, reason: str, late: bool) -> None:
    """Changed before it is reported; changed after, when there is no report, it is honoured all the same."""
    model = create(NAMES[0], img_size=32, window_size=4)
    ours = copy.deepcopy(model)
    if late:
        fk.accelerate(ours)
    for module in (model, ours):
        torch.manual_seed(7)
        change(module)
    if not late:
        report = fk.accelerate(ours)
        assert report.left[path] == reason and f"left {reason}: 1 ({path})" in str(report)
        assert len(report.replaced["SwinTransformerBlock"]) >= 3
    elif change.__name__ in ("swish", "rms", "no_affine", "lora", "attention"):
        assert fk.accelerate(ours).notes[path] == reason  # the drop-ins have timm's names
    if change.__name__ != "doubled" or not late:
        check(ours, model, images(32, 32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["", "attn", "attn.attn_drop", "attn.qkv", "norm1", "drop_path2", "mlp", "mlp.fc1"])
def test_hooks_see_what_timm_gives_them(name: str, path: str) -> None:
    seen: list[list[Tensor]] = []
    model = create(name, img_size=32, window_size=4)
    ours = accelerated(model)
    for module in (model, ours):
        target = module.layers[0].blocks[1].get_submodule(path)
        target.register_forward_hook(lambda m, inputs, output: seen.append([*inputs, output]))
        module(images(32, 32))
    shapes = [[t.shape for t in tensors if isinstance(t, Tensor)] for tensors in seen]
    if (name, path) == (NAMES[1], "attn.qkv"):  # timm's SwinV2 reads the weight and never calls the layer
        assert not seen
        return
    assert len(seen) == 2
    if path.startswith("attn"):
        assert shapes[0] == shapes[1]
    torch.testing.assert_close(seen[1][-1].reshape(seen[0][-1].shape), seen[0][-1])


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_timms_in_training(name: str) -> None:
    model = create(name, img_size=32, window_size=4, proj_drop_rate=0.2, attn_drop_rate=0.1).train()
    ours = copy.deepcopy(model)
    report = fk.accelerate(ours)
    assert any("dropout of 0.2" in note for note in report.notes.values()) and "note" in str(report)
    expected = results(model, images(32, 32))
    for key, value in results(ours, images(32, 32)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4 * expected[key].abs().max().item())
    check(ours.eval(), model.eval(), images(32, 32))


def test_another_model_is_left_and_named() -> None:
    model = timm.create_model("swinv2_cr_tiny_ns_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1),
                              num_heads=(1, 2))
    with pytest.warns(UserWarning, match="stay timm's own"):
        report = fk.accelerate(model)
    assert "SwinTransformerV2CrBlock: no drop-in" in report.left.values() and set(report.replaced) <= {"Mlp"}
    with pytest.warns(UserWarning, match="nothing in ResNet has a drop-in"):
        report = fk.accelerate(timm.create_model("resnet10t"))
    assert str(report).startswith("replaced nothing")


def test_no_timm_model() -> None:
    with pytest.raises(ValueError, match="model=Sequential holds no module of timm"):
        fk.accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="impl='fast'"):
        fk.accelerate(Mlp(8), impl="fast")


def test_the_ops_do_not_need_timm() -> None:
    code = "import sys; sys.modules['timm'] = None; import fastmim_kernels as fk; fk.linear; assert 'nn' in fk.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(fk.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.split("## In a timm model")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    exec(code.group(1), {})
    said = re.findall(r"^# (replaced.*)$", code.group(1), re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said and len(said) == 5
