"""BEiT beside the published run of ``tests/test_golden.py``: its tokenizers, masks and the rows that it reads."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmim_kernels as fk
from fastmim.interop import load_reference, load_weights
from fastmim.interop.beit import save_beit
from fastmim.models import create_encoder
from fastmim.objectives import create_objective
from fastmim.objectives.tokenizer import read_tokenizer
from fastmim.objectives.views import augmented

VIT = dict(name="vit", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2,
           shared_rel_pos_bias=True, init_values=0.1)  # fmt: skip
SWIN = dict(name="swin", img_size=32, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
TOKENS = dict(name="dvae", img_size=16, patch_size=4, embed_dim=8, depth=1, codes=12, code_dim=6)
DALLE = dict(name="dalle", img_size=32, embed_dim=8, codes=12, code_dim=6)
SMALL = dict(num_mask=6, min_block=2)


def build(encoder=VIT, **own):
    torch.manual_seed(0)
    return create_objective("beit", encoder=encoder, impl="torch", **(SMALL | own))


def weights(settings, seed=1):
    torch.manual_seed(seed)
    return create_encoder(settings).state_dict()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tokenizer of fastmim's."""
    file = tmp_path_factory.mktemp("tokenizer") / "encoder.safetensors"
    save_file(weights(TOKENS), file, {"encoder": json.dumps(TOKENS)})
    return file


def views(batch=3):
    generator = torch.Generator().manual_seed(5)
    sizes = ((1, batch, 3, 32, 32), (1, batch, 3, 16, 16))
    return tuple(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes)


@pytest.mark.parametrize("encoder", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("follows", [True, False])
def test_the_loss_is_the_mean_over_all_hidden_tokens(encoder, follows, path, monkeypatch):
    objective = build(encoder, tokenizer=str(path))
    images = views()
    mask = objective.random_mask(torch.arange(3))
    mask[0] &= torch.arange(4) < 2  # counts that differ
    assert len(set(mask.sum((1, 2)).tolist())) > 1
    repeat = 32 // 4 // 4 if encoder is SWIN else 1
    wide = mask.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
    logits = objective.head(objective.encoder(objective.normalise(images[0][0]), wide))
    with torch.no_grad():
        ids = create_encoder(TOKENS)
        ids.load_state_dict(weights(TOKENS))
        ids = ids.logits(images[1][0] / 255).argmax(1)
    expected = F.cross_entropy(logits[mask], ids[mask])
    expected.backward()
    grads = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    monkeypatch.setattr(fk, "shape_may_follow", lambda *_: follows)
    found = objective(images, mask)
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-6, atol=0)
    assert found["accuracy"].item() == pytest.approx((logits.argmax(-1) == ids)[mask].float().mean().item())
    for name, param in objective.named_parameters():
        torch.testing.assert_close(param.grad, grads[name], rtol=1e-4, atol=1e-7)


