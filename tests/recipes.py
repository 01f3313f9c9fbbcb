"""The recipes in docs/recipes.md as data, and a config as the rows that stand there.

    python tests/recipes.py CONFIG [BASE]     # the rows of a config, or those in which it differs from another

A section of the page is headed by a config's path, or by that of a config and `as` another, whose rows it then takes
over but for those that it lists. A row is `key | value | source`; a value is written as Python writes it. A dict with
plain values is one row, written as a call of its `type`; `-` takes a row of the other config away.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/recipes.md"
HEADING = re.compile(r"#+ `(?P<config>[\w/]+\.py)`(?: as `(?P<base>[\w/]+\.py)`)?")
FOLDERS = ("semaim/configs", "mmdet_configs", "mmseg_configs")
#: A value with a type and no others inside, or a list, that is shorter than this is one row.
WIDTH = 100
#: Not of the recipe: what the command line changed, and what is found out at the start of a run.
APART = ("cfg_options", "origin", "work_dir")


def files() -> list[Path]:
    """All files that configs are made of, from the root."""
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [path.relative_to(ROOT) for path in found]


def configs() -> list[str]:
    """Paths of all shipped configs, from the root."""
    return [str(path) for path in files() if path.parent.name != "_base_"]


def written(value: object) -> str:
    """A value as its row shows it."""
    if isinstance(value, dict):
        kind = value.get("type")
        items = ", ".join(f"{key}={written(item)}" for key, item in value.items() if key != "type")
        return f"{kind}({items})" if kind else f"dict({items})"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return repr(value)


def rows_of(node: object, path: str = "") -> dict[str, str]:
    """key -> written value of everything in a config; a short dict with a type, or in a list, is one row."""
    plain = isinstance(node, dict) and not any(isinstance(item, dict | list | tuple) for item in node.values())
    if plain and path and len(written(node)) < WIDTH:
        return {path: written(node)}
    if isinstance(node, dict):
        rows = {}
        for key, item in node.items():
            if path or key not in APART and not key.startswith("_"):
                rows |= rows_of(item, f"{path}.{key}" if path else key)
        return rows
    if isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        return {f"{path}[{index}]": written(item) for index, item in enumerate(node)}
    return {path: written(node)}


def resolved(config: str | Path, root: Path = ROOT) -> dict[str, str]:
    """The rows of a config as it is read."""
    return rows_of(Config.fromfile(root / config).to_dict())


def documented(page: str | None = None) -> dict[str, dict[str, str]]:
    """Path of a config -> its rows by the page, those taken over from another included."""
    found: dict[str, dict[str, str]] = {}
    own: dict[str, str] | None = None
    for line in (PAGE.read_text() if page is None else page).splitlines():
        if line.startswith("#"):
            heading = HEADING.fullmatch(line)
            own = None
            if heading:
                if heading["config"] in found:
                    raise ValueError(f"{PAGE.name} has {heading['config']} twice")
                own = found[heading["config"]] = dict(found[heading["base"]]) if heading["base"] else {}
        elif own is not None and line.startswith("| `"):
            key, value = (cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:3])
            if value == "-":
                del own[key]
            else:
                own[key] = value.replace(r"\|", "|")
    return found


def differences(ours: dict[str, str], other: dict[str, str]) -> Iterable[tuple[str, str]]:
    """(key, value) of what differs from another's rows, `-` for what is not there any more."""
    yield from ((key, value) for key, value in ours.items() if other.get(key) != value)
    yield from ((key, "-") for key in other if key not in ours)


def main() -> None:
    """Print rows for the page."""
    ours = resolved(sys.argv[1])
    for key, value in differences(ours, resolved(sys.argv[2]) if len(sys.argv) > 2 else {}):
        print(f"| `{key}` | `{value}` | |")


if __name__ == "__main__":
    main()
