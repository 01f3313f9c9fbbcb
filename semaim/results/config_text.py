"""Reads the plain values of a config as a run wrote it to its work folder, without running it."""

import ast
from typing import Any

MOST = 2**20  #: characters that are parsed; a config of the suite has less than a hundredth


def read_config(text: str) -> dict[str, Any]:
    """Top-level name -> value, of those that are literals or calls of dict; what is anything else is left out."""
    try:
        body = ast.parse(text if len(text) <= MOST else "").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _value(node.value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                continue
    return found


def _value(node: ast.expr) -> Any:
    """The value of an expression; ValueError if it is not plain."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        found: dict = {}
        for argument in node.args:
            found.update(_value(argument))
        return found | {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key): _value(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)
