"""The config: YAML, bases, overrides, and one clear line for every mistake."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from fastmim.config import Config, dump_config, explain, load_config, save_config
from fastmim.models import SIZES

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = sorted(p for p in (ROOT / "configs" / "simmim").glob("*.yaml") if not p.name.startswith("_"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ValueError) as error:
        load_config(path, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


# What a user may type, and what the line must say: the field with its value, and the fix.
MISTAKES = [
    # unknown keys
    ("model.img_sise=96", ["model.img_sise: unknown key", "did you mean 'img_size'", "patch_size"]),
    ("optimizer.lr=1", ["optimizer: unknown key", "optim", "sections: model, objective, data"]),
    ("steps=5", ["steps: unknown key", "did you mean 'train.steps'"]),
    ("objective.norm_targt=3", ["objective.norm_targt: unknown key; did you mean 'norm_target'", "keys of objective"]),
    ("train.zzz=1", ["train.zzz: unknown key", "keys of train: steps, epochs"]),
    # malformed overrides
    ("train.steps", ["'train.steps': expected section.key=value"]),
    ("=3", ["expected section.key=value"]),
    ("train..steps=3", ["expected section.key=value"]),
    ("train.steps.more=3", ["train.steps is a value, not a section"]),
    ("model=3", ["model is a section; expected model.key=value"]),
    ("model.depths=[2, 2", ["'model.depths=[2, 2'", "not YAML", "line 1"]),
    ("objective=[1", ["override 'objective=[1': the value is not YAML"]),
    ("base=other.yaml", ["base is a key of files only"]),
    # types
    ("train.steps=abc", ["train.steps=abc: expected an integer"]),
    ("train.steps=1.5", ["train.steps=1.5: expected an integer"]),
    ("train.steps=true", ["train.steps=true: expected a number"]),
    ("optim.lr=fast", ["optim.lr=fast: expected a number"]),
    ("optim.lr=false", ["optim.lr=false: expected a number"]),
    ("optim.lr=[1e-4]", ["optim.lr=[0.0001]: expected a number"]),
    ("model.depths=2", ["model.depths=2: expected a list"]),
    ("model.depths=[2, x, 2, 2]", ["model.depths[1]=x: expected an integer"]),
    ("model.depths=[]", ["model.depths=[]: must not be empty"]),
    ("model.img_size=big", ["model.img_size=big: expected a positive integer or [height, width]"]),
    ("model.img_size=[96, 96, 96]", ["model.img_size=[96, 96, 96]: expected"]),
    ("efficiency.compile=maybe", ["efficiency.compile=maybe: expected true or false"]),
    (
        "efficiency.fused_optimizer=maybe",
        ["efficiency.fused_optimizer=maybe: expected auto, true, false, apex or cpu_adam"],
    ),
    ("objective.name=simimm", ["objective.name=simimm: unknown objective", "did you mean 'simmim'", "module:Class"]),
    ("objective.name=null", ["objective.name=null: expected text"]),
    ("objective.loss=l3", ["objective.loss=l3: expected one of l1, l2, smooth_l1"]),
    ("efficiency.kernels=tritn", ["did you mean 'triton'"]),
    ("data.path=''", ["data.path='': expected a path"]),
    ("output.dir=null", ["output.dir=null: expected text"]),
    ("output.loggers=csv", ["output.loggers=csv: expected a list in brackets"]),
    ("output.loggers=[csv, wand]", ["output.loggers[1]=wand: expected one of tensorboard", "did you mean 'wandb'"]),
    ("output.loggers=[csv, csv]", ["output.loggers=[csv, csv]: each at most once; use [csv]"]),
    ("output.tensorboard=maybe", ["output.tensorboard=maybe: no key any more; use output.loggers=[tensorboard]"]),
    # ranges
    ("optim.lr=-1e-4", ["optim.lr=-0.0001: must be >= 0"]),
    ("optim.lr=.nan", ["optim.lr=nan: expected a finite number"]),
    ("optim.lr=nan", ["optim.lr=nan: expected a finite number"]),
    ("optim.lr=.inf", ["optim.lr=inf: expected a finite number"]),
    ("optim.weight_decay=-0.1", ["optim.weight_decay=-0.1: must be >= 0"]),
    ("optim.clip_grad=0", ["optim.clip_grad=0: must be > 0"]),
    ("optim.betas=[0.9, 1.0]", ["optim.betas[1]=1.0: must be < 1"]),
    ("optim.betas=[0.9]", ["optim.betas=[0.9]: expected two numbers"]),
    ("objective.mask_ratio=0", ["objective.mask_ratio=0: must be > 0"]),
    ("objective.mask_ratio=1.0", ["objective.mask_ratio=1.0: must be < 1"]),
    ("objective.mask_ratio=-0.6", ["objective.mask_ratio=-0.6: must be > 0"]),
    ("model.drop_path_rate=1", ["model.drop_path_rate=1: must be < 1"]),
    ("data.hflip=1.5", ["data.hflip=1.5: must be <= 1"]),
    ("data.scale=[1.0, 0.5]", ["data.scale=[1.0, 0.5]: must be in order; use [0.5, 1]"]),
    ("data.scale=[0.5, 1.5]", ["data.scale[1]=1.5: must be <= 1"]),
    ("data.ratio=[0, 1]", ["data.ratio[0]=0: must be > 0"]),
    ("data.std=[0.2, 0.2, 0]", ["data.std[2]=0: must be > 0"]),
    ("data.num_workers=-1", ["data.num_workers=-1: must be >= 0"]),
    ("train.steps=0", ["train.steps=0: must be > 0"]),
    ("train.micro_batch_size=0", ["train.micro_batch_size=0: must be > 0"]),
    ("train.seed=-1", ["train.seed=-1: must be >= 0"]),
    # between fields
    ("model.name=swinv2_bas", ["model.name=swinv2_bas: unknown encoder", "did you mean 'swinv2_base'"]),
    ("model.img_size=98", ["model.img_size=98: not divisible by patch_size 4; use 96 or 100"]),
    (
        "model.img_size=[96, 98]",
        ["model.img_size=[96, 98]: not divisible by patch_size 4", "[96, 96] or [96, 100]"],
    ),
    ("model.img_size=3", ["model.img_size=3: not divisible by patch_size 4; use 4"]),
    ("model.depth=12", ["model.depth=12: swinv2_base has no such key; set model.depth=null"]),
    ("model.policy=timm", ["model.policy=timm: expected one of default, parity"]),
    (
        "model.num_heads=[3, 8, 16, 32]",
        ["model.num_heads=[3, 8, 16, 32]", "3 does not divide the 128 channels", "use 2"],
    ),
    ("model.num_heads=4", ["model.num_heads=4: must list one number per stage"]),
    ("model.depths=[2, 2]", ["must list one number per stage, as depths=[2, 2] does"]),
    ("objective.unit=30", ["objective.unit=30: not a multiple of patch_size 4; use 28 or 32"]),
    ("objective.unit=256", ["masks the only unit", "smaller unit"]),
    ("objective.mask=blok", ["objective.mask=blok: expected one of random, block, square", "did you mean 'block'"]),
    ("objective.mask=square", ["objective.mask_ratio=0.6: mask=square hides no such share of", "use 0."]),
    (
        "objective.norm_target=46",
        ["objective.norm_target=46: must be 0 (off) or an odd window", "use 45 or 47"],
    ),
    ("objective.norm_target=1", ["objective.norm_target=1: must be 0 (off) or an odd window", "use 3"]),
    ("objective.head=cnn", ["objective.head=cnn: expected one of linear, mlp, swin_tiny, swin_base"]),
    ("objective.target=bin", ["objective.target=bin: expected one of", "did you mean 'bins'"]),
    ("objective.target_stride=3", ["objective.target_stride=3: must divide the encoder's stride 32", "1, 2, 4, 8, 16"]),
    ("objective.bins=16", ["objective.bins=16: target=pixels has none", "use target=bins"]),
    ("objective.norm_patch=3", ["objective.norm_patch=3: expected true or false"]),
    ("objective.beta=0.5", ["objective.beta=0.5: loss=l1 has none; use loss=smooth_l1"]),
    ("objective.target=clusters", ["objective.clusters=null: give a file that `fastmim data clusters"]),
    ("objective.target=tokens", ["objective.tokenizer=null: give the encoder.safetensors"]),
    ("data.path=[]", ["data.path=[]: expected a path or a list of paths"]),
    ("data.path=[a, 3]", ["data.path=[a, 3]: expected a path or a list of paths"]),
    ("data.weights=[1, 2]", ["data.weights=[1.0, 2.0]: 2 for 1 data.path; give data.path=[a, b, ...]"]),
    ("data.weights=[0]", ["data.weights[0]=0: must be > 0"]),
    ("data.value_range=[5, 5]", ["data.value_range=[5, 5]: must be [low, high] with low < high"]),
    ("data.value_range=4095", ["data.value_range=4095: expected two numbers [low, high]"]),
    ("data.alpha=pink", ["data.alpha=pink: expected one of white, black, drop, or a colour"]),
    ("data.mean=[123.675, 116.28, 103.53]", ["data.mean=[123.675, 116.28, 103.53]: ", "[0.485, 0.456, 0.406]"]),
    ("data.mean=[123, 116, 103]", ["data.mean=[123.0, 116.0, 103.0]: ", "in [0, 1]", "[0.4824, 0.4549, 0.4039]"]),
    ("data.std=[0.2, 57, 0.2]", ["data.std=[0.2, 57.0, 0.2]: must be of values in [0, 1]"]),
    ("data.std=[127]", ["data.std=[127.0]: must be of values in [0, 1]"]),
    ("data.mean=[31000]", ["data.mean=[31000.0]: must be of values in [0, 1]"]),
    ("data.weights=[1, -1]", ["data.weights[1]=-1: must be > 0"]),
    ("data.mean=[-0.1]", ["data.mean=[-0.1]: must be of values in [0, 1], not negative"]),
    ("data.std=[58.395, 57.12, 57.375]", ["data.std=[58.395, 57.12, 57.375]: ", "[0.229, 0.224, 0.225]"]),
    ("data.std=[4095]", ["data.std=[4095.0]: must be of values in [0, 1]"]),
    ("data.mean=[0.5, 0.5]", ["data.mean=[0.5, 0.5]: 2 values for model.in_chans=3"]),
    ("train.epochs=null", ["give train.steps or train.epochs"]),
    ("data={val_path: /v, val_fraction: 0.1}", ["data.val_fraction=0.1: data.val_path=/v is given too; keep one"]),
    ("data.labels=/c.csv", ["data.labels=/c.csv: names the classes of data.labelled_path, which is null"]),
    ("train.probe_every=5", ["train.probe_every=5: nothing to probe; give data.labelled_path"]),
    ("data.val_fraction=0", ["data.val_fraction=0: must be > 0"]),
    ("data.val_fraction=1", ["data.val_fraction=1: must be < 1"]),
    ("train={steps: 5, epochs: 5}", ["train.steps=5: train.epochs=5 is given too"]),
    ("train.global_batch_size=100", ["train.global_batch_size=100: not a multiple", "64; use 64 or 128"]),
    ("optim.schedule=multistep", ["optim.milestones=[]", "at least one epoch"]),
    ("optim.schedule=step", ["optim.decay_epochs=null"]),
    ("optim.milestones=[30, 20]", ["optim.milestones=[30, 20]: must rise; use [20, 30]"]),
]


def test_lamb_is_not_cut_among_ranks() -> None:
    message = refused("optim.name=lamb", "efficiency.zero_stage=2")
    assert "optim.name=lamb: not with efficiency.zero_stage=2; use adamw, or stage 0" in message


@pytest.mark.parametrize("override, expected", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_clear_line(override: str, expected: list[str]) -> None:
    message = refused(override)
    for part in expected:
        assert part in message


def test_vit_messages() -> None:
    assert "use 96 or 112" in refused("model.name=vit_base", "model.img_size=100")
    assert "vit takes one number" in refused("model.name=vit", "model.num_heads=[12]")
    assert "7 does not divide the 768 channels" in refused("model.name=vit", "model.num_heads=7")
    assert "no such key" in refused("model.name=vit", "model.window_size=7")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4", "'1e-4'"])
def test_exponents_without_a_point_are_numbers(tmp_path: Path, text: str) -> None:
    """PyYAML reads 1e-4 as text (YAML 1.1)."""
    assert load_config(None, [f"optim.lr={text}"]).optim.lr == pytest.approx(1e-4, rel=1e-15)
    path = write(tmp_path / "a.yaml", f"optim:\n  lr: {text}\n")
    assert load_config(path).optim.lr == pytest.approx(1e-4, rel=1e-15)


@pytest.mark.parametrize("text", ["2026-01-01", "1:30", "no", "007", "1e-4", "12", "a: b", "x#y", "[z", "on"])
def test_a_path_may_look_like_anything(tmp_path: Path, text: str) -> None:
    cfg = load_config(None, [f"output.dir={text}", f"data.path={text}"])
    assert (cfg.output.dir, cfg.data.path) == (text, text)


def test_configs_of_versions_with_output_tensorboard_mean_the_same(tmp_path: Path) -> None:
    old = write(tmp_path / "config.yaml", "output:\n  dir: a\n  tensorboard: false\n  pictures: 2\n")
    assert load_config(old).output.model_dump() == {"dir": "a", "loggers": (), "pictures": 2, "bands": None}
    assert load_config(old, ["output.loggers=[csv]"]).output.loggers == ("csv",)
    assert load_config(old, ["output.tensorboard=true"]).output.loggers == ("tensorboard",)
    assert load_config().output.loggers == ("tensorboard",)
    assert load_config(None, ["output.loggers=null"]).output.loggers == ()
    assert "use output.loggers=" in refused("output.tensorboard=false", "output.loggers=[csv]")


def test_data_path_may_be_a_list(tmp_path: Path) -> None:
    cfg = load_config(None, ["data.path=[~/a, /b c]", "data.weights=[3, 1]", "data.value_range=[0, 4095]"])
    assert cfg.data.path == (str(Path.home() / "a"), "/b c") and cfg.data.weights == (3, 1)
    assert load_config(None, ["data.path=[/a]"]).data.path == "/a"
    save_config(cfg, tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml") == cfg


def test_override_values() -> None:
    cfg = load_config(
        None,
        [
            "model={name: swin, depths: [2, 2], num_heads: [3, 6]}",
            "model.depths=[1, 3]",
            "model.img_size=[96, 128]",
            "optim.clip_grad=null",
            "optim.lr_batch=0",
            "data.val_path=null",
            "data.path=~/images",
            "train.steps=1",
            "train.steps=1_000",
            "efficiency.fused_optimizer=false",
            "efficiency.compile=true",
        ],
    )
    assert (cfg.model.name, cfg.model.depths, cfg.model.num_heads) == ("swin", (1, 3), (3, 6))
    assert (cfg.model.img_size, cfg.optim.clip_grad, cfg.optim.lr_batch) == ((96, 128), None, 0)
    assert (cfg.train.steps, cfg.train.epochs) == (1000, None)
    assert cfg.data.path == str(Path.home() / "images") and cfg.data.val_path is None
    assert cfg.efficiency.fused_optimizer is False and cfg.efficiency.compile is True


@pytest.mark.parametrize(
    "given, kept, said",
    [
        (["data.path=mine"], None, "data.val_path=held is left out: it belongs to data.path=own, and data.path=mine"),
        (["data.path=mine", "data.val_path=held"], "held", ""),
        (["data.path=mine", "data.val_path=null"], None, ""),
        (["data.path=mine", "data.val_fraction=0.1"], None, ""),
        (["data.path=own"], "held", ""),
        (["data.path=null"], "held", ""),
        (["data.hflip=0"], "held", ""),
    ],
)
def test_held_out_images_go_with_those_that_they_stand_beside(
    given: list[str], kept: str | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "pair.yaml", "data: {path: own, val_path: held}")
    assert load_config(path, given).data.val_path == kept
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_held_out_images_without_a_pair_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file with data.val_path alone is made for any images; a file above a pair replaces it as an override does."""
    alone = write(tmp_path / "alone.yaml", "data: {val_path: held}")
    assert load_config(alone, ["data.path=mine"]).data.val_path == "held" and not caplog.text
    write(tmp_path / "pair.yaml", "data: {path: own, val_path: held}")
    above = write(tmp_path / "above.yaml", "base: pair.yaml\ndata: {path: mine}")
    assert load_config(above).data.val_path is None and "data.val_path=held is left out" in caplog.text


