"""Whether a run's pictures show the built-in scenes, whose emoji require attribution."""

import json
import os
import re
from pathlib import Path

from semaim.data.scenes import MARKER
from semaim.errors import UserError
from semaim.reading import read_text

CREDIT = "Emoji: OpenMoji, CC BY-SA 4.0"
SOURCES = "openmoji.org, creativecommons.org/licenses/by-sa/4.0"
#: Image folders in a config as written to the work folder.
FOLDERS = re.compile(r"\b(?:data_)?root\s*=\s*(['\"])(.+?)\1")
#: The usual names of folders of scenes (scenes, scenes_easy) and of their configs (vit_tiny_scenes_easy.py).
USUAL_FOLDER = re.compile(r"scenes(?:_[a-z]+)?")
USUAL_CONFIG = re.compile(r"\w+_scenes(?:_[a-z]+)?\.py")


def shows_scenes(folder: Path) -> bool:
    """Whether pictures in a run's folder show built-in scenes, by the images that the run and its predictions name.

    A folder of scenes is recognised by its `scenes.json`; if the images are gone, by its name.
    """
    results = _read(folder / "results.json")
    results = results if isinstance(results, dict) else {}
    configs = [*folder.glob("*.py"), *folder.glob("*/vis_data/config.py")]
    named = [match[2] for path in configs for match in FOLDERS.finditer(_text(path))]
    named += [str(results["data"])] if results.get("data") else []
    for path in folder.glob("*/predictions.json"):
        found = _read(path)
        found = found if isinstance(found, list) else []
        named += {str(it["image_id"]) for it in found if isinstance(it, dict) and "image_id" in it}
    there = [path for path in map(Path, dict.fromkeys(named)) if os.path.exists(path)]
    if any(_among_scenes(path) for path in there):
        return True
    gone = [Path(name) for name in named if not os.path.exists(name)]
    names = [str(results.get("config") or ""), *(path.name for path in configs)] if gone else []
    parts = [part for path in gone for part in path.parts]
    return any(map(USUAL_FOLDER.fullmatch, parts)) or any(map(USUAL_CONFIG.fullmatch, names))


def _among_scenes(path: Path) -> bool:
    """Whether a folder or one of its parents is a folder of scenes, which contains classes/, coco/ and ade/."""
    whole = path.resolve()
    return any((folder / MARKER).is_file() for folder in (whole, *whole.parents))


def _read(path: Path) -> object:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UserError):
        return ""
