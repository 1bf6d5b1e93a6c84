"""The teachers of an objective under ZeRO: moving averages in float32, cut among the ranks like Adam's moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmim.engine.distributed import World
from fastmim.engine.zero import fragments
from fastmim.engine.zero.fragments import Fragment

# Torch 2.14 has given it another name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Averages:
    """One slot more beside each flattened master weight, with the teacher's weights in the places of the student's.

    The teacher's parameters are copies of the slots in the dtype of the forward pass: an average kept in bf16 would
    stand still, because (1 − m)·(student − teacher) is less than half of its last digit. At stages 1 and 2 they become
    views of flat tensors with the layout of the student's, which one all-gather a group fills; at stage 3 each rank
    writes its own part of them.

    Args:
        pairs: (name of the teacher's parameter, this parameter, the student's, which is trained).
        pieces: this rank's share of the students, from :func:`fastmim.engine.zero.fragments.fragments`.
        groups: the trainable parameters of each optimiser group, before DeepSpeed has flattened them, and, at stages 1
            and 2, this rank's part of the flattened group; else None.
        stage: of ZeRO, 1 to 3.
        world: this process.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, nn.Parameter, nn.Parameter]],
        pieces: Sequence[Fragment],
        groups: Sequence[tuple[Sequence[nn.Parameter], Tensor | None]],
        *,
        stage: int,
        world: World,
    ) -> None:
        self.pairs, self.stage, self.world = pairs, stage, world
        self.names = {name for name, _, _ in pairs}
        students = {id(student) for _, _, student in pairs}
        self._pieces: dict[int, list[Fragment]] = {}
        for piece in pieces:
            self._pieces.setdefault(id(piece.param), []).append(piece)
        keys = [key for params, key in groups if key is not None and any(id(param) in students for param in params)]
        if stage == 3:
            keys = list({id(piece.key): piece.key for piece in pieces if id(piece.param) in students}.values())
        self._keys = keys
        self._slots = [torch.zeros_like(key, dtype=torch.float32, requires_grad=False) for key in keys]
        self._slot = {id(key): slot for key, slot in zip(keys, self._slots, strict=True)}
        self._flat = self._lay_out(groups) if stage < 3 else []
        with torch.no_grad():
            for (_, _, slot), copy in zip(self.own(), self._copies(), strict=True):
                slot.copy_(copy)

    def own(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name, start, this rank's part (a view) from there on) of the teachers' flattened parameters, float32."""
        for name, _, student in self.pairs:
            for piece in self._pieces.get(id(student), []):
                yield name, piece.start, piece.of(self._slot[id(piece.key)])

    def _copies(self) -> Iterator[Tensor]:
        """The same parts of the parameters that the forward pass reads."""
        for name, teacher, student in self.pairs:
            for piece in self._pieces.get(id(student), []):
                if self.stage == 3:
                    start, values = fragments.own_part(teacher, self.world.rank)
                    if (start, len(values)) != (piece.start, piece.count):
                        raise RuntimeError(f"{name}: DeepSpeed cuts it otherwise than its student")
                    yield values
                else:
                    yield teacher.detach().reshape(-1).narrow(0, piece.start, piece.count)

    def _lay_out(self, groups: Sequence[tuple[Sequence[nn.Parameter], Tensor | None]]) -> list[Tensor]:
        """The teachers' parameters as views of one tensor per key, which holds the parts of all ranks one by one."""
        teachers: dict[int, list[nn.Parameter]] = {}
        for _, teacher, student in self.pairs:
            teachers.setdefault(id(student), []).append(teacher)
        flat: dict[int, Tensor] = {}
        for params, key in groups:
            for student in params:
                for teacher in teachers.get(id(student), []):
                    assert key is not None
                    if id(key) not in flat:
                        flat[id(key)] = teacher.new_zeros(self.world.size * key.numel(), requires_grad=False)
                    # DeepSpeed has made the student's parameters views of such a tensor, too.
                    place = flat[id(key)].narrow(0, student.storage_offset(), teacher.numel()).view(teacher.shape)
                    self._check_place(student, key)
                    place.copy_(teacher.detach())
                    teacher.data = place
        return [flat[id(key)] for key in self._keys]

    def _check_place(self, student: nn.Parameter, key: Tensor) -> None:
        for piece in self._pieces.get(id(student), []):
            if student.storage_offset() + piece.start != self.world.rank * key.numel() + piece.offset:
                raise RuntimeError(f"{piece.name}: DeepSpeed lays it out otherwise than it cuts it")

    @torch.no_grad()
    def move(self, momentum: float) -> None:
        """Every teacher becomes momentum·itself + (1 − momentum)·its student's master weights; all ranks call it."""
        if self._slots:
            torch._foreach_lerp_(self._slots, self._keys, 1 - momentum)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the slots into the parameters that the forward pass reads, on every rank; all ranks call it."""
        if self.stage == 3:
            parts = list(zip(self._copies(), (slot for _, _, slot in self.own()), strict=True))
            fragments.set_own_parts([teacher for _, teacher, _ in self.pairs], parts)
            return
        for slot, flat in zip(self._slots, self._flat, strict=True):
            part = flat.narrow(0, self.world.rank * slot.numel(), slot.numel())
            part.copy_(slot)
            _all_gather(flat, part)

    def held_bytes(self) -> int:
        """Of the slots."""
        return sum(slot.untyped_storage().nbytes() for slot in self._slots)


def refuse(zero: Mapping[str, Any]) -> None:
    """Refuse settings of DeepSpeed's section ``zero_optimization`` under which a teacher's weights are out of reach.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise ValueError(
                f"efficiency.{name}=nvme: not with an objective that has a teacher, which is updated in memory; use cpu"
            )
    for name, plain in (("zero_quantized_nontrainable_weights", False), ("zero_hpz_partition_size", 1)):
        if zero.get(name, plain) != plain:
            raise ValueError(
                f"efficiency.deepspeed.zero_optimization.{name}={zero[name]}: not with an objective that has a "
                "teacher, of which DeepSpeed would keep a second copy; leave it out"
            )
