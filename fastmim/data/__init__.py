"""Readers of unlabelled images: sources, decoding, augmentation, the loaders and the demo photographs."""

from fastmim.data.augment import View, ibot_views, mae_views, simmim_views
from fastmim.data.build import build_loader, choose_loader
from fastmim.data.demo import DemoCounts, make_demo
from fastmim.data.loader import Batch, Loader, MultiBatch
from fastmim.data.pack import PackReport, pack_images
from fastmim.data.shards import index_shards
from fastmim.data.source import check_images

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
    "ibot_views",
    "index_shards",
    "mae_views",
    "make_demo",
    "pack_images",
    "simmim_views",
]
