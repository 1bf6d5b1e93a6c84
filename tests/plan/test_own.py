"""The rule for one's own images: a table of facts and choices, what it promises of all of them, and whole commands."""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastmim import cli
from fastmim.config import load_config
from fastmim.plan import own_command
from fastmim.plan.hardware import GIB
from fastmim.plan.memory import memory
from fastmim.plan.own import choose, model_keys
from fastmim.plan.own_command import name_of, own_config
from fastmim.plan.own_facts import available_memory, gather
from fastmim.plan.own_terms import CORE_FLOPS, LADDER, SEEN, Cost, Facts

RANK = {name: rank for rank, (name, _) in enumerate(LADDER)}
# Of a step of one image at 192 px: parameters, GiB that do not depend on the batch, GiB an image, GFLOPs an image.
COSTS = {
    "vit_tiny": (5.6e6, 0.35, 0.02, 5.4),
    "swinv2_tiny": (30e6, 0.75, 0.045, 21.5),
    "swinv2_small": (51e6, 1.1, 0.08, 41.0),
    "swinv2_base": (89e6, 1.8, 0.11, 70.0),
}
PLACES = tuple(np.linspace(0, 1, 62, False))
LAPTOP = Facts(62, (20, 180, 240, 300, 400), pixels=120_000, places=PLACES, cores=8, memory=8 * GIB)


def cost(keys) -> Cost:
    parameters, fixed, each, flops = COSTS[keys["model.name"]]
    share = (keys["model.img_size"] / 192) ** 2
    return Cost(int(parameters), lambda n: (fixed + n * each * share) * GIB, flops * share * 1e9)


def keys_of(facts: Facts, given=(), **options) -> dict:
    return {one.key: one.value for one in choose(facts, dict(given), cost, **options)}


def with_(facts: Facts = LAPTOP, **changes) -> Facts:
    if "images" in changes:
        changes.setdefault("places", tuple(np.linspace(0, 1, changes["images"], False)))
    return Facts(**{**vars(facts), **changes})


GPU = dict(gpu="H100", gpu_memory=78 * GIB, gpu_flops=798e12, cores=16)


@pytest.mark.parametrize(
    "facts, expected",
    [
        (LAPTOP, {"model.name": "vit_tiny", "model.img_size": 192, "model.patch_size": 16, "objective.unit": 32,
                  "train.micro_batch_size": 16, "data.val_fraction": 0.1, "data.num_workers": 2}),
        # 192 px would see too few
        (with_(cores=2), {"model.img_size": 128, "objective.unit": 16, "model.patch_size": 16}),
        (with_(cores=1), {"model.img_size": 96, "model.patch_size": 8, "objective.unit": 16, "data.num_workers": 1}),
        (with_(short_sides=(32, 32, 32)), {"model.img_size": 32, "model.patch_size": 4, "objective.unit": 8}),
        (with_(short_sides=(20, 20, 20)), {"model.img_size": 32}),  # enlarged, and said
        (with_(short_sides=(100, 100, 100)), {"model.img_size": 96}),
        (with_(images=7), {"data.val_fraction": None, "train.micro_batch_size": 2}),
        (with_(images=1), {"train.micro_batch_size": 1}),
        (with_(grey=True), {"model.in_chans": 1}),
        (with_(transparent=3), {"model.in_chans": 3}),
        (with_(images=5_000), {"model.name": "vit_tiny"}),  # 8 cores are too slow for more
        (with_(images=5_000, cores=16), {"model.name": "swinv2_tiny", "model.img_size": 192}),
        (with_(images=5_000, **GPU), {"model.name": "swinv2_tiny", "train.micro_batch_size": 128,
                                      "data.num_workers": 8}),
        (with_(images=300_000, places=(), **GPU), {"model.name": "swinv2_base", "data.val_fraction": 0.1}),
        (with_(images=5_000, **GPU | {"gpu_memory": 2 * GIB}), {"train.micro_batch_size": 16,
                                                                "train.grad_accum_steps": 8}),
        (with_(images=5_000, cores=16, short_sides=(128,)), {"model.window_size": 8, "model.img_size": 128}),
    ],
)  # fmt: skip
def test_choices(facts: Facts, expected: dict) -> None:
    found = keys_of(facts)
    assert {key: found.get(key) for key in expected} == expected
    assert ("train.val_every" in found) == (found["data.val_fraction"] is not None)


