"""Changes every constant of every shipped config, one at a time, and asks whether docs/recipes.md notices.

    python tests/mutate_recipes.py

A minute; run by hand, its result stands in docs/recipes.md. Numbers grow, truths turn round, names get a letter more,
and each named argument is left out once. A change that fits the page in all configs that read the file survives, and
makes the exit status 1.
"""

import ast
import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from recipes import FOLDERS, ROOT, configs, documented, files, resolved


def bases(file: Path) -> set[Path]:
    """A config's file and all that it is based on, from the root."""
    found = {file}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_base_":
            named = ast.literal_eval(node.value)
            for name in [named] if isinstance(named, str) else named:
                found |= bases((ROOT / file.parent / name).resolve().relative_to(ROOT))
    return found


def changed(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.1 or 0.1
    return f"{value}x" if isinstance(value, str) else 1


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was changed, source) of every change of a config."""
    tree = ast.parse(source)
    body = [n for n in tree.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    body = [n for n in body if getattr(getattr(n, "targets", [None])[0], "id", "") != "_base_"]
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant):
                old, node.value = node.value, changed(node.value)
                yield node.lineno, f"{old!r} -> {node.value!r}", ast.unparse(tree)
                node.value = old
            elif isinstance(node, ast.Call):
                keywords = copy.copy(node.keywords)
                for keyword in keywords:
                    node.keywords = [other for other in keywords if other is not keyword]
                    yield node.lineno, f"without {keyword.arg}", ast.unparse(tree)
                node.keywords = keywords


def noticed(readers: list[str], page: dict[str, dict[str, str]], root: Path) -> bool:
    """Whether a config that reads the changed file is another than the page's, or cannot be read any more."""
    for config in readers:
        try:
            if resolved(config, root) != page[config]:
                return True
        except Exception:  # a config is Python: a changed one can fail in any way
            return True
    return False


def main() -> int:
    """Try all changes; the number of survivors decides the exit status."""
    page, survivors, total = documented(), [], 0
    chains = {config: bases(Path(config)) for config in configs()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in files():
            source = (ROOT / file).read_text()
            readers = [config for config, chain in chains.items() if file in chain]
            for line, change, mutant in mutants(source):
                (root / file).write_text(mutant)
                total += 1
                if not noticed(readers, page, root):
                    survivors.append(f"{file}:{line}: {change}")
            (root / file).write_text(source)
    print("\n".join(survivors))
    print(f"{total} changes in {len(files())} files, {len(survivors)} not noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
