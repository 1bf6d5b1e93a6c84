"""Fine-tuning as an objective: features and logits against timm, mixing against its published definition."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from fastmim import create_objective
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import param_groups
from fastmim.objectives.mixing import Erasing, Mixing, erase, mix, smooth

PLAIN = dict(name="vit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
CASES = {
    "a ViT's mean": (
        PLAIN | dict(key_bias=True, abs_pos_embed=True),
        dict(model_name="vit_tiny_patch16_224", global_pool="avg"),
    ),
    "a ViT's class token": (
        PLAIN | dict(key_bias=True, abs_pos_embed=True),
        dict(model_name="vit_tiny_patch16_224", global_pool="token"),
    ),
    "BEiT's": (
        PLAIN | dict(rel_pos_bias=True, init_values=0.1),
        dict(model_name="beit_base_patch16_224", use_rel_pos_bias=True, init_values=0.1, global_pool="avg"),
    ),
    "a Swin's": (
        dict(name="swin", img_size=32, patch_size=4, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4),
        dict(model_name="swin_tiny_patch4_window7_224"),
    ),
}


def classifier(encoder, **own):
    torch.manual_seed(0)
    made = create_objective("classify", encoder=encoder, num_classes=5, **own)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_timms(case):
    encoder, theirs = CASES[case]
    made = classifier(encoder, pool="cls" if theirs.get("global_pool") == "token" else "auto")
    sizes = {key: value for key, value in encoder.items() if key in ("img_size", "patch_size", "embed_dim", "depth",
                                                                     "num_heads", "depths", "window_size")}  # fmt: skip
    model = timm.create_model(**theirs, **sizes, num_classes=5).eval()
    state = {name.removeprefix("encoder."): value for name, value in made.state_dict().items()}
    if made.fc_norm is not None:  # timm has no norm before it
        state = {name: value for name, value in state.items() if not name.startswith("norm.")}
    if case == "a Swin's":
        state = {name.replace("head.", "head.fc."): value for name, value in state.items()}
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys and all("relative_position_index" in key for key in report.missing_keys)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(made.logits(images), model(images), atol=2e-5, rtol=1e-4)


def test_the_loss_is_the_cross_entropy_of_shares():
    made = classifier(CASES["a Swin's"][0])
    images, shares = torch.randn(4, 3, 32, 32), torch.rand(4, 5).softmax(1)
    log_p = made.logits(images).log_softmax(1)
    torch.testing.assert_close(made(images, shares)["loss"], -(shares * log_p).sum(1).mean())
    labels = torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(made(images, labels)["loss"], -log_p[range(4), labels].mean())
    assert made(images, made.logits(images).argmax(1))["top1"] == 1


def test_the_share_of_the_first_image_follows_its_beta_distribution():
    ids = torch.arange(400)
    for alpha in (0.8, 1.0):
        how = Mixing(mixup=alpha, cutmix=0.0)
        ones = torch.cat([torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)])
        shares = [mix(ones, torch.eye(2), i.expand(2), how, seed=0, epoch=0)[1][0, 0].item() for i in ids]
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("how", [Mixing(), Mixing(mixup=0), Mixing(cutmix=0)], ids=["both", "cutmix", "mixup"])
def test_targets_are_the_shares_of_the_pixels(how):
    """Every image is one number, so the mean of a mixed one tells how much of each it has."""
    kinds = set()
    for batch in range(30):
        numbers = torch.tensor([0.0, 1.0, 10.0, 100.0])
        images, ids = numbers.view(-1, 1, 1, 1).expand(4, 2, 24, 16), torch.arange(4) + batch
        mixed, targets = mix(images, torch.eye(4), ids, how, seed=3, epoch=1)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ numbers, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        kinds.add("blend" if mixed[0].unique().numel() == 1 else "box")
    assert kinds == ({"blend", "box"} if how == Mixing() else {"box"} if not how.mixup else {"blend"})


def test_mixing_and_erasing_repeat_with_their_keys_alone():
    images, ids, noise = torch.randn(4, 3, 16, 16), torch.arange(4), torch.randn(3, 32, 32)
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        first, again = (mix(images, torch.eye(4), ids, Mixing(), seed=seed, epoch=epoch) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    erased = erase(images, ids, noise, Erasing(1.0), seed=0, epoch=0)
    some = erase(images[2:3], ids[2:3], noise, Erasing(1.0), seed=0, epoch=0)
    assert torch.equal(erased[2:3], some) and not torch.equal(erased, images)


def test_erased_boxes_have_the_stated_sizes():
    count, edge = 4000, 32
    images, noise = torch.zeros(count, 1, edge, edge), torch.randn(1, 2 * edge, 2 * edge)
    changed = erase(images, torch.arange(count), noise, Erasing(0.25), seed=0, epoch=0)[:, 0] != 0
    hit = changed.flatten(1).any(1)
    assert abs(hit.float().mean() - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    areas = changed[hit].flatten(1).sum(1) / edge**2
    assert areas.min() > 0.01 and areas.max() < 0.36
    for box in changed[hit][:50]:  # each is one rectangle
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert box.sum() == rows * columns
        assert 0.2 < rows / columns < 5


def test_smoothing_keeps_a_total_of_one():
    soft = smooth(torch.tensor([1, 3]), 5, 0.1)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
    assert soft[0, 1] == pytest.approx(0.92) and soft[1, 0] == pytest.approx(0.02)


def test_several_classes_an_image_are_a_sigmoid_each():
    """Against the definition: −Σ y·log p + (1 − y)·log(1 − p), the mean over images and classes; also mixed labels."""
    made = classifier(CASES["a Swin's"][0], multi_label=True)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([[1, 1, 0, 0, 0], [0] * 5, [0, 0, 1, 0, 1], [1] * 5])
    shares = torch.rand(4, 5)
    p = made.logits(images).sigmoid()
    for mask in (labels, labels.to(torch.int8), shares):
        expected = -(mask * p.log() + (1 - mask.float()) * (1 - p).log()).mean()
        torch.testing.assert_close(made(images, mask)["loss"], expected)
    made.train().give_labels(labels.to(torch.int8))
    made.mixing, made.erasing = Mixing(mixup=0.0, smoothing=0.1), Erasing(0.0)
    pair = torch.stack((torch.zeros(3, 32, 32), torch.ones(3, 32, 32)))
    mixed, targets = made.inputs(pair, torch.arange(2), torch.tensor([2, 3]), seed=0, epoch=0)
    own = mixed[0].eq(0).float().mean()  # the share that is left of the image without a pixel of the other
    expected = own * (0.9 * labels[2] + 0.02) + (1 - own) * (0.9 * labels[3] + 0.02)
    torch.testing.assert_close(targets[0], expected)
    assert 0 < own < 1


def test_an_average_follows_and_is_another_classifier():
    """After n updates each weight is the sum of its history, in float64; the first weights fade as few updates ask."""
    made = create_objective("classify", encoder=PLAIN | dict(key_bias=True), num_classes=5, ema_decay=0.5)
    engine = LocalEngine(made, torch.optim.SGD(param_groups(made, 0.05), lr=0.3))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    names = [name for name, param in made.named_parameters() if param.requires_grad]
    expected = {name: made.get_parameter(name).detach().double().clone() for name in names}
    for step, momentum in enumerate((1 / 10, 2 / 11, 3 / 12)):
        made.set_step(step, 3, 3)
        engine.train_on(images, labels)
        for name, value in expected.items():
            value.mul_(momentum).add_((1 - momentum) * made.get_parameter(name).detach().double())
    for name, value in expected.items():
        torch.testing.assert_close(made.get_parameter(f"average.{name}").double(), value, rtol=1e-5, atol=1e-7)
    plain, average = (classify(images) for classify in made.eval().classifiers().values())
    alone = create_objective("classify", encoder=PLAIN | dict(key_bias=True), num_classes=5).eval()
    alone.load_state_dict({name: value for name, value in made.average.state_dict().items()}, strict=False)
    torch.testing.assert_close(average, alone.logits(images))
    assert not torch.equal(average, plain)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(layer_decay=0.0), "layer_decay=0.0"),
        (dict(pool="cls"), "pool=cls"),
        (dict(mixup=-1.0), "mixup=-1.0"),
        (dict(erasing=2.0), "erasing=2.0"),
        (dict(recipe="deit"), "recipe='deit'"),
        (dict(ema_decay=1.0), "ema_decay=1.0: must lie in"),
    ],
)
def test_what_cannot_be_is_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        create_objective("classify", encoder=CASES["a Swin's"][0], num_classes=2, **bad)


def test_a_layer_without_decay_keeps_the_plain_groups():
    made = classifier(CASES["a Swin's"][0])
    assert [group["name"] for group in param_groups(made, 0.05)] == ["decay", "no_decay"]
