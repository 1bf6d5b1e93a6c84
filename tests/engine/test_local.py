"""The engine against plain PyTorch loops, and its guard against non-finite numbers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.engine.local import LocalEngine
from fastmim.engine.nonfinite import NonFiniteError, find_nonfinite
from fastmim.engine.optim import build_optimizer, param_groups


def batches(objective, count, size=4):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        yield images, objective.random_mask(torch.arange(size) + size * i)


def make_engine(objective, *, fused="auto", **options):
    optimizer = build_optimizer("adamw", param_groups(objective, 0.05), 1e-2, fused=fused)
    return LocalEngine(objective, optimizer, **options)


def run(engine, data):
    losses = []
    for images, mask in data:
        loss = engine(images, mask)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("clip", [0.5, 100.0], ids=["clipped", "within the limit"])
def test_updates_equal_a_plain_loop_bit_for_bit(objective, clip):
    plain = copy.deepcopy(objective)
    optimizer = torch.optim.AdamW(param_groups(plain, 0.05), lr=1e-2, fused=True)
    engine = make_engine(objective, clip_grad=clip)
    data = list(batches(objective, 4))
    losses = run(engine, data)
    for (images, mask), expected in zip(data, losses, strict=True):
        loss = plain(images, mask)["loss"]
        assert loss.item() == expected
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    read = engine.read()
    assert read["loss"] == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert read["grad_norm"] == norm.item()
    assert equal_weights(plain, objective)


def test_accumulation_equals_a_large_batch(objective):
    whole = copy.deepcopy(objective)
    data = list(batches(objective, 6))
    run(make_engine(objective, grad_accum_steps=3), data)
    large = make_engine(whole)
    joined = [tuple(torch.cat(parts) for parts in zip(*data[i : i + 3], strict=True)) for i in (0, 3)]
    run(large, joined)
    assert large.steps == 2
    for ours, theirs in zip(objective.parameters(), whole.parameters(), strict=True):
        # Adam divides by the gradient's size: where that is rounding noise, so is the direction (lr = 1e-2)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "options", [{"fused": False}, {"check_every_step": False}, {"check_every_step": True}]
)
def test_efficiency_settings_do_not_change_the_loss(objective, options):
    other = copy.deepcopy(objective)
    data = list(batches(objective, 5))
    losses = run(make_engine(objective), data)
    assert run(make_engine(other, **options), data) == pytest.approx(losses, rel=1e-5)


def test_bf16_is_near_fp32_and_leaves_weights_fp32(objective):
    other = copy.deepcopy(objective)
    data = list(batches(objective, 3))
    losses = run(make_engine(objective), data)
    assert run(make_engine(other, precision="bf16"), data) == pytest.approx(losses, rel=2e-2)
    assert {param.dtype for param in other.parameters()} == {torch.float32}


def test_compiled_forward_gives_the_same_loss(objective, monkeypatch):
    # Captured whole, but run without the minutes that the C++ back end takes on a CPU.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    other = copy.deepcopy(objective)
    data = list(batches(objective, 2))
    losses = run(make_engine(objective), data)
    assert run(make_engine(other, compile=True), data) == pytest.approx(losses, rel=1e-4)


def test_unknown_precision(objective):
    with pytest.raises(ValueError, match="efficiency.precision='fp16'"):
        make_engine(objective, precision="fp16")


class CountSyncs(TorchDispatchMode):
    """Counts operations that wait for the device: reading a scalar, and copies to the CPU from elsewhere."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_no_host_sync_between_log_steps(objective, monkeypatch):
    # As on a GPU: the every-step check of the CPU is off.
    engine = make_engine(objective, clip_grad=1.0, check_every_step=False)
    data = list(batches(objective, 6))
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or plain(self))
    for number in range(2):
        with CountSyncs() as syncs:
            for images, mask in data[3 * number : 3 * number + 3]:
                engine.set_lr(1e-3 * number)
                engine.backward(engine(images, mask)["loss"])
                engine.step()
            assert syncs.count == 0
            assert len(reads) == number
            engine.read()
            assert syncs.count == 0
            assert len(reads) == number + 1  # one read of one packed tensor


@pytest.mark.cuda
def test_no_host_sync_on_a_gpu(objective):
    engine = make_engine(objective.cuda(), clip_grad=1.0)
    data = [(images.cuda(), mask.cuda()) for images, mask in batches(objective, 4)]
    run(engine, data[:1])  # lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, mask in data[1:]:
            engine.backward(engine(images, mask)["loss"])
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.read()["grad_norm"] > 0


