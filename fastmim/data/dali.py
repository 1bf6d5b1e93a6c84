"""DALI: encoded bytes in, cropped uint8 batches on the device out. One graph for the GPU and for the CPU.

The order, the boxes, the flips and the stand-ins come from the same worker code as in the torchvision loader; DALI
gets bytes and boxes and decides nothing. So a restart is a replay of the position, exact for any number of workers
or threads, and both loaders cut the same pixels out of the same files.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmim.data.augment import Crop, View
from fastmim.data.decode import DecodeError
from fastmim.data.loader import Loader
from fastmim.data.worker import Encoded, EncodedDataset, Request, Result

#: Micro-batches inside DALI: one that is handed out and one that is being made behind it.
DEPTH = 2
_INTERPOLATIONS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC", "lanczos": "INTERP_LANCZOS3"}
_LOG = logging.getLogger("fastmim")


def have_dali() -> bool:
    """Whether DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def build_pipeline(
    views: Sequence[View], *, batch_size: int, num_threads: int, device_id: int | None, on_gpu: bool, in_chans: int = 3
) -> Any:
    """The graph, not yet built: `on_gpu` decides the devices of its operators and nothing else.

    Inputs, fed by name: ``data`` (uint8 bytes), ``region`` (int32: top, left, height, width of what is decoded) and
    ``crops`` (int32 (crops, 6), relative to the region). Outputs: one uint8 (C, h, w) batch a crop.

    Args:
        device_id: None builds a graph that needs no GPU; with `on_gpu` that one can be serialised, not run.

    Raises:
        ModuleNotFoundError: DALI is not installed.
    """
    import nvidia.dali as dali

    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=DEPTH,
    )
    with pipeline:
        pipeline.set_outputs(*_graph(views, on_gpu, in_chans))
    return pipeline


def _graph(views: Sequence[View], on_gpu: bool, in_chans: int) -> list[Any]:
    from nvidia.dali import fn
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its constants are not in DALI's stubs
    data: Any = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
    region: Any = fn.external_source(name="region", dtype=types.INT32, ndim=1)
    crops: Any = fn.external_source(name="crops", dtype=types.INT32, ndim=2)
    images: Any = fn.decoders.image_slice(
        data,
        start=region[0:2],
        shape=region[2:4],
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.GRAY if in_chans == 1 else types.RGB,
        adjust_orientation=False,  # as torchvision: EXIF is not heeded
        jpeg_fancy_upsampling=True,  # as libjpeg's default
    )
    kinds = [view for view in views for _ in range(view.count)]
    outputs = []
    for k, view in enumerate(kinds):
        # One crop is the region itself; of several, the region is what holds them all.
        cut = images if len(kinds) == 1 else fn.slice(images, start=crops[k, 0:2], shape=crops[k, 2:4], axis_names="HW")
        interp = getattr(types, _INTERPOLATIONS[view.interpolation])
        resized: Any = fn.resize(cut, size=list(view.size), interp_type=interp, antialias=True)
        outputs.append(
            fn.crop_mirror_normalize(
                resized, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0], mirror=crops[k, 4]
            )
        )
    return outputs


