"""Readers of unlabelled images: sources, decoding, augmentation, the loaders and the demo photographs."""

from fastmim.data.augment import View
from fastmim.data.build import build_loader, choose_loader
from fastmim.data.check import check_images
from fastmim.data.demo import DemoCounts, make_demo
from fastmim.data.loader import Batch, Loader, MultiBatch
from fastmim.data.pack import PackReport, pack_images
from fastmim.data.shards import index_shards

__all__ = [
    "Batch",
    "DemoCounts",
    "Loader",
    "MultiBatch",
    "PackReport",
    "View",
    "build_loader",
    "check_images",
    "choose_loader",
    "index_shards",
    "make_demo",
    "pack_images",
]
