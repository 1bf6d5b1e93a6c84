"""The rule for one's own images: from facts about them and the machine to the keys of a config, each with its reason.

Nothing here looks at a file or a device: ``fastmim pretrain --images`` and ``fastmim plan --images`` gather the facts
(:mod:`.own_facts`) and ask the same function. More memory, cores or images never give a smaller encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .hardware import GIB
from .recommend import HEADROOM

LADDER = (("vit_tiny", 0), ("swinv2_tiny", 1_000), ("swinv2_small", 20_000), ("swinv2_base", 200_000))
"""Encoders from small to large, and the images that each should have at least."""
SIDES = (32, 64, 96, 128, 192)
"""Edges of a crop, pixels: what every encoder here takes, up to SimMIM's."""
SEEN = 10_000
"""Images that an encoder should see in the time there is, counted anew in each epoch; else a smaller one is taken."""
EPOCHS = 1_600
"""No run is longer: twice the published ones."""
MINUTES = {"cpu": 15, "gpu": 60}
BATCH = {"cpu": 16, "gpu": 128}
HOLD_OUT_FROM = 20
"""Images of which some are held out, and how many at least."""
HELD_OUT = 2
CORE_FLOPS = 25e9
"""FLOP/s of a core in float32 training, where no step was measured: 25 to 60 were seen on cores of servers."""
GPU_SHARE = 0.3
"""Of a GPU's peak that small encoders reach, where no step was measured: a guess, and said to be modelled."""
DECODED = 80e6
"""Pixels a second that a core decodes and resizes (libjpeg, ``benchmarks/bench_data.py``)."""
WORKERS = {"cpu": 2, "gpu": 8}
WORKER = 0.4 * GIB
"""Memory of a reader process."""


