"""``fastmim features``: what a frozen encoder gives for every image of a folder, as a file of tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastmim.data.index import ImageIndex
from fastmim.data.labelled import frozen_loader
from fastmim.data.labels import UNLABELLED, Labels, read_labels
from fastmim.data.names import printable
from fastmim.engine.checkpoint.shards import Entry, write_safetensors
from fastmim.engine.probe import encoder_file, load_encoder
from fastmim.evaluate.protocols import natural_pool
from fastmim.files import naming, replacing, write_text
from fastmim.models.features import Tokens, block_features
from fastmim.wording import plural

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Extracted(NamedTuple):
    """What :func:`extract_features` has written.

    Attributes:
        shapes: of each tensor in the file.
        files: names of the images, a row each.
        bad: of each image that is left out, why.
        classes: names of the labels' numbers; None without labels.
        pool: "cls" or "mean".
    """

    shapes: dict[str, tuple[int, ...]]
    files: list[str]
    bad: dict[str, str]
    classes: tuple[str, ...] | None
    pool: str


def extract_features(
    source: str | Path,
    index: ImageIndex,
    out: str | Path,
    *,
    device: torch.device,
    layers: Sequence[int] | None = None,
    maps: bool = False,
    pool: str | None = None,
    dtype: str = "float32",
    batch: int = 64,
    labels: str | Path | None = None,
    reading: dict[str, Any] | None = None,
    called: str | Path | None = None,
    told: Callable[[str, int, int], None] = lambda *_: None,
) -> Extracted:
    """Write ``out`` (.safetensors) and beside it a .json of the same name, with the names of the images in its order.

    ``pooled`` is (N, D) and ``maps`` (N, h, w, D), behind the final norm; with `layers` each under ``block_03.pooled``
    and the like, where a Swin's earlier stages have no norm. Images with a class have ``labels`` (N,) int64. One batch
    is in memory at a time: rows go to files beside `out`, which need its space once more until it is complete.

    Args:
        source: a run's output folder, a checkpoint, or an encoder's file of ours.
        index: the images.
        out: appears complete or not at all.
        device: where the encoder runs.
        layers: numbers of blocks from 1 on, or from -1 (the last) down; None: the last.
        maps: the tokens of every patch too.
        pool: "cls" or "mean"; None: as pretraining has it.
        dtype: of what is stored, of :data:`DTYPES`.
        batch: images in a forward pass.
        labels: CSV of file,class; None: the class folders or ``.cls`` members, if all images have one.
        reading: arguments of :func:`fastmim.data.build_loader`.
        called: what the log calls the source; None: its path.
        told: called with ("images", done, total).

    Raises:
        ValueError: there is no encoder, no such block, no readable image, or `out` is no .safetensors file.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: must end in .safetensors")
    with encoder_file(Path(source)) as file:
        objective = load_encoder(file, called=called or source).to(device)
    objective.has_gaps = (reading or {}).get("no_data") is not None
    encoder, pool = objective.encoder, pool or natural_pool(objective.encoder)
    blocks = _blocks(layers, len(encoder.all_blocks()))
    classes = _classes(index, labels)
    names = [""] if layers is None else [f"block_{number + 1:02d}." for number in blocks]
    keep = partial(_kept, pool=pool, maps=maps)
    loader = frozen_loader(index, objective.img_size, in_chans=objective.in_chans, micro_batch_size=batch,
                           device=device, **(reading or {}))  # fmt: skip
    ids: list[int] = []
    with closing(loader), _columns(out, DTYPES[dtype]) as columns:
        for images, numbers in loader.epoch(0):
            found = block_features(encoder, objective.normalise(images), blocks, True, keep)
            for name, kept in zip(names, found, strict=True):
                for kind, rows in kept.items():
                    columns.add(name + kind, rows)
            ids += numbers.tolist()
            told("images", len(ids), len(index))
        if not ids:
            raise ValueError("no readable image there; give another folder")
        more = [] if classes is None else [_label_entry(classes, ids)]
        entries = [*columns.entries(len(ids)), *more]
        files, bad = [printable(os.fsdecode(index.name(number))) for number in ids], loader.bad_files
        done = Extracted({entry.key: entry.shape for entry in entries}, files, dict(sorted(bad.items())),
                         None if classes is None else classes.classes, pool)  # fmt: skip
        with replacing(out) as unfinished:
            write_safetensors(unfinished, entries, {"format": "pt", "source": "fastmim features"})
    write_text(out.with_suffix(".json"), json.dumps(_beside(done, index, blocks, encoder), indent=1) + "\n")
    return done


def _blocks(layers: Sequence[int] | None, count: int) -> list[int]:
    """Numbers from 0 on, rising."""
    wanted = [count] if layers is None else [layer + count + 1 if layer < 0 else layer for layer in layers]
    for layer, number in zip(layers or wanted, wanted, strict=True):
        if not 1 <= number <= count:
            has = f"this encoder has {plural(count, 'block')}"
            raise ValueError(f"--layers {layer}: {has}; give 1 to {count}, or -1 to -{count}")
    return sorted({number - 1 for number in wanted})


def _classes(index: ImageIndex, table: str | Path | None) -> Labels | None:
    if table is not None:
        return read_labels(index, table)
    try:
        return read_labels(index)
    except ValueError:
        return None  # no class folders: nobody has said that there were


def _kept(tokens: Tokens, *, pool: str, maps: bool) -> dict[str, Tensor]:
    pooled = {"pooled": getattr(tokens.pooled(), pool)}
    return pooled | {"maps": tokens.patches} if maps else pooled


def _label_entry(labels: Labels, ids: list[int]) -> Entry:
    rows = torch.from_numpy(labels.numbers)[ids]
    return Entry("labels", torch.int64, (len(ids),), lambda: rows)


def _beside(done: Extracted, index: ImageIndex, blocks: list[int], encoder: Any) -> dict[str, Any]:
    """What a reader of the tensors wants to know; labels are numbers of ``classes``, -1 without a class."""
    assert UNLABELLED == -1
    return {
        "files": done.files,
        "root": printable(index.root),
        "bad": done.bad,
        "classes": done.classes,
        "pool": done.pool,
        "blocks": [number + 1 for number in blocks],
        "encoder": encoder.settings,
    }


class _Columns:
    """Rows of several tensors on their way into one file, each in a file of its own until all are there."""

    def __init__(self, out: Path, folder: Path, dtype: torch.dtype, stack: ExitStack) -> None:
        self.out, self.folder, self.dtype, self._stack = out, folder, dtype, stack
        self._files: dict[str, BinaryIO] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, rows: Tensor) -> None:
        if name not in self._files:
            self._files[name] = self._stack.enter_context((self.folder / name).open("wb"))
            self._shapes[name] = tuple(rows.shape[1:])
        flat = rows.detach().to(self.dtype).cpu().contiguous().flatten()
        with naming(self.out):
            self._files[name].write(flat.view(torch.uint8).numpy().data)

    def entries(self, count: int) -> Iterator[Entry]:
        for name, file in self._files.items():
            file.flush()
            shape = (count, *self._shapes[name])
            yield Entry(name, self.dtype, shape, partial(self._read, name, math.prod(shape)))

    def _read(self, name: str, size: int) -> Tensor:
        """Pages of the file, read as they are copied."""
        return torch.from_file(str(self.folder / name), shared=False, size=size, dtype=self.dtype)


@contextmanager
def _columns(out: Path, dtype: torch.dtype) -> Iterator[_Columns]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:100]}.") as folder, ExitStack() as stack:
        yield _Columns(out, Path(folder), dtype, stack)
