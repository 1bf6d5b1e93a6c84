"""The name under which scripts from outside reach the kernels of ``linear_masked_l1``, to set their limits."""

from .masked_loss import linear_on_triton as linear_loss

__all__ = ["linear_loss"]
