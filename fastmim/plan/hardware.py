"""What a GPU can hold, compute and move: the known ones, and a custom one.

``memory`` is what a process can allocate: the data sheet's capacity less 1 to 3 GiB for driver, CUDA context and
libraries. ``flops`` and ``bandwidth`` are ceilings of kernels, ``link`` is what one GPU sends in one direction to
the others of its machine and ``network`` to other machines. Where no other source is named, NVIDIA's data sheet
says so, for dense products with float32 sums and without sparsity. ``slots`` are what all schedulers issue: 4 an SM,
one warp instruction a cycle at the boost clock. ``fp32`` is the data sheet's rate outside the
tensor cores: float32 products are computed in float32 (torch's default), not in TF32.
"""

from __future__ import annotations

import dataclasses
import difflib

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Ceilings of one GPU: GiB, FLOP/s in bf16 (fp16 where there is no bf16) and in fp32, bytes/s, warp instructions/s.

    0 is unknown; without ``slots`` a launch has two roofs.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float = 0.0
    link: float = 0.0
    network: float = 0.0
    bf16: bool = True
    source: str = ""
    fp32: float = 0.0
    slots: float = 0.0

    def at(self, precision: str) -> Gpu:
        """The same GPU with the FLOP/s of a precision, where they are known."""
        if precision != "fp32" or not self.fp32:
            return self
        return dataclasses.replace(self, flops=self.fp32, source=f"{self.source}; fp32: data sheet")

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """Roofline time of a launch."""
        return max(flops / self.flops, bytes_moved / self.bandwidth)


def _gpu(
    name: str,
    memory: float,
    tflops: float,
    bandwidth: float,
    link: float,
    source: str,
    *,
    fp32: float = 0.0,
    network: float = 25.0,
    bf16: bool = True,
    sms: int = 0,
    ghz: float = 0.0,
) -> Gpu:
    rates = tflops * 1e12, bandwidth * 1e9, memory, link * 1e9, network * 1e9
    return Gpu(name, *rates, bf16=bf16, source=source, fp32=fp32 * 1e12, slots=4e9 * sms * ghz)


_MEASURED = "FLOP/s and bandwidth: ceilings measured on the device; memory and links: data sheet"
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu(
            "v100-16g", 15, 125, 900, 150, "V100 SXM2 data sheet", fp32=15.7, network=12.5, bf16=False, sms=80, ghz=1.53
        ),
        _gpu(
            "v100-32g", 31, 125, 900, 150, "V100 SXM2 data sheet", fp32=15.7, network=12.5, bf16=False, sms=80, ghz=1.53
        ),
        _gpu("a100-40g", 39, 312, 1555, 300, "A100 SXM data sheet", fp32=19.5, sms=108, ghz=1.41),
        _gpu("a100-80g", 78, 312, 1750, 300, _MEASURED, fp32=19.5, sms=108, ghz=1.41),
        _gpu("h100-80g", 78, 798, 3000, 450, _MEASURED, fp32=67, network=50, sms=132, ghz=1.755),
        _gpu(
            "h200-141g",
            138,
            798,
            4800,
            450,
            "data sheet; FLOP/s: the H100's, same chip",
            fp32=67,
            network=50,
            sms=132,
            ghz=1.755,
        ),
        _gpu("b200-180g", 177, 2250, 8000, 900, "HGX B200 data sheet", fp32=75, network=50),
        _gpu(
            "rtx4090-24g",
            23,
            165.2,
            1008,
            32,
            "Ada data sheet; link: PCIe 4.0 x16",
            fp32=82.6,
            network=12.5,
            sms=128,
            ghz=2.52,
        ),
    )
}
"""By name, smallest and oldest first. ``network``: one 100, 200 or 400 Gb/s adapter a GPU, as is usual for each."""

MEASURED = tuple(
    dataclasses.replace(GPUS[name], name=chip) for chip, name in (("H100", "h100-80g"), ("A100", "a100-80g"))
)
"""GPUs whose ceilings were measured, by the name that their drivers' names contain."""


def in_precision(precision: str) -> dict[str, Gpu]:
    """The known GPUs that compute in a precision, with its FLOP/s."""
    return {name: gpu.at(precision) for name, gpu in GPUS.items() if gpu.bf16 or precision != "bf16"}


_CUSTOM = {"memory": "GiB", "tflops": "TFLOP/s", "bandwidth": "GB/s", "link": "GB/s", "network": "GB/s"}


def find_gpu(text: str) -> Gpu:
    """A known GPU by name, or ``name=mine,memory=48,tflops=180,bandwidth=900,link=50[,network=25]``.

    ``h100`` means the one known H100; ``a100`` is refused because there are two.

    Raises:
        ValueError: unknown, ambiguous or incomplete; names the nearest.
    """
    if "=" in text:
        return _custom(text)
    name = text.strip().lower().replace("_", "-").replace(" ", "")
    found = [known for known in GPUS if known == name or known.split("-")[0] == name]
    if len(found) == 1:
        return GPUS[found[0]]
    if found:
        raise ValueError(f"--gpu {text}: there is more than one; use {' or '.join(found)}")
    chips = {known.split("-")[0]: known for known in GPUS} | {known: known for known in GPUS}
    close = difflib.get_close_matches(name, chips, n=1, cutoff=0)[0]
    raise ValueError(
        f"--gpu {text}: unknown; the nearest is {chips[close]}; known are {', '.join(GPUS)}, or give "
        "name=mine,memory=48,tflops=180,bandwidth=900,link=50"
    )


def _custom(text: str) -> Gpu:
    pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
    name = pairs.pop("name", "custom")
    unknown = [key for key in pairs if key not in _CUSTOM]
    if unknown:
        raise ValueError(f"--gpu {text}: unknown key {unknown[0]!r}; use name, {', '.join(_CUSTOM)}")
    required = ("memory", "tflops", "bandwidth", "link")
    missing = [key for key in required if key not in pairs]
    if missing:
        raise ValueError(f"--gpu {text}: {missing[0]} is missing; give {missing[0]}=NUMBER ({_CUSTOM[missing[0]]})")
    values = {key: _positive(text, key, value) for key, value in pairs.items()}
    memory, tflops, bandwidth, link = (values[key] for key in required)
    return _gpu(name, memory, tflops, bandwidth, link, "as given", network=values.get("network", 25.0))


def _positive(text: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"--gpu {text}: {key}={value} must be a positive number ({_CUSTOM[key]})")
    return number