def test_bases_merge_deeply_and_later_wins(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "optim: {lr: 1e-3, betas: [0.8, 0.9]}\ntrain: {seed: 1}\ndata:\n")
    write(tmp_path / "sub/b.yaml", "base: ../a.yaml\noptim:\n  lr: 2e-3\n")
    top = write(tmp_path / "c.yaml", "base: [a.yaml, sub/b.yaml]\ntrain:\n  seed: 3\noptim:\n")
    cfg = load_config(top, ["optim.eps=1e-6"])
    assert (cfg.optim.lr, cfg.optim.betas, cfg.optim.eps, cfg.train.seed) == (2e-3, (0.8, 0.9), 1e-6, 3)


def test_a_layer_replaces_the_other_way_to_say_the_same(tmp_path: Path) -> None:
    """train.steps=20 on a recipe of 100 epochs must not need train.epochs=null."""
    path = write(tmp_path / "a.yaml", "train: {epochs: 100}\noptim: {warmup_epochs: 10}\n")
    cfg = load_config(path, ["train.steps=20", "optim.warmup_steps=5"])
    assert (cfg.train.steps, cfg.train.epochs) == (20, None)
    assert (cfg.optim.warmup_steps, cfg.optim.warmup_epochs) == (5, None)
    path = write(tmp_path / "b.yaml", "train: {steps: 100}\n")
    cfg = load_config(path, ["train.epochs=2"])
    assert (cfg.train.steps, cfg.train.epochs) == (None, 2)
    assert "is given too" in refused("train.steps=20", "train.epochs=3", path=path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "recipe.yaml", "")
    missing = refused(path=tmp_path / "recipes.yaml")
    assert "recipes.yaml: no such file" in missing and "did you mean 'recipe.yaml'" in missing
    assert "directory" in refused(path=tmp_path)
    child = write(tmp_path / "child.yaml", "base: gone.yaml\n")
    assert "gone.yaml: no such file (base of" in refused(path=child)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(path=tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("base: self.yaml", "includes itself through base: self.yaml -> self.yaml"),
        ("base: 3", "base=3: expected a file name"),
        ("- a\n- b", "expected sections"),
        ("just text", "expected sections"),
        ("1: 2", "expected sections"),
        ("optim:\n  lr: 1\n  lr: 2", "line 3, column 3: the key 'lr' is given twice"),
        ("optim: {lr: 1}\noptim: {}", "line 2, column 1: the key 'optim' is given twice"),
        ("optim: [", "line 1"),
        ("optim: !!python/object/apply:os.getcwd []", "line 1"),
        ("optim: 5", "optim=5: expected a section"),
        ("optim: {lr: 1e-4}\ntrian: {}", "trian: unknown key; did you mean 'train'"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(path=write(tmp_path / "self.yaml", text))


def test_a_longer_cycle_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in refused(path=tmp_path / "a.yaml")
    # The same file twice, side by side, is no cycle.
    write(tmp_path / "leaf.yaml", "train: {seed: 4}\n")
    write(tmp_path / "left.yaml", "base: leaf.yaml\n")
    assert load_config(write(tmp_path / "top.yaml", "base: [leaf.yaml, left.yaml]")).train.seed == 4


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "optim: {lr: -1, eps: 0}\ntrain: {stepz: 1}\n")
    message = refused(path=path)
    assert message.startswith("train.stepz: unknown key; did you mean 'steps'") and "(and 2 more)" in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path, ["data.path=/images"])
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg
    # The saved file is plain YAML for other tools too, with every key in it.
    tree = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert {s: set(tree[s]) for s in tree} == {
        s: set(type(getattr(cfg, s)).model_fields) for s in type(cfg).model_fields
    }
    write(tmp_path / "explained.yaml", explain(cfg))
    assert load_config(tmp_path / "explained.yaml") == cfg


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_published_hyperparameters(path: Path) -> None:
    """The numbers of the SimMIM paper and its code, written out once more."""
    cfg = load_config(path)
    o, d, m = cfg.optim, cfg.data, cfg.objective
    assert (m.mask_ratio, m.unit, m.loss, m.loss_on) == (0.6, 32, "l1", "masked")
    assert d.scale == (0.67, 1.0) and d.ratio == pytest.approx((3 / 4, 4 / 3)) and d.hflip == 0.5
    assert (
        d.interpolation == "bilinear" and d.mean == (0.485, 0.456, 0.406) and d.std == (0.229, 0.224, 0.225)
    )
    assert (o.betas, o.eps, o.weight_decay, o.clip_grad, o.lr_batch) == ((0.9, 0.999), 1e-8, 0.05, 5.0, 512)
    assert cfg.train.global_batch_size == 2048 and 2048 % cfg.train.micro_batch_size == 0
    if path.stem.endswith("100ep"):
        assert (o.lr, o.warmup_lr, o.min_lr, o.warmup_epochs, cfg.train.epochs) == (2e-4, 1e-6, 1e-5, 10, 100)
        assert (o.schedule, o.cosine_after_warmup) == ("cosine", False)
    else:
        assert (o.lr, o.warmup_lr, o.milestones, o.gamma, cfg.train.epochs) == (1e-4, 5e-7, (700,), 0.1, 800)
    family = SIZES[cfg.model.name]["name"]
    assert m.norm_target == (47 if family == "swinv2" else 0)
    assert cfg.model.drop_path_rate == (0.0 if family == "swin" else 0.1)
    assert SIZES[cfg.model.name]["img_size"] == (224 if family == "vit" else 192)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/parity").glob("[!_]*.yaml")), ids=lambda p: p.stem)
