"""What this rank holds of the weights and moments under each ZeRO stage, as pieces of named parameters.

DeepSpeed flattens parameters and cuts the result among the ranks, differently at stages 1–2 and 3. Here a rank's
share is a list of :class:`Fragment`, whatever the stage: checkpoints and the memory report need no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.engine.checkpoint.shards import STEP

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """Elements ``start`` to ``start + count - 1`` of the flattened parameter ``name``.

    ``key`` is the tensor that the optimiser knows its state by, in which this fragment begins at ``offset``.
    """

    name: str
    start: int
    count: int
    param: nn.Parameter
    key: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """This fragment's part (a view) of the weight, or of a moment, shaped like ``key``."""
        return flat.reshape(-1).narrow(0, self.offset, self.count)


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, of which ZeRO-3 leaves nothing in ``param.shape``."""
    return tuple(getattr(param, "ds_shape", param.shape))


def fragments(objective: nn.Module, optimizer: Any, *, stage: int, rank: int, world_size: int) -> Iterator[Fragment]:
    """This rank's share of the trainable parameters.

    Args:
        objective: the module, prepared by DeepSpeed.
        optimizer: DeepSpeed's (stages 1–3), or the plain one (stage 0: whole parameters, dealt out in turn).
        stage: of ZeRO.
        rank, world_size: this process.
    """
    trainable = [(name, param) for name, param in objective.named_parameters() if param.requires_grad]
    for index, (name, param) in enumerate(trainable):
        if stage == 0:
            if index % world_size == rank:
                yield Fragment(name, 0, param.numel(), param, param, 0)
        elif stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
            start = rank * size
            count = min(size, param.ds_numel - start)  # type: ignore[attr-defined]  # the last ones hold padding
            if count > 0:
                yield Fragment(name, start, count, param, optimizer.fp32_partitioned_groups_flat[group], offset)
        elif param._hp_mapping is not None:  # type: ignore[attr-defined]
            mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
            key = flat_groups(optimizer)[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, here.start, here.numel, param, key, there.start)


def flat_groups(optimizer: Any) -> Any:
    """Stages 1 and 2: this rank's part of each flattened group of parameters, in fp32."""
    # DeepSpeed takes another optimiser class for stage 1 in bf16 with fp32 accumulation.
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def own_part(param: nn.Parameter, rank: int) -> tuple[int, Tensor]:
    """Stage 3: (start, the elements (a view) of a parameter's forward copy that lie on this rank), without padding."""
    part: Tensor = param.ds_tensor  # type: ignore[attr-defined]
    start = rank * part.numel()
    count = max(min(part.numel(), param.ds_numel - start), 0)  # type: ignore[attr-defined]
    return start, part.narrow(0, 0, count)


@torch.no_grad()
def set_own_parts(params: list[nn.Parameter], parts: list[tuple[Tensor, Tensor]]) -> None:
    """Stage 3: write (part of :func:`own_part`, values) pairs of parameters that are not trained.

    Every rank calls it with the same ``params``: one that is gathered would stay as it was, and those that always are
    (DeepSpeed's persistence threshold) are gathered anew.
    """
    gathered: Any = [param for param in params if param.ds_status.name != "NOT_AVAILABLE"]  # type: ignore[attr-defined]
    if gathered:
        gathered[0].partition(gathered)
    if parts:
        torch._foreach_copy_([own for own, _ in parts], [values for _, values in parts])
    persistent: Any = [param for param in params if param.ds_persist]  # type: ignore[attr-defined]
    if persistent:
        persistent[0].all_gather(persistent)


def moments(optimizer: torch.optim.Optimizer, fragment: Fragment) -> dict[str, Tensor]:
    """The stored moments of a fragment (views); empty before the first update."""
    state = optimizer.state.get(fragment.key, {})
    return {slot: fragment.of(state[slot]) for slot in MOMENTS if slot in state}


def step_count(optimizer: torch.optim.Optimizer, fragment: Fragment) -> float:
    """Updates that the optimiser has done, as its bias correction counts them."""
    state = optimizer.state.get(fragment.key, {})
    # Apex counts in the group.
    value = state.get(STEP, next((group[STEP] for group in optimizer.param_groups if STEP in group), 0))
    return float(value)


def create_state(optimizer: torch.optim.Optimizer, key: Tensor, step: float) -> dict[str, Any]:
    """The optimiser's state for ``key`` at ``step``, with moments to be filled in."""
    state: dict[str, Any] = optimizer.state[key]
    for slot in MOMENTS:
        if slot not in state:
            state[slot] = torch.zeros_like(key, dtype=torch.float32)
    counts_in_groups = [group for group in optimizer.param_groups if STEP in group]
    for group in counts_in_groups:
        group[STEP] = int(step)
    if not counts_in_groups:
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        device = key.device if on_device else torch.device("cpu")
        plain = isinstance(optimizer, torch.optim.Adam)  # AdamW is one; DeepSpeed's CPU Adam counts in an int
        state[STEP] = torch.tensor(step, dtype=torch.float32, device=device) if plain else int(step)
    return state


def publish(optimizer: Any, *, stage: int) -> None:
    """Copy changed fp32 weights into the weights that the forward pass reads, on every rank; all ranks call it."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def held_bytes(objective: nn.Module, optimizer: Any, *, stage: int, rank: int, world_size: int) -> dict[str, int]:
    """Bytes that this rank holds: ``weights``, ``master`` (fp32 copies), ``moments``, ``gradients`` (now)."""
    base = optimizer.optimizer if stage else optimizer
    pieces = fragments(objective, optimizer, stage=stage, rank=rank, world_size=world_size)
    keys = list({id(piece.key): piece.key for piece in pieces}.values())
    if stage == 0:
        keys = list(objective.parameters())  # every rank has all; the pieces are only dealt out for storing
    params = list(objective.parameters())
    weights = [*params, *(param.ds_tensor for param in params if hasattr(param, "ds_tensor"))]
    held = [tensor for key in keys for slot, tensor in base.state.get(key, {}).items() if slot in MOMENTS]
    return {
        "weights": _bytes(weights),
        "master": _bytes(keys) if stage else 0,
        "moments": _bytes(held),
        "gradients": _bytes(_gradients(params, optimizer)),
    }


def _gradients(params: list[nn.Parameter], optimizer: Any) -> list[Tensor]:
    found = [param.grad for param in params if param.grad is not None]
    for tensors in getattr(optimizer, "averaged_gradients", {}).values():
        found += [tensor for tensor in tensors or [] if tensor is not None]
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return found if flat is None else [*found, flat]


def _bytes(tensors: list[Any]) -> int:
    """Of tensors, each storage once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(sizes.values())
