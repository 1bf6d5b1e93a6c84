"""An encoder as an ONNX file, compared with ONNX Runtime's results before it is kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.files import replacing
from fastmim.models import create_encoder
from fastmim.wording import install_extra

TOLERANCE = 1e-4
INPUT, OUTPUTS = "images", ("pooled", "tokens")
_MOST_BYTES = 1536 << 20
"""Beyond these the exporter writes a second file, whose name the first one holds."""
# Another number than the trace has seen, and one image, which programs like to take for a constant.
_TRACED, _TRIED = 2, (1, 3)


class _BothTokens(nn.Module):
    """(B, C, H, W) normalised → (B, D) what stands for the image, and the (B, h, w, D) map."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled, tokens = self.encoder.forward_tokens(images)
        return pooled, tokens


def export_onnx(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], out: Path, *, metadata: Mapping[str, str]
) -> float:
    """Write ``out``: input ``images``, any number, normalised; out go ``pooled`` (class token, or mean) and ``tokens``.

    Args:
        tensors: The encoder's weights by our names.
        settings: Arguments of :func:`fastmim.models.create_encoder`.
        out: The file; it appears when it has been compared.
        metadata: Stored in it.

    Returns:
        The largest difference from the encoder's own results, over noise in batches of 1 and 3.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed, and the line has the command; there are more than
            1.5 GiB of weights; the difference is above 1e-4 of the largest value.
    """
    _require(out)
    size = sum(tensor.numel() for tensor in tensors.values()) * torch.float32.itemsize
    if size > _MOST_BYTES:
        raise ValueError(f"{out}: {size / 1e9:.1f} GB of weights: an ONNX file holds less than 2 GB")
    model = _BothTokens(create_encoder(dict(settings), impl="reference"))
    model.encoder.load_state_dict({"mask_token": model.encoder.mask_token, **tensors})
    model = model.float().eval()
    shape = (model.encoder.in_chans, *model.encoder.img_size)
    with quiet():
        program: Any = torch.onnx.export(
            model, (torch.zeros(_TRACED, *shape),), dynamo=True, input_names=[INPUT], output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    program.model.metadata_props.update(metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        program.save(str(partial))
        difference, largest = _compared(model, str(partial), shape)
        if not difference <= TOLERANCE * max(largest, 1.0):
            raise ValueError(f"{out}: ONNX Runtime's results differ by {difference:.1e}: not written")
    return difference


def _require(out: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"{out}: ONNX needs {error.name}: {install_extra('onnx')}") from None


@torch.no_grad()
def _compared(model: nn.Module, file: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Largest difference, and largest value, of all outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    differences, values = [0.0], [0.0]
    generator = torch.Generator().manual_seed(0)
    for count in _TRIED:
        images = torch.randn(count, *shape, generator=generator)
        theirs = [torch.from_numpy(one) for one in session.run(list(OUTPUTS), {INPUT: images.numpy()})]
        for ours, other in zip(model(images), theirs, strict=True):
            differences.append(float((ours - other).abs().max()))
            values.append(float(ours.abs().max()))
    return max(differences), max(values)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress and its advice."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
