"""What an objective may do once a step, and the scalars that it returns beside its loss, on a toy of one weight."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastmim.data import Batch
from fastmim.engine.distributed import World
from fastmim.engine.local import LocalEngine
from fastmim.engine.loop import train_step
from fastmim.engine.nonfinite import NonFiniteError
from fastmim.engine.zero import engine as zero_engine


class Toy(nn.Module):
    """Loss and scalars follow from the images and the mask; notes every call that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[tuple] = []

    def set_step(self, step, total, steps_per_epoch):
        self.calls.append(("set_step", step, total, steps_per_epoch, self.weight.item()))

    def set_micro_batch(self, index, count):
        self.calls.append(("set_micro_batch", index, count))

    def random_mask(self, sample_ids, seed=0, epoch=0):
        return sample_ids * 100 + seed * 10 + epoch

    def forward(self, images, mask):
        loss = (self.weight * images).mean()
        shown = {"mask": mask.double().mean(), "entropy": loss.detach() * 2, "rows": images.flatten()}
        return {"loss": loss, **shown}

    def after_step(self):
        self.calls.append(("after_step", self.weight.item()))


def toy_engine(**options) -> LocalEngine:
    objective = Toy()
    return LocalEngine(objective, torch.optim.SGD(objective.parameters(), lr=0.0), **options)


def batches(*values):
    for i, value in enumerate(values):
        yield i, Batch(torch.full((1, 1, 2, 2), float(value)), torch.tensor([i]))


def test_a_step_is_set_once_and_followed_once():
    engine = toy_engine(grad_accum_steps=2)
    found = batches(1.0, 3.0, 5.0, 7.0)
    for lr in (0.5, 0.25):
        train_step(engine, found, lr=lr, seed=3, total=9, steps_per_epoch=4)
    # The gradient is the mean of the images over two micro-batches: 2, then 6.
    assert engine.objective.calls == [
        ("set_step", 0, 9, 4, 1.0), ("set_micro_batch", 0, 2), ("set_micro_batch", 1, 2), ("after_step", 0.0),
        ("set_step", 1, 9, 4, 0.0), ("set_micro_batch", 0, 2), ("set_micro_batch", 1, 2), ("after_step", -1.5),
    ]  # fmt: skip
    read = engine.read()
    assert set(read) == {"loss", "mask", "entropy", "grad_norm"}  # not "rows": no scalar
    assert read["loss"] == (1 + 3 + 0 + 0) / 4 and read["entropy"] == 2 * read["loss"] and read["grad_norm"] == 6
    assert read["mask"] == sum(100 * i + 30 + i for i in range(4)) / 4
    assert engine.read() == {"loss": 0, "mask": 0, "entropy": 0, "grad_norm": 6}


def test_phases_are_those_of_every_micro_batch():
    seen = []

    class Mark:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(self.name)

        def __exit__(self, *error): ...

    train_step(toy_engine(grad_accum_steps=2), batches(1, 1), lr=0, seed=0, total=1, steps_per_epoch=1, phase=Mark)
    assert seen == 2 * ["data", "forward", "backward", "update"]


def test_a_bad_update_is_not_followed():
    engine = toy_engine(check_every_step=True)
    with pytest.raises(NonFiniteError):
        train_step(engine, batches(math.inf), lr=0.1, seed=0, total=1, steps_per_epoch=1)
    assert not any(call[0] == "after_step" for call in engine.objective.calls)


def test_an_overflow_of_fp16_is_not_followed(monkeypatch):
    """DeepSpeed's engine is a stand-in whose second update overflows; a CPU has no fp16."""
    optimizer = SimpleNamespace(overflow=False, optimizer=SimpleNamespace(param_groups=[]))
    inner = SimpleNamespace(step=lambda: None, get_global_grad_norm=lambda: 1.0)
    fake = SimpleNamespace(initialize=lambda **given: (inner, optimizer, None, None))
    monkeypatch.setattr(zero_engine, "import_deepspeed", lambda device: fake)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("meta"))
    config = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}
    engine = zero_engine.ZeroEngine(Toy(), optimizer.optimizer, config=config, precision="fp16", world=world)
    for overflow in (False, True, False):
        optimizer.overflow = overflow
        engine.step()
        engine.step()
    assert engine.steps == 3 and len(engine.objective.calls) == 2


def test_scalars_of_an_interrupted_interval_go_on():
    whole, first, second = toy_engine(), toy_engine(), toy_engine()
    lengths = dict(lr=0.0, seed=0, total=3, steps_per_epoch=3)
    found, again = list(batches(1, 2, 6)), iter(batches(1, 2, 6))
    for batch in found:
        train_step(whole, iter([batch]), **lengths)
    train_step(first, again, **lengths)
    state = first.state()
    assert set(state) == {"step", "loss_sum", "loss_count", "extra_sums"}
    second.load_state(state)
    for _ in range(2):
        train_step(second, again, **lengths)
    assert second.read() == whole.read() and second.steps == 3


def test_what_an_unfinished_step_has_changed_is_put_back():
    """Losses, scalars, generators, and the buffers that forward adds to; the step can be taken again as it was."""

    class Summing(Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, images, mask):
            self.seen.add_(images.mean() + torch.rand(()))
            return super().forward(images, mask)

    objective = Summing()
    engine = LocalEngine(objective, torch.optim.SGD(objective.parameters(), lr=0.0), grad_accum_steps=3)
    lengths = dict(lr=0.5, seed=0, total=2, steps_per_epoch=2)
    torch.manual_seed(7)
    assert train_step(engine, batches(1, 2, 3), **lengths)
    state, seen, weight = engine.state(), objective.seen.clone(), objective.weight.clone()
    asked = iter([False, True])
    assert not train_step(engine, batches(4, 5, 6), stops=lambda: next(asked), **lengths)
    assert objective.seen != seen
    draw = torch.get_rng_state()
    engine.discard_step()
    assert engine.state() == state and engine.steps == 1 and torch.equal(objective.seen, seen)
    assert not torch.equal(torch.get_rng_state(), draw)
    assert train_step(engine, batches(4, 5, 6), **lengths)
    assert objective.weight.item() == pytest.approx(weight.item() - 0.5 * 5)