def test_what_is_given_is_never_chosen_and_is_taken_into_account() -> None:
    given = {"model.name": "swinv2_tiny", "model.img_size": 96, "train.steps": 40, "data.val_path": "/held"}
    found = keys_of(LAPTOP, given)
    assert not set(given) & set(found) and "data.val_fraction" not in found and found["train.val_every"] == 4
    assert found["optim.warmup_steps"] == 2 and found["objective.unit"] == 16 and "model.patch_size" not in found
    assert "train.steps" not in keys_of(LAPTOP, {"train.epochs": 3})
    batches = keys_of(LAPTOP, {"train.micro_batch_size": 4})
    assert "train.grad_accum_steps" not in batches and "train.micro_batch_size" not in batches
    assert keys_of(LAPTOP, {"train.grad_accum_steps": 2})["train.micro_batch_size"] == 16


@pytest.mark.parametrize("steps", [1, 2, 19, 40])
def test_the_warm_up_ends_within_the_run(steps: int) -> None:
    """Else the run would warn about what was chosen for it."""
    assert keys_of(LAPTOP, {"train.steps": steps})["optim.warmup_steps"] == {1: 0, 2: 1, 19: 1, 40: 2}[steps]


@pytest.mark.parametrize("size", [32, 40, 100, 144, 176, 192, 224, [48, 72], [96, 200]])
@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_patches_and_masks_divide_a_size_that_is_given(name: str, size: object) -> None:
    found = model_keys(name, 192, {"model.img_size": size})
    patch, unit = found.get("model.patch_size", 4), found["objective.unit"]
    edges = size if isinstance(size, list) else [size]
    assert not any(edge % unit or edge % patch for edge in edges) and unit % patch == 0
    # SimMIM's share or the next below it, and never all of the image.
    assert unit <= max(8, min(edges) / 4) and model_keys(name, 192, {})["objective.unit"] == 32


@pytest.mark.parametrize("name, positions", [("mae", "sincos"), ("ibot", True), ("dino", True), ("simmim", None)])
def test_another_objective_gets_positions_that_it_takes(fixed: Path, name: str, positions: object) -> None:
    """What the objective refuses ends the choice: that it is made is what shows."""
    cfg = own_config("mine", None, [f"objective.name={name}", "model.img_size=32"]).cfg
    assert cfg.model.name == "vit_tiny" and cfg.model.abs_pos_embed == positions
    assert cfg.model.shared_rel_pos_bias is (None if positions is None else False)


@pytest.mark.parametrize("words", [["model.img_size=32"], ["model.img_size=32", "model.name=vit_tiny"],
                                   ["model.img_size=[48, 32]", "model.name=swin_tiny"]])  # fmt: skip
def test_a_small_size_alone_is_enough(fixed: Path, words: list[str]) -> None:
    assert own_config("mine", None, words).cfg.objective.arguments()["unit"] == 8


@pytest.mark.parametrize("word", ["model.img_size=big", "model.img_size=0", "model.img_size=[32, -1]", "model.name=5",
                                  "model.patch_size=x", "model.patch_size=0", "model.img_size=33"])  # fmt: skip
def test_a_size_of_a_wrong_kind_is_named(fixed: Path, word: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(word.partition("=")[0])) as error:
        own_config("mine", None, [word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words, micro", [(["train.global_batch_size=32"], 32), (["train.global_batch_size=7"], 7),
                                          (["train.global_batch_size=30", "train.grad_accum_steps=2"], 15)])
