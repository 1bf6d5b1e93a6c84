"""What an update does beyond DeepSpeed: it clips tensor by tensor, and leaves out what is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmim.engine.zero.fragments import Fragment


class UpdateHooks:
    """Hooks around ``optimizer.step()``, where DeepSpeed has put this rank's reduced and unscaled gradients.

    DeepSpeed calls it once an update, or once for each flattened group, on every rank alike.

    Args:
        optimizer: the one that holds the moments.
        groups: the trainable parameters of each of its groups, before DeepSpeed has flattened them.
        pieces: this rank's share, from :func:`fastmim.engine.zero.fragments.fragments`; with ``whole`` all of them.
        names: all trainable parameters, in one order on every rank.
        clip_each: norm that the gradient of every tensor is clipped to by itself; None switches it off.
        frozen: what the coming update leaves out; whole groups.
        whole: every rank holds all gradients (stage 0), so that ranks have nothing to add up.
        device: where ranks add up otherwise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Sequence[nn.Parameter]],
        pieces: Iterable[Fragment],
        names: Sequence[str],
        *,
        clip_each: float | None,
        frozen: Callable[[], Iterable[nn.Parameter]],
        whole: bool,
        device: torch.device,
    ) -> None:
        self.clip_each, self._frozen, self._whole, self._device = clip_each, frozen, whole, device
        # DeepSpeed replaces the list of a group's parameters, and keeps the group.
        self._members = {id(group): params for group, params in zip(optimizer.param_groups, groups, strict=True)}
        self._places = {name: i for i, name in enumerate(names)}
        self._pieces: dict[int, list[Fragment]] = {}
        for piece in pieces:
            self._pieces.setdefault(id(piece.key), []).append(piece)
        self._seen: set[int] = set()
        self._withheld: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def check(self) -> None:
        """After an update: the optimiser has done it, all groups.

        Raises:
            RuntimeError: DeepSpeed has updated some group without it, as its ZenFlow does.
        """
        missing = len(self._members.keys() - self._seen)
        self._seen.clear()
        if missing:
            raise RuntimeError(
                f"DeepSpeed has updated {missing} of {len(self._members)} groups past the optimiser, where nothing "
                "clips tensors or freezes layers; take its experimental settings out of efficiency.deepspeed"
            )

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        frozen = {id(param) for param in self._frozen()}
        for group in optimizer.param_groups:
            if group["params"]:  # stage 3 leaves one group its parameters at a time
                self._seen.add(id(group))
            keys = [key for key in group["params"] if key.grad is not None]
            if self._is_frozen(id(group), frozen):
                for key in keys:
                    self._withheld.append((key, key.grad))
                    key.grad = None
            elif self.clip_each and keys:
                self._clip(keys, self.clip_each)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """DeepSpeed finds its buffers of gradients where it left them."""
        for key, grad in self._withheld:
            key.grad = grad
        self._withheld.clear()

    def _is_frozen(self, group: int, frozen: set[int]) -> bool:
        members = self._members[group]
        count = sum(id(param) in frozen for param in members)
        if count not in (0, len(members)):
            raise ValueError(
                f"frozen() of the objective names {count} of the {len(members)} parameters of an optimiser group: "
                "a group is frozen as a whole or not at all; let freezable() name the same parameters"
            )
        return count > 0

    @torch.no_grad()
    def _clip(self, keys: list[Tensor], most: float) -> None:
        """Scale the gradient of every tensor by most/(its norm + 1e-6) where that is below 1, as DINO and iBOT do."""
        own = [(key.grad, piece) for key in keys if key.grad is not None for piece in self._pieces.get(id(key), [])]
        grads = [piece.of(grad) for grad, piece in own]
        places = torch.tensor([self._places[piece.name] for _, piece in own], dtype=torch.int64, device=self._device)
        squares = torch.zeros(len(self._places), dtype=torch.float64, device=self._device)
        if grads:
            norms = torch.stack(torch._foreach_norm(grads))
            squares.index_add_(0, places, norms.to(self._device).double().square())
        if not self._whole:
            dist.all_reduce(squares)
        if grads:
            scales = (most / (squares.sqrt() + 1e-6)).clamp(max=1.0)[places]
            torch._foreach_mul_(grads, list(scales.to(grads[0]).unbind()))
