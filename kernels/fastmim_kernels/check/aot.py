"""Ahead-of-time compilation of the kernels, without a GPU, and what the machine code says about them.

``triton.compile`` needs no driver; ``cuobjdump`` and ``nvdisasm`` ship inside Triton's wheel. Run it in a
process without ``TRITON_INTERPRET``: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..common.aot_case import AotCase, in_dtype
from . import aot_bytes
from .issue_slots import ARCH, code_of

_SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED_SHARED = 1024  # per block, by the CUDA runtime
_REGISTERS_PER_SM, _THREADS_PER_SM, _BLOCKS_PER_SM = 65536, 2048, 32

_OPCODE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_]+)*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def kernel_modules() -> list[str]:
    """Names (``mlp.on_triton``) of the modules of this package that define ``aot_cases()``; none is imported."""
    root = Path(__file__).parents[1]
    return sorted(f"{path.parent.name}.{path.stem}" for path in root.glob("*/*.py")
                  if re.search(r"^def aot_cases\b", path.read_text(encoding="utf-8"), re.MULTILINE))


def own_cases_of(module: str) -> list[AotCase]:
    """``aot_cases()`` of one of :func:`kernel_modules`."""
    return list(importlib.import_module(f"fastmim_kernels.{module}").aot_cases())


def cases_of(module: str) -> list[AotCase]:
    """``aot_cases()`` of one of :func:`kernel_modules`, and its quick ones in the other precisions.

    Raises:
        ValueError: Two cases share a name.
    """
    cases = own_cases_of(module)
    cases += [in_dtype(case, dtype) for case in cases if case.quick and "*bf16" in case.signature.values()
              for dtype in case.others if min(case.archs) < 100]
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"aot_cases() of {module}: names must be unique, got {sorted(names)}")
    return cases


def compile_case(case: AotCase, arch: int) -> dict[str, Any]:
    """Compile for ``sm_<arch>`` and measure the machine code.

    Returns:
        ``registers`` a thread, ``spills`` (local loads and stores), ``local_bytes`` a thread, ``shared_bytes``
        a block, ``loads`` and ``stores`` (global instructions by bits a thread), ``share_128`` (share of the
        global bytes that go through accesses of 128 bits or more, see :mod:`.aot_bytes`),
        ``hmma``, ``hgmma``, ``tcgen05`` (instruction counts), ``atomics`` on floating-point values, ``arrivals``
        (those on integers, whose order changes no result), ``blocks_per_sm``, and, on the architecture of the issue
        roof, ``once`` and ``loops``, the instructions of :class:`.issue_slots.Code`.
    """
    compiled = compiled_case(case, arch)
    share = aot_bytes.share_128(compiled.asm["ttgir"], compiled.asm["ptx"])
    return {**_measure(compiled.asm["cubin"], compiled.metadata.shared, case.num_warps, arch), "share_128": share}


def compiled_case(case: AotCase, arch: int) -> Any:
    """Triton's compiled kernel for ``sm_<arch>``.

    Raises:
        ValueError: The case and the kernel disagree about its arguments.
    """
    names = list(case.kernel.arg_names)
    unknown = {*case.signature, *case.constexprs, *case.divisible} - set(names)
    missing = set(names) - {*case.signature, *case.constexprs}
    if unknown or missing:
        raise ValueError(f"{case.name}: {case.kernel.__name__} has no {sorted(unknown)} and lacks {sorted(missing)}")
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    constexprs = {(names.index(n),): v for n, v in case.constexprs.items()}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned if n not in case.constexprs}
    return triton.compile(
        ASTSource(case.kernel, signature, constexprs, attrs), target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg})


def _measure(cubin: bytes, shared: int, num_warps: int, arch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _USAGE.search(_tool("cuobjdump", "-res-usage", str(path)))
    sass = disassembled(cubin)
    assert usage is not None
    registers, stack, _, local = map(int, usage.groups())
    counts = _count(sass)
    threads = 32 * num_warps
    blocks = min(_REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads), _THREADS_PER_SM // threads,
                 _SHARED_PER_SM[arch] // (shared + _RESERVED_SHARED), _BLOCKS_PER_SM)
    return {"registers": registers, "local_bytes": stack + local, "shared_bytes": shared, **counts,
            "blocks_per_sm": blocks, **(code_of(sass).row() if arch == ARCH else {})}


def disassembled(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _tool("nvdisasm", "-c", str(path))


def _tool(name: str, *args: str) -> str:
    nvidia = importlib.import_module("triton.backends.nvidia")
    command = [str(Path(nvidia.__path__[0]) / "bin" / name), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _count(sass: str) -> dict[str, Any]:
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    seen = {"spills": 0, "hmma": 0, "hgmma": 0, "tcgen05": 0, "atomics": 0, "arrivals": 0}
    for match in _OPCODE.finditer(sass):
        opcode, suffixes = match[1], match[2]
        if opcode in ("LDL", "STL"):
            seen["spills"] += 1
        elif opcode in ("HMMA", "IMMA", "DMMA"):
            seen["hmma"] += 1
        elif opcode == "HGMMA":
            seen["hgmma"] += 1
        elif opcode.startswith("UTC") and opcode.endswith("MMA"):
            seen["tcgen05"] += 1
        elif opcode.startswith(("ATOMG", "RED")) and opcode != "REDUX" or opcode == "ATOM":
            floating = any(part.startswith(("F16", "F32", "F64", "BF16")) for part in suffixes.split("."))
            seen["atomics" if floating else "arrivals"] += 1
        elif opcode in ("LDG", "LDGSTS", "STG") or opcode.startswith(("UTMALDG", "UTMASTG")):
            bits = 128 if opcode.startswith("UTMA") else _bits(suffixes)
            table = stores if opcode.startswith(("STG", "UTMAS")) else loads
            table[bits] = table.get(bits, 0) + 1
    return {"loads": dict(sorted(loads.items())), "stores": dict(sorted(stores.items())), **seen}


def _bits(suffixes: str) -> int:
    for part in suffixes.split("."):
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:])
    return 32
