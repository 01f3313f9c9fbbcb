"""mmcv's compiled operators over torchvision's, so that mmdet and mmseg run with nothing to compile.

mmcv-lite is mmcv without the compiled module `mmcv._ext`, which mmcv.ops, mmdet and mmseg cannot be imported without.
`install()` comes before their import.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from semaim.errors import UserError

NAME = "mmcv._ext"
SOURCE = Path(__file__).with_name("mmcv_ext.py")


class TorchvisionOps:
    """Finder of `mmcv._ext` in `mmcv_ext.py`.

    An importer and not an entry of `sys.modules`: mmengine asks `pkgutil.find_loader` whether the operators exist.
    """

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        """The module of the operators for its name, None for any other."""
        return importlib.util.spec_from_file_location(NAME, SOURCE) if name == NAME else None


def install() -> None:
    """Make `mmcv._ext` importable where it is not; a compiled one wins. Once or many times, the result is the same."""
    if importlib.util.find_spec("mmcv") is None:
        raise UserError("mmcv is not installed: run tools/setup.sh --extras all")
    if importlib.util.find_spec(NAME) is None:
        sys.meta_path.append(TorchvisionOps)  # last: a compiled module that appears later is found before it