def test_parity_configs_differ_in_policy_only(path: Path) -> None:
    parity, plain = load_config(path), load_config(ROOT / "configs/simmim" / path.name)
    assert parity.optim.policy == "parity" and parity.efficiency.precision == "fp32"
    assert parity.optim.model_copy(update={"policy": "default"}) == plain.optim
    # The reference shows what is stored under transparent pixels.
    assert parity.data == plain.data.model_copy(update={"alpha": "drop"})
    for section in ("model", "objective", "train"):
        assert getattr(parity, section) == getattr(plain, section)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/small").glob("[!_]*.yaml")), ids=lambda p: p.stem)
def test_recipes_for_small_data(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.model.name == path.stem in SIZES and path.stem.endswith(("tiny", "small"))
    assert cfg.data.path is None and cfg.data.val_fraction == 0.1 and cfg.output.dir == f"runs/small/{path.stem}"
    assert (cfg.optim.lr_batch, cfg.train.epochs, cfg.train.log_every) == (None, 200, 5)
    size = SIZES[path.stem] | cfg.model.encoder_kwargs()
    if "window_size" in size:  # no map of the first stages is padded
        assert size["img_size"] // 4 % size["window_size"] == size["img_size"] // 8 % size["window_size"] == 0


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_size_is_accepted_by_name(name: str) -> None:
    assert load_config(None, [f"model.name={name}"]).model.encoder_kwargs() == {"name": name, "in_chans": 3}


def test_encoder_kwargs_build_the_objective() -> None:
    from fastmim.objectives import create_objective

    cfg = load_config(ROOT / "configs/demo.yaml", ["model.depths=[1, 1]", "model.img_size=[64, 96]"])
    kwargs = cfg.model.encoder_kwargs()
    assert "init_from" not in kwargs and None not in kwargs.values()
    assert create_objective("simmim", encoder=kwargs).img_size == (64, 96)


def test_the_objective_may_be_named_in_any_way() -> None:
    names = ["objective.name=simmim", 'objective.name="simmim"', "objective={name: simmim}", "objective={unit: 32}"]
    assert all(load_config(None, [name]).objective == Config().objective for name in names)
    assert list(type(Config().objective).model_fields) == ["name", *Config().objective.arguments()]


def test_the_defaults_are_valid_and_frozen() -> None:
    cfg = Config()
    assert cfg == load_config() and cfg.train.epochs == 100
    with pytest.raises(ValueError, match="frozen"):
        cfg.train.steps = 5  # type: ignore[misc]
    assert Config(train={"steps": 5}).train.epochs is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.img_size=98: not divisible"):
        Config(model={"img_size": 98})  # type: ignore[arg-type]


def test_grey_images_need_no_statistics() -> None:
    cfg = load_config(None, ["model.in_chans=1"])
    assert (cfg.data.mean, cfg.data.std) == ((0.5,), (0.5,))
    assert load_config(None, ["model.in_chans=1", "data.mean=[0.4]"]).data.mean == (0.4,)


def test_dump_keeps_floats_exactly() -> None:
    cfg = load_config(None, [f"optim.lr={math.pi / 1e5!r}", "optim.eps=1e-8"])
    text = dump_config(cfg)
    assert yaml.safe_load(text)["optim"]["lr"] == math.pi / 1e5
    assert yaml.safe_load(text)["optim"]["eps"] == 1e-8


def test_explain_names_every_key() -> None:
    text = explain(Config())
    for section in Config.model_fields:
        for key in type(getattr(Config(), section)).model_fields:
            assert f"\n  {key}:" in text, f"{section}.{key}"
    assert "(integer; default 64)" in text and "expected" not in text
