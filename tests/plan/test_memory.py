"""States against the published arithmetic, and the fullest point of a step against a hand-made trace."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from fastmim.plan.hardware import GIB, GPUS, Gpu, find_gpu, in_precision
from fastmim.plan.launch import Launch, bound
from fastmim.plan.memory import LIBRARIES, Buckets, Memory, memory, states
from fastmim.plan.recommend import Model, Option, Setting, best, micro_batches, options, smallest_machine
from fastmim.plan.roofline import StepTime, step_time
from fastmim.plan.trace import Footprint, Trace
from fastmim_kernels.common.roofs import HONEST

PUBLISHED_LAYOUT = (2, 2, 12)  # bf16 weight and gradient, float32 master, m and v: 16 bytes
# SwinV2-G and -H with their pixel heads
G, H = 3_010_430_176, 663_900_000


@pytest.mark.parametrize(
    "parameters, gpus, stage, published",
    [
        (G, 1, 0, 48.2), (G, 1, 1, 48.2), (G, 8, 1, 16.6), (G, 8, 2, 11.3), (G, 8, 3, 6.0),
        (G, 64, 1, 12.6), (G, 64, 2, 6.7), (G, 64, 3, 0.75),
        (H, 1, 0, 10.6), (H, 8, 1, 3.7), (H, 8, 2, 2.5), (H, 8, 3, 1.3),
    ],
)  # fmt: skip
def test_states_are_the_published_ones(parameters: int, gpus: int, stage: int, published: float) -> None:
    found = states(parameters, stage, gpus, layout=PUBLISHED_LAYOUT).total / 1e9
    assert found == pytest.approx(published, abs=0.06)


def test_states_that_the_recipe_of_the_giant_states() -> None:
    text = (Path(__file__).resolve().parents[2] / "configs/simmim/swinv2_giant.yaml").read_text(encoding="utf-8")
    found = states(G, 2, 8)
    assert found.total == 2 * G + 4 * G / 8 + (4 + 4 + 4) * G / 8
    stated = [found.weights, found.gradients, found.optimizer, found.total, states(G, 0, 1).total]
    assert [f"{size / 1e9:.1f} GB" in text for size in stated] == [True] * 5


def test_what_each_stage_divides() -> None:
    parameters, gpus = 800, 8
    found = {stage: states(parameters, stage, gpus) for stage in (1, 2, 3)}
    assert [found[s].weights for s in (1, 2, 3)] == [1600, 1600, 200]
    assert [found[s].gradients for s in (1, 2, 3)] == [3200, 400, 400]
    assert {found[s].optimizer for s in (1, 2, 3)} == {1200}


def test_offload_moves_states_to_the_host() -> None:
    moved = states(800, 2, 8, "optimizer")
    assert (moved.weights, moved.gradients, moved.optimizer, moved.host) == (1600, 0, 0, 1200 + 400)
    assert states(800, 3, 8, "all").total == 0
    assert states(800, 3, 8, "param").host == 200
    # Of optimiser states and gradients on a drive, weights in RAM, and the other way round.
    mixed = states(800, 3, 8, "all", nvme="optimizer")
    assert (mixed.host, mixed.drive) == (200, 1200 + 400)
    assert states(800, 3, 8, "all", nvme="all").host == 0
    with pytest.raises(ValueError, match="efficiency.offload_param: needs efficiency.zero_stage=3, not 2"):
        states(800, 2, 8, "param")


MODULES = 7


def footprint(parameters: int = 1000, moved: int = 0, flops: int = 1000, modules: int = MODULES) -> Footprint:
    """Three points: 10 an image at the end of forward; in backward 4 an image, twice, while gradients grow."""

    def traced(batch: int) -> Trace:
        phases = ("forward", "backward", "backward")
        launches = tuple(Launch(phase, "mm", "", 100 * batch, flops * batch, "") for phase in phases)
        others = (10 * batch + 7, 4 * batch, 4 * batch)
        return Trace(batch, parameters, launches, others, (0, 3000, 4000), 10 * batch, 250, moved * batch, modules)

    return Footprint(traced(2), traced(4))


def test_gradients_grow_while_activations_shrink() -> None:
    small, large = footprint().peak(10, accumulating=False), footprint().peak(1000, accumulating=False)
    assert (small.gradients, small.activations, small.workspace) == (4000, 40, 0)
    assert (large.gradients, large.activations, large.workspace) == (0, 10000, 7)
    # With accumulation all of them are there already, and only the newest is extra.
    again = footprint().peak(10, accumulating=True)
    assert (again.gradients, again.activations, again.workspace) == (0, 40, 3000)


def test_components_of_a_step() -> None:
    one = memory(footprint(), stage=0, gpus=1, micro_batch=1000, grad_accum_steps=2)
    assert (one.weights, one.gradients, one.optimizer) == (4000, 4000, 8000)
    assert (one.activations, one.workspace - LIBRARIES, one.buckets) == (10000, 7, 0)
    assert one.total == sum((4000, 4000, 8000, 10000, 7, LIBRARIES))
    three = memory(footprint(), stage=3, gpus=4, micro_batch=1000, grad_accum_steps=2, buckets=Buckets(100, 10))
    assert (three.weights, three.gradients, three.optimizer) == (500, 1000, 3000)
    assert three.buckets == 4 * 100 + 2 * (10 + 2 * 250)


def test_frozen_weights_are_whole_on_every_rank() -> None:
    plain, held = footprint(), footprint()
    held.frozen = 10**6
    for stage, gpus in ((0, 1), (2, 4), (3, 4)):
        run = dict(stage=stage, gpus=gpus, micro_batch=50, grad_accum_steps=2)
        assert memory(held, **run).weights - memory(plain, **run).weights == 10**6


def test_offloaded_block_inputs_are_in_host_ram_and_cross_pcie_twice() -> None:
    moved = footprint(moved=10**6)
    need = memory(moved, stage=2, gpus=4, micro_batch=50, grad_accum_steps=3, offload="optimizer")
    assert need.host == 50 * 10**6 + (12 + 4) * 1000 / 4
    run = dict(stage=0, gpus=1, micro_batch=50, grad_accum_steps=3)
    times = [step_time(found, GPUS["a100-40g"], **run).total for found in (footprint(), moved)]
    assert times[1] - times[0] == pytest.approx(3 * 2 * 50 * 10**6 / 25e9)


def test_the_update_can_be_the_fullest_point() -> None:
    found = memory(footprint(10**6), stage=1, gpus=2, micro_batch=1, grad_accum_steps=2)
    assert found.activations == 0 and found.workspace - LIBRARIES == 4 * 10**6 / 2


SLOW = find_gpu("name=x,memory=1,tflops=1e-9,bandwidth=1e-6,link=1e-6")
"""1000 FLOP/s, 1000 B/s."""


def test_time_of_a_step_by_hand() -> None:
    found = step_time(footprint(), SLOW, stage=0, gpus=2, micro_batch=1, grad_accum_steps=3)
    # three launches of 1000 FLOPs, one second each at the peak and 1 / 0.85 at a library's rate; the update moves 40
    # bytes a parameter at 90 % of the bandwidth; the all-reduce of 4000 bytes takes 4 s at 80 % of the link, and is
    # one message, which starts when backward ends.
    near = partial(pytest.approx, rel=1e-3)
    assert (found.compute, found.update, found.exposed) == near((9 / 0.85, 40 / 0.9, 4 / 0.8))
    assert found.pure == near(9 + 40 + 4 / 0.8)
    assert found.bound == near({"bytes": 0, "FLOPs": 9 / 0.85, "issue": 0, "launches": 9 * 3e-6, "host": 0})
    # Gradients, 2000 bytes of which half go out, and as many of weights, for each of three micro-batches at stage 2.
    for stage, reductions in ((1, 1), (2, 3)):
        cut = step_time(footprint(), SLOW, stage=stage, gpus=2, micro_batch=1, grad_accum_steps=3)
        assert cut.exposed == near((reductions + 1) * 1 / 0.8)
    # In buckets of a tenth all but the last is hidden by two launches of backward.
    cut = step_time(footprint(), SLOW, stage=1, gpus=2, micro_batch=1, grad_accum_steps=3, bucket=100)
    assert cut.exposed == near(0.1 / 0.8 + 1 / 0.8)
    # Stage 3: 1.25 s of weights in forward, beside 1.18 s, and of weights and gradients in backward, beside 2.35 s.
    three = step_time(footprint(), SLOW, stage=3, gpus=2, micro_batch=1, grad_accum_steps=3)
    assert three.exposed == near(3 * (0.3 * 1.25 + 0.3 * 2.5))
    assert step_time(footprint(), SLOW, stage=3, gpus=1, micro_batch=1, grad_accum_steps=3).exposed == 0


def test_a_small_model_waits_for_its_host() -> None:
    """No roof of bytes or FLOPs holds where a launch has next to nothing to do."""
    found = step_time(footprint(), GPUS["h100-80g"], stage=0, gpus=1, micro_batch=1, grad_accum_steps=2)
    assert found.compute == pytest.approx(2 * 3 * 30e-6, rel=1e-3)
    assert found.bound["host"] == pytest.approx(2 * 3 * 27e-6, rel=1e-3)
    # ZeRO-3's hooks around every module come on top, three times where blocks are recomputed.
    for gathers in (2, 3):
        spread = step_time(
            footprint(), GPUS["h100-80g"], stage=3, gpus=8, micro_batch=1, grad_accum_steps=2, gathers=gathers
        )
        assert spread.compute - found.compute == pytest.approx(2 * gathers * MODULES * 200e-6, rel=1e-3)


def test_a_kernel_has_three_roofs() -> None:
    """Its bytes and FLOPs at public efficiency, a library's or Triton's, and what its warps issue."""
    gpu = Gpu("made up", flops=100.0, bandwidth=10.0, slots=50.0)
    kernel = Launch("forward", "mlp/triton.kernel", "", bytes=18, flops=130, shapes="", issued=150)
    assert kernel.roofs(gpu) == {"bytes": 1.8, "FLOPs": 1.3, "issue": 3}
    assert kernel.roofs(gpu, HONEST) == pytest.approx({"bytes": 2, "FLOPs": 2, "issue": 3})
    assert kernel.bound(gpu) == ("issue", 3)
    assert kernel.seconds(gpu) == 1.8
    product = dataclasses.replace(kernel, op="mm", issued=0, flops=170)
    assert product.roofs(gpu, HONEST) == pytest.approx({"bytes": 2, "FLOPs": 2, "issue": 0})
    # A GPU of which nobody said how much it issues has two roofs.
    assert kernel.roofs(dataclasses.replace(gpu, slots=0.0))["issue"] == 0
    assert sum(bound([kernel, product], gpu).values()) == pytest.approx(5)


def model() -> Model:
    return Model(lambda policy, low: footprint(10**9), ("none",))


def test_a_higher_stage_must_gain_more_than_it_risks() -> None:
    def timed(stage: int, seconds: float) -> Option:
        time = StepTime(seconds, 0.0, 0.0, seconds, {})
        return Option(Setting(stage, "none", 8, 1, 8), Memory(1, 1, 1, 1, 1, 1), time, 10.0, 0.5)

    assert best([timed(3, 1.0), timed(1, 1.02), timed(0, 1.04)]).setting.stage == 0
    assert best([timed(3, 1.0), timed(1, 1.02), timed(0, 1.10)]).setting.stage == 1
    assert best([timed(3, 1.0), timed(1, 1.12)]).setting.stage == 3


def test_nothing_is_computed_again_where_that_gains_nothing() -> None:
    def option(policy: str, seconds: float, saved: float, micro_batch: int = 8) -> Option:
        setting = Setting(0, policy, micro_batch, 64 // micro_batch, 1)
        return Option(setting, Memory(1, 1, 1, saved, 1, 1), StepTime(seconds, 0.0, 0.0, seconds, {}), 20.0, 0.5)

    assert best([option("full", 1.0, 1), option("none", 1.005, 6)]).setting.policy == "none"
    assert best([option("full", 1.0, 1), option("fc1", 1.0, 3), option("none", 1.1, 6)]).setting.policy == "fc1"
    assert best([option("none", 1.0, 6, 16), option("none", 1.0, 3, 8)]).setting.micro_batch == 8


@pytest.mark.parametrize("name", ["a100-80g", "h100-80g", "b200-180g"])
def test_stage_3_is_for_models_that_need_it(name: str) -> None:
    """On 8 GPUs the published runs of it are more than twice as slow as runs that hold all weights."""

    def planned(parameters: int) -> list[Option]:
        work = footprint(parameters, flops=2 * 200 * parameters, modules=220)  # 200 tokens an image, as V2-B
        return options(Model(lambda policy, low: work, ("none",)), GPUS[name], 8, 1024)

    found = planned(10**8)
    assert best(found).setting.stage == 0
    speed = {option.setting.stage: option.images_per_sec for option in found}
    assert speed[3] < min(speed[0], speed[1], speed[2])
    if name != "b200-180g":
        assert {option.setting.stage for option in planned(20 * 10**9) if option.fits} == {3}


def test_recommended_micro_batches_make_the_global_batch() -> None:
    assert micro_batches(48, 4) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(ValueError, match="--gpus 5: does not divide the global batch of 48"):
        micro_batches(48, 5)
    for option in options(model(), GPUS["a100-40g"], 4, 48):
        s = option.setting
        assert s.micro_batch * s.grad_accum_steps * s.gpus == 48
        assert option.fits == (option.memory.total <= 39 * GIB * 0.92)


def test_the_smallest_machine_is_the_first_that_fits() -> None:
    gpu, option = smallest_machine(model(), None, 64) or pytest.fail("none")
    assert option.fits
    # 16 GB of states do not fit into a 24 GB card beside anything smaller than it among those known.
    smaller = [g for g in GPUS.values() if g.bf16 and g.memory < gpu.memory * option.setting.gpus]
    assert not any(o.fits for g in smaller for o in options(model(), g, 1, 64))
    assert smallest_machine(model(), Setting(0, "none", 64, 1, 1), 64, known={}) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("h1000", "unknown; the nearest is h100-80g"),
        ("a100", "more than one; use a100-40g or a100-80g"),
        ("name=x,memory=48,tflops=1,bandwidth=9", "link is missing"),
        ("name=x,memory=-1,tflops=1,bandwidth=9,link=3", "memory=-1 must be a positive number (GiB)"),
        ("name=x,ram=48", "unknown key 'ram'"),
    ],
)  # fmt: skip
def test_unknown_gpus_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        find_gpu(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_known_gpus() -> None:
    assert find_gpu("H100") is GPUS["h100-80g"] and find_gpu("rtx4090") is GPUS["rtx4090-24g"]
    assert {name.split("-")[0] for name in GPUS} == {"v100", "a100", "h100", "h200", "b200", "rtx4090"}
    assert all(gpu.source and gpu.memory > 0 and gpu.link > 0 and gpu.network > 0 for gpu in GPUS.values())
    assert set(GPUS) - set(in_precision("bf16")) == {"v100-16g", "v100-32g"} and set(in_precision("fp16")) == set(GPUS)
    mine = find_gpu("name=mine,memory=48,tflops=180,bandwidth=900,link=50")
    assert (mine.name, mine.memory, mine.flops, mine.bandwidth, mine.link) == ("mine", 48, 180e12, 900e9, 50e9)
