"""What the micro-batches of an unfinished step have changed, put back: a checkpoint is of whole steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmim.engine.rng import rng_state, set_rng_state


class StepStart:
    """A copy of what a micro-batch changes before its step's update, taken before the first of them.

    That is the generators, the sums of losses, and the buffers that an objective's forward pass adds to. Gradients
    are not kept, and weights do not change. Copying does not wait for the device.

    Args:
        objective: whose persistent buffers are kept.
        sums, count: the engine's losses, and how many micro-batches are in them.
        device: of the generator.
    """

    def __init__(self, objective: nn.Module, sums: Mapping[str, Tensor], count: int, device: torch.device) -> None:
        self.count = count
        self._device, self._rng = device, rng_state(device)
        self._sums = {name: value.clone() for name, value in sums.items()}
        kept = objective.state_dict(keep_vars=True)
        self._buffers = [(b, b.detach().clone()) for name, b in objective.named_buffers() if name in kept]

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Put everything back; ``sums`` that are new since then become 0."""
        set_rng_state(self._rng, self._device)
        with torch.no_grad():
            for name, value in sums.items():
                value.copy_(self._sums[name]) if name in self._sums else value.zero_()
            for buffer, before in self._buffers:
                buffer.copy_(before)
