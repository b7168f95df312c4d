"""Modules of version 0.1 import with a DeprecationWarning, and are those of the new modules."""

import importlib
import sys
import warnings
from importlib.util import find_spec

import pytest
import synface
from synface.common.renamed import RENAMED

# Imports that README, docs and examples of version 0.1 showed, and names that they referred to.
PROMISED = {
    "backbone": ["IResNet"],
    "centers": ["Centers", "CentersConfig"],
    "data": ["ImageLoader", "TwoDomainLoader", "convert", "embedded_faces", "open_images"],
    "data.order": ["CycledOrder"],
    "generate": ["EigenfaceGenerator", "FaceGenerator"],
    "guided": ["Generator", "GeneratorConfig", "guided_styles"],
    "heads": ["AdaFace", "ArcFaceLoss", "MarginHead", "PartialFC", "ShardedMarginHead"],
    "mixing": ["Beta", "DomainMixup", "IdentityMixup", "Mixup", "TimmMixup"],
    "mixing_parts": ["paste"],
    "optim": ["RowAdamW", "RowSGD"],
    "packing": ["PackConfig", "Packer"],
    "packing.bounds": [],
    "randomness": ["generator"],
    "ranks": ["Rank", "joined", "leave"],
    "recipes.generated": ["identities"],
    "set_report": ["evaluate_set"],
    "sharded": ["Shard", "load", "save"],
    "sources": ["GeneratedSource"],
    "synthesize": ["synthesize"],
    "timm_mixup": ["Mixup"],
    "train": ["TrainConfig", "train"],
    "verification_sets": ["open_set"],
}


@pytest.fixture(autouse=True)
def forgotten():
    """Let old modules be imported as for the first time, and leave none of them behind."""

    def forget():
        for old in RENAMED:
            sys.modules.pop(f"synface.{old}", None)
            parent, _, name = f"synface.{old}".rpartition(".")
            vars(sys.modules.get(parent, synface)).pop(name, None)

    before = {name: each for name, each in sys.modules.items() if name.startswith("synface.")}
    forget()
    yield
    forget()
    sys.modules.update({k: v for k, v in before.items() if k.removeprefix("synface.") in RENAMED})


def imported(old):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"synface.{old}")


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_module_names_the_new_one(old):
    new = [f"synface.{name}" for name in RENAMED[old]]
    assert all(find_spec(name) for name in new)
    parent = old.rpartition(".")[0]
    if parent in RENAMED:
        imported(parent)
    removed = r"version 0\.3 removes the old name"
    message = rf"^synface\.{old} is deprecated: use {new[0]}; {removed}$"
    with pytest.warns(DeprecationWarning, match=message):
        module = importlib.import_module(f"synface.{old}")
    there = importlib.import_module(new[0])
    defined = {
        name: value
        for name, value in vars(there).items()
        if getattr(value, "__module__", None) == new[0]
    }
    assert defined or old in ("centers", "mixing", "packing")  # packages
    for name, value in defined.items():
        assert getattr(module, name) is value


@pytest.mark.parametrize("old", PROMISED)
def test_imports_that_the_docs_showed_work(old):
    module = imported(old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in PROMISED[old]:
            assert getattr(module, name).__name__.startswith(name)


def test_checkpoints_of_several_ranks_are_saved_by_their_old_names():
    from synface import checkpoint

    sharded = imported("sharded")
    for old, new in (("save", "save_model"), ("load", "load_model")):
        with pytest.warns(DeprecationWarning, match=f"{old} is deprecated: use {new};"):
            assert getattr(sharded, old) is getattr(checkpoint, new)
    assert sharded.Shard is checkpoint.Shard
    assert sharded.load_state is checkpoint.load_state


def test_a_name_is_imported_from_its_old_module():
    with pytest.warns(
        DeprecationWarning, match=r"synface\.lines .*: use synface\.checkpoint\.jsonl"
    ):
        from synface.lines import Lines
    with pytest.warns(
        DeprecationWarning, match=r"synface\.ranks .*: use synface\.common\.distributed"
    ):
        from synface import ranks
    from synface.checkpoint import jsonl
    from synface.common import distributed

    assert Lines is jsonl.Lines
    assert ranks.leave is distributed.leave


@pytest.mark.parametrize("name", ["nothing", "trains", "data.nothing", "packing.nothing"])
def test_an_unknown_module_is_not_found(name):
    imported("packing")
    with pytest.raises(ModuleNotFoundError, match=rf"synface\.{name}'"):
        importlib.import_module(f"synface.{name}")


def test_an_unknown_name_is_not_found():
    old = imported("lines")
    with pytest.raises(AttributeError, match=r"'synface\.lines' has no attribute 'Pages'"):
        _ = old.Pages
    with pytest.raises(ImportError, match=r"cannot import name 'Pages' from 'synface\.lines'"):
        exec("from synface.lines import Pages")