class _Decoder:
    """One built pipeline, filled ahead by :data:`DEPTH` micro-batches."""

    def __init__(self, options: dict[str, Any], views: Sequence[View], device: torch.device) -> None:
        self._pipeline = build_pipeline(views, **options)
        self._pipeline.build()
        self._views, self._device, self._fed = views, device, 0

    def feed(self, batch: Encoded) -> None:
        """Hand a micro-batch in; from the :data:`DEPTH`-th on, DALI works."""
        data, ends = batch.data.numpy(), [0, *batch.ends.tolist()]
        regions, crops = regions_of(batch.crops.numpy())
        self._pipeline.feed_input("data", [data[a:b] for a, b in zip(ends, ends[1:], strict=False)])
        self._pipeline.feed_input("region", regions)
        self._pipeline.feed_input("crops", crops)
        self._fed += 1
        # The first call starts as many micro-batches as the queue is deep: all of them must have been fed.
        if self._fed >= DEPTH:
            self._pipeline.schedule_run()

    def take(self) -> list[Tensor]:
        """The oldest micro-batch, one uint8 (count, B, C, h, w) a view; RuntimeError when DALI cannot decode it."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        # Bound to the stream they are copied on: DALI reuses their memory only behind the copy, and nothing waits.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        outputs = iter(self._pipeline.share_outputs(cuda_stream=stream))
        views = []
        for view in self._views:
            crops = [next(outputs).as_tensor() for _ in range(view.count)]
            out = torch.empty((view.count, *crops[0].shape()), dtype=torch.uint8, device=self._device)
            for crop, place in zip(crops, out, strict=True):
                feed_ndarray(crop, place, cuda_stream=stream)
            views.append(out)
        self._pipeline.release_outputs()
        return views


def regions_of(crops: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """int32 crops (V, B, 6) -> regions (B, 4) that hold every crop of an image, crops (B, V, 6) relative to them."""
    start = crops[..., 0:2].min(0)
    stop = (crops[..., 0:2] + crops[..., 2:4]).max(0)
    relative = crops.transpose(1, 0, 2).copy()
    relative[..., 0:2] -= start[:, None]
    return np.concatenate([start, stop - start], axis=1), relative


class _Pending(NamedTuple):
    request: Request
    batch: Encoded


class DaliLoader(Loader):
    """Worker processes read files and draw crops, DALI decodes, crops and resizes.

    What DALI cannot decode is looked for by decoding singly, replaced as every bad file is, and the pipeline is
    built anew; what only DALI refuses is decoded by `decode_image` from then on.
    """

    def __init__(self, dataset: EncodedDataset, *args: Any, num_threads: int, **kwargs: Any) -> None:
        super().__init__(dataset, *args, pin_memory=False, **kwargs)
        self._dataset = dataset
        on_gpu = self._device.type == "cuda"
        index = (self._device.index or 0) if on_gpu else None
        self._options: dict[str, Any] = dict(
            batch_size=self._requests.order.micro_batch_size,
            num_threads=num_threads,
            device_id=index,
            on_gpu=on_gpu,
            in_chans=dataset.in_chans,
        )
        self._refused: set[int] = set()  # DALI failed on these: bad, or decoded on the host from now on
        self._decoder: _Decoder | None = None

    def _open_stream(self) -> Iterator[Result]:
        return self._decoded(self._items(), self._requests.epoch, self._requests.start)

    def _decoded(self, stream: Iterator[Encoded], epoch: int, start: int) -> Iterator[Result]:
        self._decoder = self._new_decoder(self._dataset.views)
        pending: deque[_Pending] = deque()
        news: list[tuple[int, str]] = []
        while True:
            while len(pending) < DEPTH:
                batch = next(stream)
                if batch.error:
                    yield Result([], batch.crops, batch.sample_ids, news + batch.bad, batch.error)
                    return
                pending.append(self._screened(_Pending(Request(epoch, batch.sample_ids), batch)))
                self._decoder.feed(pending[-1].batch)
                start += 1
                if start == self._requests.order.micro_batches:
                    epoch, start = epoch + 1, 0
            try:
                views = self._decoder.take()
            except RuntimeError as err:
                news += self._find_culprits(pending, err)
                pending = deque(self._screened(entry) for entry in pending)
                failed = next((entry.batch for entry in pending if entry.batch.error), None)
                if failed is not None:
                    yield Result([], failed.crops, failed.sample_ids, news + failed.bad, failed.error)
                    return
                self._decoder = self._new_decoder(self._dataset.views)
                for entry in pending:
                    self._decoder.feed(entry.batch)
                continue
            batch = pending.popleft().batch
            yield Result(views, batch.crops, batch.sample_ids, news + batch.bad, "", batch.notes, batch.files)
            news = []

    def _screened(self, entry: _Pending) -> _Pending:
        """The same micro-batch, made again here where it holds a file that DALI refused earlier."""
        if not self._refused.intersection(entry.batch.files.tolist()):
            return entry
        again = self._dataset[entry.request]
        return entry._replace(batch=again._replace(bad=entry.batch.bad + again.bad))

    def _find_culprits(self, pending: Sequence[_Pending], err: RuntimeError) -> list[tuple[int, str]]:
        """Decode the files in flight singly; returns (file, reason) of the bad ones.

        Raises:
            RuntimeError: DALI's own, when every file can be decoded: then no file is to blame.
        """
        bad: list[tuple[int, str]] = []
        refused: set[int] = set()
        for file in sorted({file for entry in pending for file in entry.batch.files.tolist()} - self._refused):
            try:
                self._dataset.encode(file, as_is=False)
            except DecodeError as reason:
                bad.append((file, str(reason)))
                refused.add(file)
            else:
                if not self._dali_decodes(file):
                    refused.add(file)
                    _LOG.warning("DALI cannot decode %s: decoded by torchvision", self.index.label(file))
        if not refused:
            raise err
        self._refused |= refused
        self._dataset.known_bad |= {file for file, _ in bad}
        self._dataset.on_host |= refused
        return bad

    def _dali_decodes(self, file: int) -> bool:
        data, height, width = self._dataset.encode(file)
        box = torch.tensor([[Crop(0, 0, height, width, False)]], dtype=torch.int32)
        joined = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))
        one = torch.tensor([len(joined)])
        probe = self._new_decoder([View((8, 8))], batch_size=1)
        try:
            for _ in range(DEPTH):
                probe.feed(Encoded(joined, one, box, one, one, [], ""))
            probe.take()
        except RuntimeError:
            return False
        return True

    def _new_decoder(self, views: Sequence[View], **changes: Any) -> _Decoder:
        return _Decoder(self._options | changes, views, self._device)

    def close(self) -> None:
        """Stop the workers and free DALI's buffers. Safe to call twice."""
        super().close()
        self._decoder = None
