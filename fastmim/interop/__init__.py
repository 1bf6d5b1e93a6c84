"""Weights from and to other projects: Microsoft's checkpoints, timm, and our own encoder files."""

from .load import LoadReport, load_timm, load_weights
from .reference import load_reference

__all__ = ["LoadReport", "load_reference", "load_timm", "load_weights"]
