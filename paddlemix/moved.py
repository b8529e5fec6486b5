"""Module paths of earlier versions, which stay importable: each is the module that has its contents now."""

import importlib
import importlib.abc
import importlib.util
import sys

_BLOCKS = "adapters chat engine flops generation language layers lora vision"
_DATASETS = "collate dataset encoding loading packing records samplers"
MOVED = {
    **{f"paddlemix.models.internvl2.{name}": f"paddlemix.models.blocks.{name}" for name in _BLOCKS.split()},
    "paddlemix.models.internvl2.hub": "paddlemix.checkpoints.hub",
    "paddlemix.models.internvl2.tokenization": "paddlemix.tokenizers",
    "paddlemix.models.internvl2.weight_files": "paddlemix.checkpoints",
    **{f"paddlemix.datasets.internvl2.{name}": f"paddlemix.datasets.{name}" for name in _DATASETS.split()},
    **{f"paddlemix.processors.internvl2.{name}": f"paddlemix.processors.{name}" for name in ("image", "video")},
    "paddlemix.processors.boxes": "paddlemix.boxes",
    "paddlemix.processors.internvl2.boxes": "paddlemix.boxes",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old names, after Python has found nothing under them."""

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec):
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__  # the import system is about to put the old name's there
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


def install():
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