def test_a_global_batch_alone_is_enough(fixed: Path, words: list[str], micro: int) -> None:
    """It need not be a multiple of the micro-batch that a config has by default."""
    assert own_config(str(fixed), None, words).cfg.train.micro_batch_size == micro


def test_every_choice_has_a_reason_of_a_line() -> None:
    for facts in (LAPTOP, with_(images=3), with_(grey=True), with_(cores=1), with_(**GPU)):
        for choice in choose(facts, {}, cost):
            assert choice.reason and "\n" not in choice.reason and len(choice.reason) < 160
    said = {one.key: one.reason for one in choose(with_(short_sides=(20, 180, 240), images=7), {}, cost)}
    assert "3 looked at has a short side of 180 px; smaller, and enlarged: 1" in said["model.img_size"]
    assert "7 images are too few to hold some out" in said["data.val_fraction"]


def test_one_image_is_no_images(fixed: Path) -> None:
    """Of a folder with one, on one core: no reason counts it as several, nor halves it."""
    facts = with_(images=1, cores=1, short_sides=(180,))
    said = {one.key: one.reason for grey in (True, False) for one in choose(with_(facts, grey=grey), {}, cost)}
    assert not re.search(r"\b1 (images|passes|readers|steps|cores)\b|half of 1\b", "; ".join(said.values()))
    assert said["data.val_fraction"] == "1 image is too few to hold some out (from 20 on)"
    assert said["train.micro_batch_size"].startswith("1 image a step; ")
    assert said["train.steps"].endswith(" passes over 1 image")
    assert said["data.num_workers"] == "reader beside the step, on 1 core"
    assert said["model.in_chans"] == "the image looked at is grey"
    assert said["model.img_size"].startswith("the image looked at has a short side of 180 px")
    (fixed.parent / "one").mkdir(), picture(fixed.parent / "one/a.png")
    assert "one: 1 image; 4 cores" in own_config("one").text


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("images", [62, 3_000, 500_000])
def test_more_of_anything_never_gives_a_smaller_encoder(kind: str, images: int) -> None:
    gigabytes, cores = (1.7, 2, 3, 4, 8, 24, 64), (1, 2, 4, 8, 32, 128)
    base = with_(images=min(images, 1000), **GPU if kind == "gpu" else {})
    base = with_(base, images=images, places=())

    def size(**changes) -> tuple[int, int]:
        found = keys_of(with_(base, places=(), **changes))
        return RANK[found["model.name"]], found["model.img_size"]

    name = "gpu_memory" if kind == "gpu" else "memory"
    for fixed in cores:
        sizes = [size(cores=fixed, **{name: most * GIB}) for most in gigabytes]
        assert sizes == sorted(sizes)
    for fixed in gigabytes:
        sizes = [size(cores=most, **{name: fixed * GIB}) for most in cores]
        assert sizes == sorted(sizes)
    ranks = [RANK[keys_of(with_(base, images=n, places=()))["model.name"]] for n in (20, 999, 1000, 10**5, 10**6)]
    assert ranks == sorted(ranks)


def test_nothing_is_chosen_that_does_not_fit() -> None:
    for gigabytes, images in itertools.product((1.5, 1.8, 2.5, 6), (62, 100_000)):
        facts = with_(images=min(images, 1000), memory=gigabytes * GIB, cores=64)
        found = keys_of(facts)
        assert cost(found).memory(found["train.micro_batch_size"]) <= 0.92 * facts.memory - 2 * 0.4 * GIB
    said = r"--images: 0.3\S+ GiB are needed for one image .* and 0.5 GiB are free"
    with pytest.raises(ValueError, match=said) as caught:
        keys_of(with_(memory=0.5 * GIB))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"are needed for one image at a time"):
        keys_of(with_(memory=2 * GIB), {"model.name": "swinv2_base"})