@dataclass(frozen=True)
class Facts:
    """What there is. Memory is what a process of the run can still take, in bytes."""

    images: int
    short_sides: tuple[int, ...]  # of the images looked at, rising, pixels
    pixels: int  # of the middle one of them
    grey: bool = False  # all of those looked at
    transparent: int = 0  # how many of those have alpha
    places: tuple[float, ...] = ()  # fastmim.data.held_out.places of all, rising; empty: there are many
    cores: int = 4
    memory: float = 8 * GIB
    gpu: str = ""  # its name; empty: the CPU trains
    gpu_memory: float = 0.0
    gpu_flops: float = 0.0
    ranks: int = 1  # processes of the run; cores and memory are the share of one

    @property
    def kind(self) -> str:
        """"cpu" or "gpu"."""
        return "gpu" if self.gpu else "cpu"

    @property
    def short_side(self) -> int:
        """The middle one."""
        return self.short_sides[len(self.short_sides) // 2]


class Cost(NamedTuple):
    """Of an encoder at a size, by the planner: parameters, bytes of a step of n images, FLOPs an image."""

    parameters: int
    memory: Callable[[int], float]
    flops: float


class Choice(NamedTuple):
    """A key of the config, its value and the reason."""

    key: str
    value: Any
    reason: str


Given = Mapping[str, Any]
"""``section.key`` -> value of what the user has said: never chosen, and taken into account."""


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
    modelled = _speed(facts, taken.cost, facts.ranks)
    measured = measure(values, taken.micro) if measure is not None else None
    rate = modelled if measured is None else _with_reading(facts, measured)
    how = "modelled" if measured is None else "measured in a step here"
    chosen += _length(facts, given, taken, trained, rate, how) + _rates(facts)
    return sorted((one for one in chosen if one.key not in given), key=_section)


def _channels(facts: Facts, given: Given) -> list[Choice]:
    looked = len(facts.short_sides)
    if facts.grey:
        return [Choice("model.in_chans", 1, f"all {looked} images looked at are grey")]
    if facts.transparent and given.get("data.alpha", "white") == "white":
        what = f"RGB; {facts.transparent} of {looked} looked at have alpha: transparent pixels are laid over white"
        return [Choice("model.in_chans", 3, f"{what} (data.alpha)")]
    return []


def _held_out(facts: Facts, given: Given) -> list[Choice]:
    if given.get("data.val_path") is not None or "data.val_fraction" in given:
        return []
    if facts.images < HOLD_OUT_FROM:
        why = f"{facts.images} images are too few to hold some out (from {HOLD_OUT_FROM} on)"
        return [Choice("data.val_fraction", None, why)]
    share = next(part / 10 for part in range(1, 10) if _count(facts, part / 10) >= HELD_OUT or part == 9)
    why = f"{_count(facts, share):,} of {facts.images:,} images are held out for the validation loss, by their names"
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
    name, why = given.get("model.name"), {}
    known = [one for one, least in LADDER if facts.images >= least] if name is None else [str(name)]
    sides = [side for side in SIDES if side <= facts.short_side] or [SIDES[0]]
    smallest: tuple[dict[str, Any], Cost] | None = None
    for one in reversed(known):
        # A larger encoder is taken at its full crop only: a smaller crop for it would be no better.
        for side in reversed(sides if one == known[0] else sides[-1:]):
            keys = _keys(one, side, given)
            found = cost({**given, **keys})
            smallest = keys, found
            micro = _largest_that_fits(facts, given, found, batch)
            late = _speed(facts, found, facts.ranks) * 60 * MINUTES[facts.kind] < SEEN
            if micro is not None and not (late and name is None and (one, side) != (known[0], sides[0])):
                return Taken(keys, found, micro, batch // facts.ranks // micro, {"model.name": _enough(facts)} | why)
            what = "does not fit" if micro is None else f"would see under {SEEN:,} images in {MINUTES[facts.kind]} min"
            why.setdefault("model.img_size" if one == known[0] else "model.name", f"; {one} at {side} px {what}")
    assert smallest is not None
    raise ValueError(_no_room(facts, *smallest))


def _enough(facts: Facts) -> str:
    following = [f"; {one} from {least:,} on" for one, least in LADDER if least > facts.images]
    return f", for {facts.images:,} images{following[0] if following else ''}"


def _keys(name: str, side: int, given: Given) -> dict[str, Any]:
    """What the encoder and the mask need at a crop of this edge, less what is given."""
    side = given.get("model.img_size") or side
    edge = min(side) if isinstance(side, (list, tuple)) else side
    keys: dict[str, Any] = {"model.name": name, "model.img_size": side}
    if name.startswith("vit_"):
        keys["model.patch_size"] = 16 if edge >= 128 else 8 if edge >= 64 else 4
    elif name.startswith("swin") and "_" in name and edge & (edge - 1) == 0:
        keys["model.window_size"] = 8
    if given.get("objective.name", "simmim") == "simmim":
        patch = given.get("model.patch_size") or keys.get("model.patch_size") or 4
        unit = 32 if edge >= 128 else 16 if edge >= 64 else 8
        keys["objective.unit"] = max(1, unit // patch) * patch
    return {key: value for key, value in keys.items() if key not in given}


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


def _speed(facts: Facts, cost: Cost, ranks: int) -> float:
    """Modelled images a second over all ranks, reading included."""
    flops = facts.gpu_flops * GPU_SHARE if facts.gpu else facts.cores * CORE_FLOPS
    return ranks * _with_reading(facts, flops / cost.flops)


def _with_reading(facts: Facts, rate: float) -> float:
    """On a CPU reading takes the cores from the step; on a GPU it goes on beside."""
    reading = facts.pixels / DECODED / max(1, facts.cores)
    return min(rate, 1 / reading) if facts.gpu else 1 / (1 / rate + reading)


def _model(facts: Facts, taken: Taken) -> list[Choice]:
    side = taken.keys.get("model.img_size")
    shorter = sum(one < side for one in facts.short_sides) if isinstance(side, int) else 0
    looked = len(facts.short_sides)
    small = f"; smaller, and enlarged: {shorter}" if shorter else ""
    reasons = {
        "model.name": f"{taken.cost.parameters / 1e6:.3g} M parameters with the head",
        "model.img_size": f"the middle one of {looked} looked at has a short side of {facts.short_side} px{small}",
        "model.patch_size": "so that a crop has 64 patches or more",
        "model.window_size": "divides the maps of a crop of this size",
        "objective.unit": "edge of a mask unit, smaller for small crops",
    }
    return [Choice(key, value, reasons[key] + taken.why.get(key, "")) for key, value in taken.keys.items()]


def _steps_of(facts: Facts, given: Given, taken: Taken, batch: int, trained: int) -> list[Choice]:
    limit = (facts.gpu_memory if facts.gpu else facts.memory) / GIB
    need = taken.cost.memory(taken.micro) / GIB
    fits = f"{need:.2g} GiB of {limit:.3g} free, by fastmim plan's model"
    size = f"{batch} images a step"
    half = f", no more than half of {trained:,}" if batch < BATCH[facts.kind] else ""
    found = [Choice("train.micro_batch_size", taken.micro, f"{size}{half}; {fits}")]
    if taken.accum > 1 and given.get("train.global_batch_size") is None:
        found.append(Choice("train.grad_accum_steps", taken.accum, f"{size}, {taken.micro} at a time: memory"))
    where = "beside the GPU" if facts.gpu else "which share the cores with the step"
    return [*found, Choice("data.num_workers", _workers(facts), f"readers {where}, of {facts.cores} cores")]


def _length(
    facts: Facts, given: Given, taken: Taken, trained: int, rate: float, how: str
) -> list[Choice]:
    batch = taken.micro * taken.accum * facts.ranks
    per_epoch = max(1, trained // batch)
    if given.get("train.steps") is not None or given.get("train.epochs") is not None:
        steps = int(given.get("train.steps") or given["train.epochs"] * per_epoch)
        chosen = []
    else:
        seen = min(rate * 60 * MINUTES[facts.kind], EPOCHS * trained)
        steps = max(20, _two_digits(seen / batch))
        minutes = steps * batch / rate / 60
        about = f"about {minutes:.0f} min" if minutes >= 1.5 else "about a minute"
        passes = f"{steps / per_epoch:.0f} passes over {trained:,} images"
        chosen = [Choice("train.steps", steps, f"{about} at {rate:.3g} images/s ({how}); {passes}")]
    every = max(1, steps // 5)
    log = max(1, min(_one_digit(2 * rate / batch), _one_digit(steps / 20)))
    chosen.append(Choice("train.log_every", log, "a line every few seconds"))
    chosen.append(Choice("train.save_every", every, "5 checkpoints, of which the newest 2 stay"))
    chosen.append(Choice("train.picture_every", every, "5 reconstructions"))
    if trained < facts.images or given.get("data.val_path") is not None:
        chosen.append(Choice("train.val_every", max(1, steps // 10), "10 validations"))
        chosen.append(Choice("train.val_batches", 8, "at most so many micro-batches each"))
    if "optim.warmup_epochs" not in given:
        chosen.append(Choice("optim.warmup_steps", max(1, steps // 20), "a twentieth of the run"))
    return chosen


def _rates(facts: Facts) -> list[Choice]:
    return [
        Choice("optim.lr", 1e-3, "absolute: usual for small encoders and batches"),
        Choice("optim.lr_batch", None, "so that lr is not scaled by the batch"),
        Choice("optim.warmup_lr", 1e-5, "of the first step"),
        Choice("optim.min_lr", 1e-5, "at the end of the cosine"),
    ]


def _section(choice: Choice) -> int:
    return ("model", "objective", "data", "optim", "train").index(choice.key.partition(".")[0])


def _power_of_2(number: int) -> int:
    return 1 << max(0, int(number).bit_length() - 1)


def _two_digits(number: float) -> int:
    """Rounded down to two significant digits, so that a second look at the clock gives the same more often."""
    scale = 10 ** max(0, len(str(int(number))) - 2)
    return int(number) // scale * scale


def _one_digit(number: float) -> int:
    """1, 2, 5, 10, 20 or 50, the largest that is not above."""
    return max((one for one in (1, 2, 5, 10, 20, 50) if one <= number), default=1)
