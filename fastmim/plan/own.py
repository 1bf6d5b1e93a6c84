"""The rule for one's own images: from facts about them and the machine to the keys of a config, each with its reason.

Nothing here looks at a file or a device: ``fastmim pretrain --images`` and ``fastmim plan --images`` gather the facts
(:mod:`.own_facts`) and ask the same function. More memory, cores or images never give a smaller encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastmim.wording import plural

from .hardware import GIB
from .own_length import length, modelled_speed, rates, with_reading
from .own_terms import (
    BATCH,
    HELD_OUT,
    HOLD_OUT_FROM,
    LADDER,
    MINUTES,
    POSITIONS,
    SEEN,
    SIDES,
    WORKER,
    WORKERS,
    Choice,
    Cost,
    Facts,
    Given,
)
from .recommend import HEADROOM


class Taken(NamedTuple):
    """An encoder at a size in a micro-batch, and why it was taken."""

    keys: dict[str, Any]
    cost: Cost
    micro: int
    accum: int
    why: dict[str, str]  # by key


def choose(
    facts: Facts,
    given: Given,
    cost: Callable[[Mapping[str, Any]], Cost],
    measure: Callable[[Mapping[str, Any], int], float] | None = None,
) -> list[Choice]:
    """The keys that the user has not given.

    Args:
        facts: What there is.
        given: What the user has said.
        cost: Of keys of the model and the objective.
        measure: Images a second of a step with these keys in a micro-batch, on this machine; None: modelled.

    Raises:
        ValueError: the smallest way needs more memory than there is.
    """
    chosen = [*_channels(facts, given), *_held_out(facts, given)]
    values = dict(given) | {one.key: one.value for one in chosen}
    trained = max(1, facts.images - _count(facts, values.get("data.val_fraction") or 0))
    batch = _batch(facts, given, trained)
    taken = _encoder(facts, values, batch, cost)
    chosen += _model(facts, taken) + _steps_of(facts, given, taken, batch, trained)
    values |= taken.keys
    modelled = modelled_speed(facts, taken.cost)
    measured = measure(values, taken.micro) if measure is not None else None
    rate = modelled if measured is None else with_reading(facts, measured)
    how = "modelled" if measured is None else "measured in a step here"
    chosen += length(facts, given, batch, trained, rate, how) + rates()
    return sorted((one for one in chosen if one.key not in given), key=_section)


def _channels(facts: Facts, given: Given) -> list[Choice]:
    looked = len(facts.short_sides)
    if facts.grey:
        grey = "the image looked at is grey" if looked == 1 else f"all {looked} images looked at are grey"
        return [Choice("model.in_chans", 1, grey)]
    if facts.transparent and given.get("data.alpha", "white") == "white":
        what = f"RGB; {facts.transparent} of {looked} looked at have alpha: transparent pixels are laid over white"
        return [Choice("model.in_chans", 3, f"{what} (data.alpha)")]
    return []


def _held_out(facts: Facts, given: Given) -> list[Choice]:
    if given.get("data.val_path") is not None or "data.val_fraction" in given:
        return []
    if facts.images < HOLD_OUT_FROM:
        why = f"{plural(facts.images, 'image is', 'images are')} too few to hold some out (from {HOLD_OUT_FROM} on)"
        return [Choice("data.val_fraction", None, why)]
    share = next(part / 10 for part in range(1, 10) if _count(facts, part / 10) >= HELD_OUT or part == 9)
    out = _count(facts, share)
    some = f"{out:,} of {plural(facts.images, 'image')} {'is' if out == 1 else 'are'} held out"
    why = f"{some} for the validation loss, by their names"
    return [Choice("data.val_fraction", share, why)]


def _count(facts: Facts, share: float) -> int:
    """Images that a share holds out; of very many, about."""
    return sum(place < share for place in facts.places) if facts.places else round(facts.images * share)


def _batch(facts: Facts, given: Given, trained: int) -> int:
    """Images of a step over all ranks: at most half of all, so that an epoch has two."""
    if given.get("train.global_batch_size") is not None:
        return int(given["train.global_batch_size"])
    most = BATCH[facts.kind]
    own = _power_of_2(max(1, min(most, trained // 2) // facts.ranks))
    own = int(given.get("train.micro_batch_size") or own)
    return own * int(given.get("train.grad_accum_steps") or 1) * facts.ranks


def _encoder(facts: Facts, given: Given, batch: int, cost: Callable[[Mapping[str, Any]], Cost]) -> Taken:
    """The largest encoder that has enough images, fits, and sees enough of them in time; then the largest crop."""
    name, why = given.get("model.name"), dict[str, str]()
    known = [one for one, least in LADDER if facts.images >= least] if name is None else [str(name)]
    sides = [side for side in SIDES if side <= facts.short_side] or [SIDES[0]]
    smallest: tuple[dict[str, Any], Cost] | None = None
    for one in reversed(known):
        # A larger encoder is taken at its full crop only: a smaller crop for it would be no better.
        for side in reversed(sides if one == known[0] else sides[-1:]):
            keys = model_keys(one, side, given)
            found = cost({**given, **keys})
            smallest = keys, found
            micro = _largest_that_fits(facts, given, found, batch)
            late = modelled_speed(facts, found) * 60 * MINUTES[facts.kind] < SEEN
            if micro is not None and not (late and name is None and (one, side) != (known[0], sides[0])):
                return Taken(keys, found, micro, batch // facts.ranks // micro, {"model.name": _enough(facts)} | why)
            what = "does not fit" if micro is None else f"would see under {SEEN:,} images in {MINUTES[facts.kind]} min"
            why.setdefault("model.img_size" if one == known[0] else "model.name", f"; {one} at {side} px {what}")
    assert smallest is not None
    raise ValueError(_no_room(facts, *smallest))


def _enough(facts: Facts) -> str:
    following = [f"; {one} from {least:,} on" for one, least in LADDER if least > facts.images]
    return f", for {plural(facts.images, 'image')}{following[0] if following else ''}"


def model_keys(name: str, side: int, given: Given) -> dict[str, Any]:
    """What the encoder and the mask need at a crop of this edge, less what is given."""
    side = given.get("model.img_size") or side
    edges = list(side) if isinstance(side, (list, tuple)) else [side]
    edge = min(edges)
    keys: dict[str, Any] = {"model.name": name, "model.img_size": side}
    if name.startswith("vit_"):
        keys["model.patch_size"] = _divisor(edges, [16, 8, 4][0 if edge >= 128 else 1 if edge >= 64 else 2 :])
        positions = POSITIONS.get(given.get("objective.name", "simmim"))
        if positions is not None:
            keys |= {"model.abs_pos_embed": positions, "model.shared_rel_pos_bias": False}
    elif name.startswith("swin") and "_" in name and edge & (edge - 1) == 0:
        keys["model.window_size"] = 8
    if given.get("objective.name", "simmim") == "simmim":
        patch = given.get("model.patch_size") or keys.get("model.patch_size") or 4
        unit = 32 if edge > 128 else 16 if edge >= 64 else 8
        keys["objective.unit"] = _divisor(edges, range(max(1, unit // patch) * patch, 0, -patch))
    return {key: value for key, value in keys.items() if key not in given}


def _divisor(edges: Sequence[int], sizes: Sequence[int]) -> int:
    """The first size of which every edge is a multiple; the first of all where none is, as the model then says."""
    return next((size for size in sizes if not any(edge % size for edge in edges)), sizes[0])


def _largest_that_fits(facts: Facts, given: Given, cost: Cost, batch: int) -> int | None:
    """The micro-batch, a whole part of a rank's share of the batch; a given one is taken as it is where it fits."""
    own = max(1, batch // facts.ranks // int(given.get("train.grad_accum_steps") or 1))
    wanted = given.get("train.micro_batch_size")
    sizes = [int(wanted)] if wanted is not None else [n for n in range(own, 0, -1) if own % n == 0]
    return next((n for n in sizes if cost.memory(n) <= _limit(facts, given)), None)


def _limit(facts: Facts, given: Given) -> float:
    """Bytes that a plan may fill."""
    if facts.gpu:
        return facts.gpu_memory * (1 - HEADROOM)
    return facts.memory * (1 - HEADROOM) - int(given.get("data.num_workers", WORKERS["cpu"])) * WORKER


def _workers(facts: Facts) -> int:
    return max(1, min(WORKERS[facts.kind], facts.cores // 2))


def _no_room(facts: Facts, keys: Mapping[str, Any], cost: Cost) -> str:
    have = facts.gpu_memory if facts.gpu else facts.memory
    where = facts.gpu or "this machine"
    shown = ", ".join(f"{key}={value}" for key, value in keys.items() if key.startswith("model."))
    return (
        f"--images: {cost.memory(1) / GIB:.2g} GiB are needed for one image at a time{f' ({shown})' if shown else ''}, "
        f"and {have / GIB:.2g} GiB are free on {where} (fastmim plan's model of memory, its headroom and the readers "
        "beside); end other programs, or take a smaller model.name or model.img_size"
    )


def _model(facts: Facts, taken: Taken) -> list[Choice]:
    side = taken.keys.get("model.img_size")
    shorter = sum(one < side for one in facts.short_sides) if isinstance(side, int) else 0
    looked = len(facts.short_sides)
    middle = "the image looked at" if looked == 1 else f"the middle one of {looked} looked at"
    small = f"; smaller, and enlarged: {shorter}" if shorter else ""
    reasons = {
        "model.name": f"{taken.cost.parameters / 1e6:.3g} M parameters with the head",
        "model.img_size": f"{middle} has a short side of {facts.short_side} px{small}",
        "model.patch_size": "so that a crop has 64 patches or more",
        "model.abs_pos_embed": "positions of each patch, as objective.name needs them",
        "model.shared_rel_pos_bias": "model.abs_pos_embed is in its place",
        "model.window_size": "divides the maps of a crop of this size",
        "objective.unit": "edge of a mask unit: near a sixth of the crop's, as SimMIM's 32 of 192",
    }
    return [Choice(key, value, reasons[key] + taken.why.get(key, "")) for key, value in taken.keys.items()]


def _steps_of(facts: Facts, given: Given, taken: Taken, batch: int, trained: int) -> list[Choice]:
    limit = (facts.gpu_memory if facts.gpu else facts.memory) / GIB
    need = taken.cost.memory(taken.micro) / GIB
    fits = f"{need:.2g} GiB of {limit:.3g} free, by fastmim plan's model"
    size = f"{plural(batch, 'image')} a step"
    # Half of one is none: a step has one all the same.
    half = f", no more than half of {trained:,}" if batch < BATCH[facts.kind] and trained > 1 else ""
    found = [Choice("train.micro_batch_size", taken.micro, f"{size}{half}; {fits}")]
    if taken.accum > 1 and given.get("train.global_batch_size") is None:
        found.append(Choice("train.grad_accum_steps", taken.accum, f"{size}, {taken.micro} at a time: memory"))
    where = "beside the GPU" if facts.gpu else "beside the step"
    workers = _workers(facts)
    readers = "reader" if workers == 1 else "readers"
    return [*found, Choice("data.num_workers", workers, f"{readers} {where}, on {plural(facts.cores, 'core')}")]


def _section(choice: Choice) -> int:
    return ("model", "objective", "data", "optim", "train").index(choice.key.partition(".")[0])


def _power_of_2(number: int) -> int:
    return 1 << max(0, int(number).bit_length() - 1)