class Largest(TorchDispatchMode):
    """Of the tensors whose last dimension is the vocabulary, the most rows."""

    def __init__(self, codes):
        super().__init__()
        self.codes, self.rows = codes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[-1] == self.codes:
                self.rows = max(self.rows, leaf.numel() // self.codes)
        return found


@pytest.mark.parametrize("follows", [True, False])
def test_no_logits_of_visible_tokens_are_made(follows, monkeypatch):
    monkeypatch.setattr(fk, "shape_may_follow", lambda *_: follows)
    objective = build(codes=101)
    images, mask = objective.example(5)
    with Largest(101) as largest:
        objective(images, mask)["loss"].backward()
    assert 0 < largest.rows <= 5 * 6


def test_masks_hold_at_most_so_many_and_are_of_their_sample():
    objective = build()
    ids = torch.arange(200)
    mask = objective.random_mask(ids, seed=1, epoch=2)
    counts = mask.sum((1, 2))
    assert mask.shape == (200, 4, 4) and counts.max() == 6 and counts.min() >= 2
    assert torch.equal(objective.random_mask(ids.flip(0), seed=1, epoch=2).flip(0), mask)


def test_a_mask_of_another_grid_has_the_same_shares():
    for size, expected in ((224, (75, 16)), (32, (6, 1)), ((112, 224), (38, 8))):
        encoder = VIT | dict(img_size=size, patch_size=16 if size != 32 else 8)
        objective = build(encoder, num_mask=None, min_block=None)
        assert (objective.num_mask, objective.min_block) == expected


def test_codes_of_an_image_alone_are_those_of_it_in_the_tokenizers_size(path):
    objective = build(tokenizer=str(path))
    flat = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    same = torch.full((1, 2, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.equal(objective.tokenise(flat), objective.tokenise(flat, same))
    assert torch.equal(objective.tokenise(objective.normalise(flat)), objective.tokenise(flat))


def test_both_views_change_colours_alike(path):
    objective = build(tokenizer=str(path))
    first, second = objective.views()
    assert (first.size, second.size, second.interpolation) == ((32, 32), (16, 16), "lanczos")
    assert second.same_crop and first.photometric == second.photometric
    images = tuple(torch.full((1, 4, 3, *view.size), 90, dtype=torch.uint8) for view in (first, second))
    done = augmented(images, objective.views(), torch.arange(4), seed=1, epoch=2)
    assert (done[0] != images[0]).any()
    torch.testing.assert_close(done[0].amax((3, 4)), done[1].amax((3, 4)))
    assert len(done[0].amax((0, 2, 3, 4)).unique()) > 1  # and each image in its own way


def test_nothing_reaches_the_tokenizer(path):
    plain, objective = build(codes=12), build(tokenizer=str(path))
    assert objective.state_dict().keys() == plain.state_dict().keys()
    for (name, one), other in zip(objective.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name  # drawn as without one
    assert sum(t.nbytes for t in objective.frozen_tensors()) == 4 * sum(t.numel() for t in weights(TOKENS).values())
    objective.bfloat16()
    assert {t.dtype for t in objective.frozen_tensors()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective.tokenise(*(v[0] for v in views())), objective.tokenise(*(v[0] for v in views())))
        pixels = torch.rand(1, 3, 16, 16)
        inside = objective.tokenizer(pixels)
    assert torch.equal(inside, objective.tokenizer(pixels))


def test_tokenizers_of_every_kind_of_file(path, tmp_path):
    ours = read_tokenizer(path.parent)
    assert (ours.codes, ours.patch_size, ours.decodes) == (12, 4, True) and len(ours.digest) == 64
    dalle = weights(DALLE)
    encoder = {name.removeprefix("encoder."): t for name, t in dalle.items() if name.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors")
    save_file(dalle, tmp_path / "both.safetensors")
    torch.save(encoder, tmp_path / "encoder.pt")
    found = [read_tokenizer(tmp_path / name) for name in ("encoder.safetensors", "both.safetensors", "encoder.pt")]
    images = torch.rand(2, 3, 32, 32)
    model = create_encoder(DALLE)
    model.load_state_dict(dalle)
    assert all(torch.equal(one(images), model(images)) for one in found)
    assert [one.decodes for one in found] == [False, True, False]
    assert torch.equal(found[1].pixels(found[1](images)), model.pixels(model(images)))
    assert found[0].digest == found[2].digest != found[1].digest


def test_what_is_no_tokenizer(path, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:500])
    torch.save(create_encoder(TOKENS), tmp_path / "module.pt")
    save_file(create_encoder(VIT).state_dict(), tmp_path / "vit.safetensors", {"encoder": json.dumps(VIT)})
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    some = {name: t for name, t in weights(TOKENS).items() if "codebook" not in name}
    save_file(some, tmp_path / "some.safetensors", {"encoder": json.dumps(TOKENS)})
    for name, message in {
        "none.safetensors": "no such file",
        "cut.safetensors": "not a readable weight file",
        "module.pt": "a pickled module is not unpickled",
        "vit.safetensors": "holds a vit, no tokenizer",
        "other.safetensors": "neither a tokenizer",
        "some.safetensors": "codebook.weight",
    }.items():
        with pytest.raises(ValueError, match=f"objective.tokenizer=.*{name}: .*{message}"):
            build(tokenizer=str(tmp_path / name))


def test_a_run_is_known_by_its_tokenizers_weights(path, tmp_path):
    other, copy = tmp_path / "other.safetensors", tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    save_file(weights(TOKENS, seed=2), other, {"encoder": json.dumps(TOKENS)})
    found = [build(tokenizer=str(file)).identity()["objective.tokenizer"] for file in (path, copy, other)]
    assert found[0] == found[1] != found[2]
    with pytest.raises(ValueError, match="objective.tokenizer=null: give"):
        build().identity()


def test_without_values_a_tokenizer_has_its_shape(path):
    with FakeTensorMode():
        objective = build(tokenizer=str(path))
        images, mask = objective.example(2)
        assert len(images) == 2 and objective(images, mask)["loss"].shape == ()
        assert sum(t.nbytes for t in objective.frozen_tensors()) == sum(t.nbytes for t in weights(TOKENS).values())


def test_official_names_go_out_and_in(tmp_path):
    objective, other = build(codes=12), build(codes=12)
    with torch.no_grad():
        for tensor in objective.parameters():
            tensor.add_(torch.randn_like(tensor))
    saved = save_beit(objective)
    assert {"lm_head.weight", "mask_token", "blocks.1.attn.q_bias", "rel_pos_bias.relative_position_bias_table"} <= (
        saved["model"].keys()
    )
    saved["model"]["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17)
    report = load_reference(other, saved)
    assert report.skipped == ["rel_pos_bias.relative_position_index"]
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    torch.save(saved, tmp_path / "checkpoint.pth")
    encoder = build(codes=7)  # model.init_from: the encoder, into any objective
    assert load_weights(encoder, tmp_path / "checkpoint.pth").skipped == [
        "lm_head.bias", "lm_head.weight", "rel_pos_bias.relative_position_index"
    ]  # fmt: skip
    assert all(torch.equal(t, objective.encoder.state_dict()[name]) for name, t in encoder.encoder.state_dict().items())
    del saved["model"]["lm_head.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(head.bias\)"):
        load_reference(other, saved)


def test_the_picture_shows_predictions_in_hidden_places_only(path, tmp_path):
    encoder = {k.removeprefix("encoder."): v for k, v in weights(DALLE).items() if k.startswith("encoder.")}
    save_file(encoder, tmp_path / "d.safetensors")
    for file in (path, tmp_path / "d.safetensors"):
        objective = build(tokenizer=str(file)).eval()
        images = views(2)[0][0]
        headings, columns = objective.picture(images, objective.random_mask(torch.arange(2)))
        assert headings == ("image", "masked", "its codes", "predicted")
        assert all(column.shape == (2, 3, 32, 32) for column in columns)
        unmasked = objective.picture(images, torch.zeros(2, 4, 4, dtype=torch.bool))
        torch.testing.assert_close(unmasked.columns[2], unmasked.columns[3])
        assert not torch.equal(columns[2], columns[3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_mask=16), "num_mask=16: must lie in 1 … 15, for example 6"),
        (dict(min_block=7), "min_block=7: must lie in 1 … num_mask=6"),
        (dict(jitter=1.5), r"jitter=1.5: must lie in \[0, 1\]"),
        (dict(codes=1), "codes=1: must be at least 2"),
        (dict(encoder=VIT | dict(in_chans=4)), "jitter=0.4: changes colours of 1 or 3 channels, not of 4; use 0"),
        (dict(encoder=VIT | dict(img_size=8)), "blocks need two tokens"),
    ],
)
def test_arguments_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        build(**given)


def test_a_tokenizer_that_does_not_fit(path):
    with pytest.raises(ValueError, match="objective.codes=13: the tokenizer .* has 12"):
        build(tokenizer=str(path), codes=13)
    with pytest.raises(ValueError, match="takes 3 channels, and model.in_chans=1"):
        build(VIT | dict(in_chans=1), tokenizer=str(path))
    objective = build()
    with pytest.raises(ValueError, match="objective.tokenizer=null"):
        objective(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"codes must be one per token \(1, 4, 4\)"):
        objective((torch.zeros(1, 3, 32, 32), torch.zeros(1, 9, dtype=torch.int64)), torch.zeros(1, 4, 4))


def test_cached_codes_are_those_that_are_computed(path, tmp_path):
    plain, folder = build(tokenizer=str(path), jitter=0.0), tmp_path / "codes"
    images, ids = views(4), torch.arange(4)
    expected = plain.tokenise(images[0][0], images[1]).flatten(1)

    def prepared(images):
        objective = build(tokenizer=str(path), token_cache=str(folder), jitter=0.0)
        first, codes = objective.prepare(images, ids, seed=0, epoch=0)
        assert torch.equal(first, images[0])
        mask = objective.random_mask(ids)
        assert torch.equal(objective((first, codes), mask)["loss"], plain(images, mask)["loss"])
        return codes, objective._cache

    codes, cache = prepared(images)
    assert torch.equal(codes, expected) and (cache.hits, cache.misses) == (0, 4)
    file = next(folder.iterdir())
    file.write_bytes(file.read_bytes() + b"cut off by a kill")
    # Known ones in any order; one pixel more makes another crop.
    other = images[1][:, [2, 0, 1, 3]].clone()
    other[0, 3, 0, 0, 0] ^= 1
    codes, cache = prepared((images[0], other))
    assert torch.equal(codes[:3], expected[[2, 0, 1]]) and (cache.hits, cache.misses) == (3, 1)
    assert torch.equal(codes, plain.tokenise(images[0][0], other).flatten(1))
    with pytest.raises(ValueError, match="token_cache=x: keeps the codes of a tokenizer"):
        build(token_cache="x")


def test_the_forward_pass_is_one_graph(path):
    objective = build(tokenizer=str(path))
    images, mask = views(), objective.random_mask(torch.arange(3))
    compiled = torch.compile(objective, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(images, mask)["loss"], objective(images, mask)["loss"])
