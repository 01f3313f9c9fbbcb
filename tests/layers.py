"""Which part of the suite imports which: python tests/layers.py prints the drawing of docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/architecture.md"


def part_of(module: str) -> str:
    """A module's folder, or its own name where it lies in none: semaim.engine.runner -> engine."""
    return module.split(".")[1]


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, part that imports, part that is imported) of every import between parts, also those inside functions."""
    for file in sorted((ROOT / "semaim").rglob("*.py")):
        inside = file.relative_to(ROOT)
        if inside.parts[1] in ("configs", "__init__.py"):
            continue
        own = inside.parts[1].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if name.startswith("semaim.") and not part_of(name).startswith("__") and part_of(name) != own:
                    yield str(inside), own, part_of(name)


def layers() -> list[list[str]]:
    """The parts by layer, the lowest first, as the document lists them."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.partition("## Layers")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[part.strip(" `") for part in row.split("|")[2].split(",")] for row in rows if "---" not in row]


def drawing() -> str:
    """A Mermaid graph of the imports between parts, those of a layer beside each other."""
    edges = sorted({(own, other) for _, own, other in imports()})
    height = {part: number for number, layer in enumerate(layers()) for part in layer}
    # What every part may use - errors, places, reading - would only hide the rest.
    shown = [(own, other) for own, other in edges if height[other] > 0]
    lines = ["```mermaid", "graph TD"]
    for number, layer in reversed(list(enumerate(layers()))):
        if number:
            lines += [f"  subgraph layer {number + 1}", *(f"    {part}" for part in layer), "  end"]
    return "\n".join([*lines, *(f"  {own} --> {other}" for own, other in shown), "```"])


if __name__ == "__main__":
    print(drawing())
