"""What every list of images is, wherever they lie."""

from __future__ import annotations

from typing import Protocol


class ImageIndex(Protocol):
    """An immutable, ordered list of images, wherever they lie; all methods may be called in worker processes."""

    root: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> bytes:
        """The name of image `index` below its root, as bytes: the same wherever the root lies."""
        ...

    def label(self, index: int) -> str:
        """The name of image `index`, safe to print and to write as UTF-8."""
        ...

    def read(self, index: int) -> bytearray:
        """The encoded bytes of image `index`; DecodeError when they cannot be read."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and order."""
        ...
