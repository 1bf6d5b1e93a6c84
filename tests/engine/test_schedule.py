"""Learning rates against the published formulas (written out again here) and against timm's scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler

from fastmim.objectives.schedule import Schedule, scale_lr

STEPS_PER_EPOCH = 7  # odd and small: 100 and 800 epochs, every step compared
SCALE = 2048 / 512


def timm_values(scheduler, steps):
    """What an optimiser sees that is updated before its scheduler, as in the references."""
    values = []
    for step in range(steps):
        values.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step_update(step)
    return values


def dummy_optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def swin_base_100(**changes):
    total = 100 * STEPS_PER_EPOCH
    rates = {"base_lr": 2e-4 * SCALE, "warmup_lr": 1e-6 * SCALE, "min_lr": 1e-5 * SCALE}
    return Schedule(name="cosine", total_steps=total, warmup_steps=10 * STEPS_PER_EPOCH, **rates, **changes)


def test_rates_scale_with_the_global_batch():
    assert scale_lr(2e-4, 2048, 512) == pytest.approx(8e-4)
    assert scale_lr(1.5e-3, 2048, None) == scale_lr(1.5e-3, 2048, 0) == 1.5e-3


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("after_warmup", [False, True])
def test_swin_base_100_epochs(after_warmup, lag):
    schedule = swin_base_100(cosine_after_warmup=after_warmup, lag=lag)
    total, warmup = 700, 70
    for step in range(total):
        t = max(step - 1, 0) if lag else step
        if t < warmup:
            expected = 4e-6 + (8e-4 - 4e-6) * t / warmup
        else:
            part = (t - warmup) / (total - warmup) if after_warmup else t / total
            expected = 4e-5 + (8e-4 - 4e-5) * (1 + math.cos(math.pi * part)) / 2
        assert schedule(step) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("after_warmup", [False, True])
def test_cosine_equals_timms(after_warmup):
    schedule = swin_base_100(cosine_after_warmup=after_warmup, lag=True)
    scheduler = CosineLRScheduler(
        dummy_optimizer(8e-4),
        t_initial=630 if after_warmup else 700,
        lr_min=4e-5,
        warmup_lr_init=4e-6,
        warmup_t=70,
        cycle_limit=1,
        t_in_epochs=False,
        warmup_prefix=after_warmup,
    )
    # 20 steps beyond the end: both stay at the minimum
    assert [schedule(step) for step in range(720)] == pytest.approx(timm_values(scheduler, 720), rel=1e-12)


@pytest.mark.parametrize("lag", [False, True])
def test_800_epochs_multistep(lag):
    schedule = Schedule(
        name="multistep",
        base_lr=1e-4 * SCALE,
        warmup_lr=5e-7 * SCALE,
        total_steps=800 * STEPS_PER_EPOCH,
        warmup_steps=10 * STEPS_PER_EPOCH,
        milestones=[700 * STEPS_PER_EPOCH],
        lag=lag,
    )
    for step in range(5600):
        t = max(step - 1, 0) if lag else step
        expected = 2e-6 + (4e-4 - 2e-6) * t / 70 if t < 70 else 4e-4 if t < 4900 else 4e-5
        assert schedule(step) == pytest.approx(expected, rel=1e-12), step


def test_step_decay_equals_timms():
    schedule = Schedule(
        name="step", base_lr=1e-3, warmup_lr=1e-5, total_steps=50, warmup_steps=7, decay_steps=12
    )
    scheduler = StepLRScheduler(
        dummy_optimizer(1e-3),
        decay_t=12,
        decay_rate=0.1,
        warmup_t=7,
        warmup_lr_init=1e-5,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    assert [schedule(max(k - 1, 0)) for k in range(50)] == pytest.approx(
        timm_values(scheduler, 50), rel=1e-12
    )


def test_constant_and_no_warmup():
    schedule = Schedule(name="constant", base_lr=3e-4, total_steps=5)
    assert [schedule(step) for step in range(7)] == [3e-4] * 7
    cosine = Schedule(name="cosine", base_lr=1.0, total_steps=4)
    assert [cosine(step) for step in range(5)] == pytest.approx([1, 0.8535533905932737, 0.5, 0.1464466, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cosin"}, "optim.schedule='cosin'"),
        ({"name": "step"}, "optim.decay_epochs"),
        ({"name": "multistep"}, r"optim.milestones=\[\]: .* at least one epoch"),
        ({"name": "multistep", "milestones": [5, 3]}, r"optim.milestones=\[5, 3\]: must rise; use \[3, 5\]"),
        ({"name": "multistep", "milestones": [3], "warmup_steps": 4}, "inside the warm-up"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(base_lr=1.0, total_steps=10, **changes)
