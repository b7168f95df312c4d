"""Names of version 0.1 that can still be used in 0.2, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# The modules that now hold an old module's names; the warning names the first.
RENAMED: dict[str, tuple[str, ...]] = {
    "backbone": ("models.iresnet",),
    "centers": ("optim.centers",),
    "centers.centers": ("optim.centers.centers",),
    "centers.config": ("optim.centers.config",),
    "check": ("common.check",),
    "data.augment": ("data.loading.augment",),
    "data.conversion": ("data.formats.conversion",),
    "data.decode": ("data.formats.decode",),
    "data.folder": ("data.formats.folder", "data.formats.image_set", "data.formats.decode"),
    "data.imagefolder": ("data.formats.imagefolder", "data.formats.image_set"),
    "data.images": ("data.formats.images", "data.formats.image_set"),
    "data.loader": ("data.loading.loader",),
    "data.metadata": ("data.formats.metadata",),
    "data.order": ("data.loading.sampler",),
    "data.recordio": ("data.formats.recordio",),
    "data.tables": ("data.formats.tables",),
    "data.webdataset": ("data.formats.webdataset",),
    "embeddings": ("synthesis.embeddings",),
    "evaluate": ("evaluation.metrics", "evaluation.embedding"),
    "extras": ("common.extras",),
    "generate": ("synthesis.generators",),
    "guided": ("recipes.cfsm.model",),
    "interrupts": ("common.interrupts",),
    "labels": ("common.labels",),
    "lines": ("checkpoint.jsonl",),
    "measure": ("bench.measure",),
    "mixing": ("data.mixing", "data.mixing.ratios"),
    "mixing_parts": ("data.mixing.parts",),
    "packing": ("synthesis.packing",),
    "packing.bounds": ("synthesis.packing.bounds",),
    "packing.files": ("synthesis.packing.files",),
    "packing.optimizer": ("synthesis.packing.optimizer",),
    "packing.packer": ("synthesis.packing.packer", "synthesis.packing"),
    "packing.plot": ("synthesis.packing.plot",),
    "pickles": ("evaluation.safe_pickle",),
    "plan": ("bench.plan",),
    "randomness": ("common.rng",),
    "ranks": ("common.distributed",),
    "ratios": ("data.mixing.ratios",),
    "recipes.cells": ("recipes.sweep", "recipes.report"),
    "recipes.cfsm_report": ("recipes.cfsm.report", "recipes.cfsm.figures"),
    "recipes.config": ("common.config",),
    "recipes.degrade": ("recipes.cfsm.degrade",),
    "recipes.study": ("recipes.synface.study",),
    "report": ("bench.demo", "reporting.plots", "reporting.page"),
    "runs": ("training.model",),
    "scale": ("bench.scale",),
    "set_report": ("evaluation.report",),
    "settings": ("common.toml",),
    "sharded": ("checkpoint.modules", "checkpoint.storage", "checkpoint.state"),
    "sources": ("training.sources", "synthesis.sources"),
    "synthesize": ("synthesis.dataset",),
    "textfiles": ("common.textfiles",),
    "timm_mixup": ("data.mixing.timm_mixup",),
    "train": ("training.loop",),
    "train_config": ("training.config",),
    "verification_sets": ("evaluation.sets",),
}


class _Finder(MetaPathFinder, Loader):
    """A finder and loader of the old modules in the table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("synface.")
        if old == fullname or old not in RENAMED:
            return None
        return ModuleSpec(fullname, self, is_package=True)  # the table may hold its submodules

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("synface.")
        new = [f"synface.{name}" for name in RENAMED[old]]
        _warn(f"synface.{old}", new[0])

        def get(name: str) -> Any:
            for each in map(import_module, new):
                if hasattr(each, name):
                    return getattr(each, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = get


def install() -> None:
    """Make the old module names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def old_names(module: str, **new: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that still accepts old names of its definitions."""

    def get(name: str) -> Any:
        if name not in new:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", new[name])
        return getattr(import_module(module), new[name])

    return get


def old_keywords(**new: str) -> Callable[[FunctionT], FunctionT]:
    """Return a decorator that accepts old names of a function's keyword arguments."""

    def decorate(function: FunctionT) -> FunctionT:
        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            for old in new.keys() & keywords.keys():
                _warn(f"{old}= of {function.__qualname__}", f"{new[old]}=")
                if new[old] in keywords:
                    raise TypeError(
                        f"{function.__qualname__} got both {old}= and {new[old]}=, its new name"
                    )
                keywords[new[old]] = keywords.pop(old)
            return function(*arguments, **keywords)

        return cast(FunctionT, call)

    return decorate


def _warn(old: str, new: str) -> None:
    """Warn of an old name at the line, outside of this package, that uses it."""
    frame, level = sys._getframe(1), 2
    while frame.f_globals["__name__"].startswith(__package__) and frame.f_back:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{old} is deprecated: use {new}; version 0.3 removes the old name",
        DeprecationWarning,
        stacklevel=level,
    )