class Poison(torch.autograd.Function):
    """Identity whose backward pass gives NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def poison_output(objective, value):
    block = objective.encoder.layers[0].blocks[1]
    block.mlp.register_forward_hook(lambda module, args, out: out * value)
    return "encoder.layers.0.blocks.1"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("check", [True, False])
def test_a_bad_step_changes_nothing_and_is_remembered(objective, value, fused, check):
    engine = make_engine(objective, fused=fused, check_every_step=check)
    good = list(batches(objective, 3))
    bad = (torch.full((4, 3, 32, 32), value), good[0][1])
    run(engine, good[:2])
    kept = copy.deepcopy(objective)
    moments = copy.deepcopy(engine.optimizer.state_dict()["state"])
    with pytest.raises(NonFiniteError) as error:
        # the steps after it are good, and are not applied either: the weights stay those of the bad step
        run(engine, [bad, good[2], good[2]])
        engine.read()
    assert error.value.step == 3
    assert equal_weights(objective, kept)
    for slot, state in engine.optimizer.state_dict()["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, moments[slot][key]), key


def test_an_infinite_loss_with_finite_gradients_is_a_bad_step(objective):
    """L1 against an infinite target: the loss is infinite, its gradient is a sign."""
    param = torch.nn.Parameter(torch.zeros(2))
    module = torch.nn.Module()
    module.weight = param
    module.forward = lambda images, mask: {"loss": (module.weight - images).abs().mean()}
    engine = LocalEngine(module, torch.optim.AdamW([param], fused=True))
    engine.backward(engine(torch.tensor([1.0, float("inf")]), torch.ones(1))["loss"])
    with pytest.raises(NonFiniteError):
        engine.step()
    assert torch.equal(param.data, torch.zeros(2))


def test_state_of_a_bad_run_is_not_saved(objective):
    engine = make_engine(objective, check_every_step=False)
    images, mask = next(batches(objective, 1))
    run(engine, [(images * float("nan"), mask)])
    with pytest.raises(NonFiniteError, match="step 1"):
        engine.state()


def test_the_module_with_a_bad_output_is_named(objective):
    images, mask = next(batches(objective, 1))
    assert find_nonfinite(objective, images, mask) is None
    name = poison_output(objective, float("inf"))
    assert name in find_nonfinite(objective, images, mask)
    assert all(param.grad is None for param in objective.parameters())


def test_code_between_modules_is_named_by_its_parent(objective):
    images, mask = next(batches(objective, 1))
    norm = objective.encoder.layers[0].blocks[0].norm1
    plain = norm.forward
    # NaN made after norm1's own hooks have run, inside the block's forward
    objective.encoder.layers[0].blocks[0].attn.register_forward_pre_hook(
        lambda module, args: (args[0] * float("nan"), *args[1:]), prepend=True
    )
    assert "encoder.layers.0.blocks.0" in find_nonfinite(objective, images, mask)
    assert norm.forward == plain


def test_a_bad_parameter_is_named(objective):
    images, mask = next(batches(objective, 1))
    with torch.no_grad():
        objective.head.weight[0, 0] = float("nan")
    assert "parameter head.weight" in find_nonfinite(objective, images, mask)


def test_a_bad_backward_pass_is_named(objective):
    images, mask = next(batches(objective, 1))
    mlp = objective.encoder.layers[0].blocks[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x, **options: plain(Poison.apply(x), **options)
    assert "backward pass of module encoder.layers.0.blocks.1.mlp" in find_nonfinite(objective, images, mask)


def test_bad_images_are_named(objective):
    images, mask = next(batches(objective, 1))
    assert "the input images" in find_nonfinite(objective, images * float("inf"), mask)


def test_saved_and_loaded_engines_continue_alike(objective, new_objective, tmp_path):
    data = list(batches(objective, 6))
    engine = make_engine(objective)
    run(engine, data[:3])
    engine.save(tmp_path)
    state = engine.state()
    run(engine, data[3:])
    fresh = new_objective(seed=5)
    other = make_engine(fresh)
    other.load(tmp_path)
    other.load_state(state)
    run(other, data[3:])
    assert equal_weights(objective, fresh)
    assert other.steps == engine.steps == 6
    assert other.read() == engine.read()


def test_lamb_goes_on_where_it_was(objective, tmp_path):
    """Its count of updates lies in the groups, beside the moments that the checkpoint holds by parameter."""

    def lamb(module):
        return LocalEngine(module, build_optimizer("lamb", param_groups(module, 0.05), 1e-2))

    other = copy.deepcopy(objective)
    data = list(batches(objective, 4))
    engine = lamb(objective)
    run(engine, data[:2])
    engine.save(tmp_path)
    state = engine.state()
    run(engine, data[2:])
    resumed = lamb(other)
    resumed.load(tmp_path)
    resumed.load_state(state)
    run(resumed, data[2:])
    assert equal_weights(objective, other)
