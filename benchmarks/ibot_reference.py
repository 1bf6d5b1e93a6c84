"""bytedance/ibot's own step from a local clone, which is read and never edited.

Student, teacher, loss and update run in the order of its ``train_one_epoch``, without ``.cuda()``, loggers and the
wrapper of distributed training. Its all-reduce of one process is left out, which only makes it faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference import load_modules
from benchmarks.train_step import Provider
from fastmim.config import Config
from fastmim.interop.self_distilled import save_self_distilled

NAME = "bytedance-ibot"


class ReferenceIBOT(nn.Module):
    """The clone's student, teacher and loss with the weights of one of our objectives, under the call that is timed.

    Args:
        clone: Its folder.
        config: Of our run.
        source: Our objective.
    """

    def __init__(self, clone: Path, config: Config, source: Any) -> None:
        super().__init__()
        # What the clone's main file imports for its logs.
        writer, metrics = ModuleType("tensorboardX"), ModuleType("evaluation.unsupervised.unsup_cls")
        writer.SummaryWriter = metrics.eval_pred = None  # type: ignore[attr-defined]
        more = {"tensorboardX": writer, "evaluation.unsupervised.unsup_cls": metrics}
        main, models, heads, utils = load_modules(clone, "main_ibot", "models", "models.head", "utils", more=more)
        own, sizes = config.objective.arguments(), source.encoder
        self.utils, self.local_crops = utils, own["local_crops"]

        def network(**masking: Any) -> nn.Module:
            encoder = models.VisionTransformer(
                img_size=[sizes.img_size[0]], patch_size=sizes.patch_size, embed_dim=sizes.embed_dim,
                depth=len(sizes.blocks), num_heads=sizes.blocks[0].attn.num_heads, qkv_bias=True,
                return_all_tokens=True, **masking,
            )  # fmt: skip
            width = {"hidden_dim": own["hidden_dim"], "bottleneck_dim": own["bottleneck_dim"]}
            fixed = {"norm_last_layer": own["norm_last_layer"], "patch_out_dim": own["out_dim"]}
            head = heads.iBOTHead(sizes.embed_dim, own["out_dim"], shared_head=True, **width, **fixed)
            return utils.MultiCropWrapper(encoder, head)

        self.student, self.teacher = network(masked_im_modeling=True), network()
        saved = save_self_distilled(source)
        self.student.load_state_dict({name.removeprefix("module."): t for name, t in saved["student"].items()})
        self.teacher.load_state_dict(saved["teacher"])
        self.teacher.requires_grad_(False)
        main.dist = SimpleNamespace(all_reduce=lambda tensor: None, get_world_size=lambda: 1)
        temps = own["teacher_temp"], own["teacher_temp"], own["teacher_patch_temp"], own["teacher_patch_temp"]
        self.loss = main.iBOTLoss(own["out_dim"], own["out_dim"], 2, self.local_crops, *temps, 0, 1)

    def forward(self, images: Sequence[Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Loss of (2, B, C, H, W) and (n, B, C, h, w) crops under (2, B, rows, columns) masks."""
        views, masks = list(images[0]), list(mask)
        teacher = self.teacher(views)
        student = self.student(views, mask=masks)
        local = None
        if self.local_crops:
            self.student.backbone.masked_im_modeling = False
            local = self.student(list(images[1]))[0]
            self.student.backbone.masked_im_modeling = True
        loss: dict[str, Tensor] = self.loss(student, teacher, local, masks, 0)
        return loss


def reference_step(module: ReferenceIBOT, config: Config, *, device: str, dtype: str) -> Provider:
    """The step as its ``train_one_epoch`` takes it, after the frozen epoch."""
    optim, momentum = config.optim, config.objective.arguments()["momentum_teacher"]
    optimizer = torch.optim.AdamW(module.utils.get_params_groups(module.student), lr=optim.lr)
    for group in optimizer.param_groups[:1]:
        group["weight_decay"] = optim.weight_decay
    taught = dict(module.teacher.named_parameters())
    pairs = [(q, taught[name]) for name, q in module.student.named_parameters() if name in taught]

    def forward(images: Any, mask: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = module(images, mask)["loss"]
        loss.item()  # it looks for bad values in every step
        return loss

    def update() -> None:
        module.utils.clip_gradients(module.student, optim.clip_grad)
        optimizer.step()
        with torch.no_grad():
            for q, k in pairs:
                k.data.mul_(momentum).add_((1 - momentum) * q.detach().data)

    def backward(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()

    return Provider(NAME, module, forward, backward, update)
