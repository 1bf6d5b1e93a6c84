"""How fast a run on one's own images goes, and what follows from that: its length, its rates, what is due when."""

from __future__ import annotations

from fastmim.wording import plural

from .own_terms import CORE_FLOPS, DECODED, EPOCHS, GPU_SHARE, MINUTES, Choice, Cost, Facts, Given


def modelled_speed(facts: Facts, cost: Cost) -> float:
    """Modelled images a second over all ranks, reading included."""
    flops = facts.gpu_flops * GPU_SHARE if facts.gpu else facts.cores * CORE_FLOPS
    return facts.ranks * with_reading(facts, flops / cost.flops)


def with_reading(facts: Facts, rate: float) -> float:
    """Images a second of a step with their decoding, which takes a CPU's cores from it and goes on beside a GPU."""
    reading = facts.pixels / DECODED / max(1, facts.cores)
    return min(rate, 1 / reading) if facts.gpu else 1 / (1 / rate + reading)


def length(facts: Facts, given: Given, batch: int, trained: int, rate: float, how: str) -> list[Choice]:
    """How long, and what is due when.

    Args:
        batch: images of a step over all ranks.
        trained: images that are not held out.
        rate: images a second, ``how`` it is known.
    """
    per_epoch = max(1, trained // batch)
    if given.get("train.steps") is not None or given.get("train.epochs") is not None:
        steps = int(given.get("train.steps") or given["train.epochs"] * per_epoch)
        chosen = []
    else:
        seen = min(rate * 60 * MINUTES[facts.kind], EPOCHS * trained)
        steps = max(20, _two_digits(seen / batch))
        minutes = steps * batch / rate / 60
        about = f"about {minutes:.0f} min" if minutes >= 1.5 else "about a minute"
        passes = f"{plural(round(steps / per_epoch), 'pass', 'passes')} over {plural(trained, 'image')}"
        chosen = [Choice("train.steps", steps, f"{about} at {rate:.3g} images/s ({how}); {passes}")]
    every = max(1, steps // 5)
    log = max(1, min(_one_digit(2 * rate / batch), _one_digit(steps / 20)))
    chosen.append(Choice("train.log_every", log, "a line every few seconds"))
    chosen.append(Choice("train.save_every", every, "a fifth of the run; the newest 2 checkpoints stay"))
    chosen.append(Choice("train.picture_every", every, "a fifth of the run"))
    if trained < facts.images or given.get("data.val_path") is not None:
        chosen.append(Choice("train.val_every", max(1, steps // 10), "a tenth of the run"))
        chosen.append(Choice("train.val_batches", 8, "of them at most, each time"))
    if "optim.warmup_epochs" not in given:
        warmup = min(max(1, steps // 20), steps - 1)  # its last step is not the run's
        why = "a twentieth of the run" if warmup else "the run is one step"
        chosen.append(Choice("optim.warmup_steps", warmup, why))
    return chosen


def rates() -> list[Choice]:
    """The learning rate."""
    return [
        Choice("optim.lr", 1e-3, "absolute: usual for small encoders and batches"),
        Choice("optim.lr_batch", None, "so that lr is not scaled by the batch"),
        Choice("optim.warmup_lr", 1e-5, "of the first step"),
        Choice("optim.min_lr", 1e-5, "at the end of the cosine"),
    ]


def _two_digits(number: float) -> int:
    """Rounded down to two significant digits, so that a second look at the clock gives the same more often."""
    scale = 10 ** max(0, len(str(int(number))) - 2)
    return int(number) // scale * scale


def _one_digit(number: float) -> int:
    """1, 2, 5, 10, 20 or 50, the largest that is not above."""
    return max((one for one in (1, 2, 5, 10, 20, 50) if one <= number), default=1)