def test_the_length_follows_from_the_speed() -> None:
    """15 minutes of the modelled or measured speed, but no more passes than EPOCHS."""
    facts = with_(images=1000, pixels=0)
    modelled = 8 * CORE_FLOPS / 5.4e9
    assert modelled * 900 > SEEN
    assert keys_of(facts)["train.steps"] == pytest.approx(modelled * 900 / 16, rel=0.1)
    measured = choose(facts, {}, cost, lambda keys, micro: 100.0)
    steps = next(one for one in measured if one.key == "train.steps")
    assert steps.value == 5600 and steps.reason.startswith("about 15 min at 100 images/s (measured in a step here)")
    assert keys_of(with_(images=20), measure=lambda keys, micro: 1e6)["train.steps"] <= 1600 * 20 / 8
    assert keys_of(facts, measure=lambda keys, micro: 0.001)["train.steps"] == 20
    # Large photographs take longer to decode than a step takes: 8 cores, 80 MP/s each.
    assert keys_of(with_(facts, pixels=64_000_000), measure=lambda keys, micro: 1e9)["train.steps"] == 560


# Facts.


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (60, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """22 pictures of several sizes, one of them broken, and a text."""
    for i in range(20):
        picture(tmp_path / f"mine/{i:02d}.png", size=(60 + i, 48))
    picture(tmp_path / "mine/sub/clear.png", "RGBA")
    (tmp_path / "mine/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (tmp_path / "mine/notes.txt").write_text("words")
    return tmp_path / "mine"


def test_facts_of_a_folder(mine: Path) -> None:
    from fastmim.data.source import open_index

    facts = gather(open_index(mine))
    assert (facts.images, facts.short_side, facts.grey, facts.transparent) == (22, 48, False, 1)
    assert len(facts.short_sides) == 21 and len(facts.places) == 22 and list(facts.places) == sorted(facts.places)
    picture(mine.parent / "grey/a.png", "L"), picture(mine.parent / "grey/b.jpg", "L")
    assert gather(open_index(mine.parent / "grey")).grey
    (mine.parent / "bad").mkdir(), (mine.parent / "bad/a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the images looked at can be read"):
        gather(open_index(mine.parent / "bad"))


def test_memory_that_is_free(tmp_path: Path) -> None:
    """The cgroup's limit where it is the smaller one; what it holds as page cache can be taken."""
    for name, text in {
        "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
        "proc/self/cgroup": "0::/user/run\n",
        "sys/fs/cgroup/user/memory.max": "4000000000\n",
        "sys/fs/cgroup/user/memory.current": "3000000000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 500000000\n",
        "sys/fs/cgroup/user/run/memory.max": "max\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == 1.5e9
    (tmp_path / "proc/self/cgroup").unlink()
    assert available_memory(tmp_path) == 8000000 * 1024
    assert available_memory() > 0


# The command.


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch, mine: Path) -> Path:
    """A machine that is the same wherever the tests run, and no step measured; the working directory is above mine."""
    monkeypatch.setattr("fastmim.plan.own_facts.usable_cores", lambda: 4)
    monkeypatch.setattr("fastmim.plan.own_facts.available_memory", lambda: 8.0 * GIB)
    monkeypatch.setattr("fastmim.plan.own_facts._here", lambda: ("", 0.0, 0.0))
    monkeypatch.setattr(own_command, "_measure", lambda given: None)
    monkeypatch.setattr(logging.getLogger("fastmim"), "handlers", [])
    monkeypatch.chdir(mine.parent)
    return mine


def test_what_is_printed_repeats_the_run(fixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = own_config("mine", None, ["train.steps=30"])
    (tmp_path / "printed.yaml").write_text(own.text)
    assert load_config(tmp_path / "printed.yaml") == own.cfg
    assert all(len(line) <= 80 for line in own.text.splitlines()) and "# as given" in own.text
    assert (own.cfg.model.img_size, own.cfg.data.path, own.cfg.output.dir) == (32, "mine", "runs/mine")
    assert cli.main(["plan", "--images", "mine", "train.steps=30"]) == 0
    assert capsys.readouterr().out == own.text  # the planner shares the rule


def test_a_config_wins_and_the_rest_is_chosen(fixed: Path, tmp_path: Path) -> None:
    text = "model: {name: vit_small}\ndata: {path: other, val_path: held}\noptim: {lr: 3e-4}\n"
    (tmp_path / "c.yaml").write_text(text)
    cfg = own_config("mine", str(tmp_path / "c.yaml"), ["train.epochs=2"]).cfg
    assert (cfg.model.name, cfg.model.img_size, cfg.data.path, cfg.train.epochs) == ("vit_small", 32, "mine", 2)
    assert cfg.data.val_path is None and cfg.data.val_fraction  # held out of other's images
    assert (cfg.optim.lr, cfg.optim.lr_batch) == (3e-4, 512)  # the file's rate keeps its unit
    with pytest.raises(ValueError, match="--images mine: data.path=b is given too; keep one of them"):
        own_config("mine", None, ["data.path=b"])


def test_the_planners_memory_is_asked(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmim.plan.command import footprint_of

    monkeypatch.setattr("fastmim.plan.own_facts.available_memory", lambda: 1.4 * GIB)
    cfg = own_config("mine", None, ["model.img_size=192"]).cfg
    cfg = cfg.model_copy(update={"efficiency": cfg.efficiency.model_copy(update={"precision": "fp32"})})
    need = memory(footprint_of(cfg), stage=0, gpus=1, micro_batch=cfg.train.micro_batch_size, grad_accum_steps=2)
    assert need.total <= 1.4 * GIB and cfg.train.micro_batch_size * cfg.train.grad_accum_steps == 8
    monkeypatch.setattr("fastmim.plan.own_facts.available_memory", lambda: 0.2 * GIB)
    with pytest.raises(ValueError, match="0.2 GiB are free on this machine"):
        own_config("mine")


def test_a_gpu_is_planned_for(fixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--images", "mine", "--gpu", "h100-80g"]) == 0
    out = " ".join(capsys.readouterr().out.replace("#", " ").split())
    assert "h100-80g with 78 GiB free" in out and "images/s (modelled)" in out and "measured" not in out


TINY = ["model.name=vit", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.patch_size=8",
        "train.log_every=1", "data.num_workers=0", "output.tensorboard=false", "output.pictures=1"]  # fmt: skip


def test_a_run_of_a_folder_goes_on_and_knows_its_images(fixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain = ["pretrain", "--images", "mine", *TINY]
    assert cli.main([*pretrain, "train.steps=2"]) == 0
    out = capsys.readouterr().out
    chosen = out[: re.search(r"^\d\d:\d\d:\d\d fastmim ", out, re.MULTILINE).start()]
    assert load_config("runs/mine/config.yaml").model_dump() == load_tree(chosen)
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]["val_loss"] > 0
    assert "broken.jpg" in Path("runs/mine/bad_files.json").read_text()
    # Another measurement, another free memory: the run that is there decides.
    fixed.joinpath("sub/clear.png").unlink()
    assert cli.main([*pretrain, "train.steps=3", "optim.warmup_steps=1", "train.resume_changes=allow"]) == 0
    out, err = capsys.readouterr()
    assert "going on with runs/mine/config.yaml" in err and "step 3/3" in out and "step 1/" not in out
    # So it does for a branch, as the message about another length offers it: no model is chosen anew.
    for start in ("runs/mine", "runs/mine/checkpoints/step-00000003"):
        branch = ["train.steps=5", f"train.branch_from={start}", f"output.dir=runs/of-{Path(start).name}"]
        cfg = own_config("mine", None, branch).cfg
        assert (cfg.model.depth, cfg.optim.warmup_steps, cfg.train.steps) == (1, 1, 5)
    assert cli.main(["pretrain", "--images", "mine", *branch]) == 0
    out, err = capsys.readouterr()
    assert "a branch of runs/mine/checkpoints/step-00000003" in err and "step 5/5" in out and "step 3/" not in out
    assert cli.main(["pretrain", "--images", "mine", *branch[:2]]) == 2
    assert "output.dir=runs/mine: it is the run to branch from" in capsys.readouterr().err
    (fixed.parent / "b").mkdir()
    fixed.rename(fixed.parent / "b/mine")
    assert cli.main(["pretrain", "--images", "b/mine"]) == 2
    assert "output.dir=runs/mine: holds a run on mine, not on b/mine; give another" in capsys.readouterr().err


def test_a_run_begins_where_nobody_reads_what_was_chosen(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["pretrain", "--images", "mine", *TINY, "train.steps=1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "standard output cannot be written" in line]
    assert len(said) == 1 and said[0].endswith("(no space left on device): the run goes on without it")
    assert Path("runs/mine/encoder.safetensors").is_file()


def load_tree(text: str) -> dict:
    path = Path("printed.yaml")
    path.write_text(text)
    return load_config(path).model_dump()


@pytest.mark.parametrize(
    "argv, status, said",
    [
        (["pretrain", "train.steps=2"], 2, "required: CONFIG, or --images DIR"),
        (["plan", "--images", "60"], 2, "required: CONFIG, or --images DIR"),
        (["pretrain", "--images", "nowhere"], 2, "--images=nowhere: no such folder"),
        (["pretrain", "mine"], 2, "mine: is a directory; to train on its images: fastmim pretrain --images mine\n"),
        (["pretrain", "mine", "train.steps=2"], 2, "to train on its images: fastmim pretrain --images mine\n"),
        (["plan", "mine"], 2, "mine: is a directory; to plan for its images: fastmim plan --images mine\n"),
        (["plan", "my run", "--images", "60"], 2, "for the config of its run: fastmim plan 'my run/config.yaml'\n"),
        (["finetune", "mine"], 2, "error: mine: is a directory\n"),
        (["plan", "--images", "mine", "--json"], 2, "--json: not with a folder for --images"),
        (["pretrain", "--images", "mine", "model.nam=x"], 2, "model.nam: unknown key; did you mean 'name'"),
    ],
)
def test_wrong_requests(
    argv: list[str], status: int, said: str, fixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my run").mkdir(), Path("my run/config.yaml").write_text("")
    try:
        found = cli.main(argv)
    except SystemExit as stop:
        found = stop.code
    assert found == status and said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "plan"])
@pytest.mark.parametrize("images, said", [("nowhere", "no such folder"), ("a/x.tar", "no such shard"),
                                          ("mine/notes.txt", "is a file, not a folder")])  # fmt: skip
def test_images_that_are_not_there_are_all_that_is_said(
    command: str, images: str, said: str, fixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No word about held-out images that would have been left out for them."""
    Path("c.yaml").write_text("data: {path: other, val_path: held}\n")
    assert cli.main([command, "c.yaml", "--images", images]) == 2
    assert f"error: --images={images}: {said}" in (errors := capsys.readouterr().err) and "warning" not in errors


@pytest.mark.parametrize(
    "images, name", [("a/b", "b"), ("a/my photos/", "my-photos"), ("a/s-{00..01}.tar", "a"), ("/", "images")]
)
def test_names_of_runs(images: str, name: str) -> None:
    assert name_of(images) == name


def test_yaml_says_the_same_to_everybody(fixed: Path) -> None:
    """A plain YAML reader finds the same sections and keys."""
    own = own_config("mine")
    assert {name: set(keys) for name, keys in yaml.safe_load(own.text).items()} == {
        name: set(keys) for name, keys in own.tree.items()
    }
