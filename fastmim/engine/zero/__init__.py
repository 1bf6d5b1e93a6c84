"""Training under DeepSpeed's ZeRO: the engine, how a model is built in pieces, and what DeepSpeed is told."""

from fastmim.engine.zero.engine import ZeroEngine

__all__ = ["ZeroEngine"]
