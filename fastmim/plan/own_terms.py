"""What the rule for one's own images (:mod:`.own`) is given, what it gives back, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .hardware import GIB

LADDER = (("vit_tiny", 0), ("swinv2_tiny", 1_000), ("swinv2_small", 20_000), ("swinv2_base", 200_000))
"""Encoders from small to large, and the images that each should have at least."""
POSITIONS = {"mae": "sincos", "ibot": True, "dino": True}
"""``model.abs_pos_embed`` of a ViT by objective: one that sees a part of the patches, or crops of several sizes, has no
table of biases."""
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
