"""A stand-in for torchvision, which is not to be had for each build of torch: timm imports it.

Any module of the package is found, and any name in it is a module class that does nothing.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

import torch


class _Named(type(torch.nn.Module)):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name  # such as a mode of interpolation


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module):
        def named(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return _Named(name, (torch.nn.Module,), {})

        module.__getattr__ = named


def install() -> None:
    """Install the stand-in in this process, unless the package is there."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _Finder())
