"""Readers of unlabelled images: sources, decoding, augmentation, the loader and the demo photographs."""

from fastmim.data.demo import DemoCounts, make_demo
from fastmim.data.source import check_images
from fastmim.data.torchvision import Batch, Loader, build_loader

__all__ = ["Batch", "DemoCounts", "Loader", "build_loader", "check_images", "make_demo"]
