"""mmcv's compiled operators in terms of torchvision's, so that mmdet and mmseg run without compiling anything.

mmcv-lite is mmcv without the compiled module `mmcv._ext`, which mmcv.ops, mmdet and mmseg import. `install()` has to be
called before they are imported.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from semaim.errors import UserError
from semaim.places import to_install

NAME = "mmcv._ext"
SOURCE = Path(__file__).with_name("mmcv_ext.py")


class TorchvisionOps:
    """Finder of `mmcv._ext` in `mmcv_ext.py`.

    An importer instead of an entry in `sys.modules`: mmengine looks for the operators with `pkgutil.find_loader`.
    """

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        """The module of the operators for its name, None for any other."""
        return importlib.util.spec_from_file_location(NAME, SOURCE) if name == NAME else None


def install() -> None:
    """Make `mmcv._ext` importable; a compiled module takes precedence. Repeated calls have no further effect."""
    if importlib.util.find_spec("mmcv") is None:
        raise UserError(f"mmcv is not installed: run {to_install('all')}")
    if importlib.util.find_spec(NAME) is None:
        sys.meta_path.append(TorchvisionOps)  # last: a compiled module that appears later is found before it
