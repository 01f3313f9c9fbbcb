"""The error lines in docs/troubleshooting.md, from the code: every message of a `UserError`, with its values left open.

A comment in the page says which modules' lines stand below it, as patterns of paths in semaim/. A module belongs to the
pattern that matches it most narrowly, so that `data/*.py` takes those that no other pattern names.
"""

import ast
import re
from fnmatch import fnmatch
from functools import cache

from commands import ROOT

from semaim import errors

PAGE = ROOT / "docs/troubleshooting.md"
PLACE = re.compile(r"(<!-- lines: (?P<patterns>.*?) -->\n).*?(?=<!-- end -->)", re.S)
#: Functions whose text is the same in all messages.
TEXTS = {"nearest": "did you mean NAME?", "to_install": "tools/setup.sh --extras NAME"}
#: Names of values that hold what another library or the system says.
REASONS = ("error", "reason", "cause", "strerror", "refused")


def kinds():
    """Names of the classes whose messages users read."""
    found = {errors.UserError.__name__}
    classes = [node for nodes in modules().values() for node in nodes if isinstance(node, ast.ClassDef)]
    while more := {c.name for c in classes if {getattr(base, "id", "") for base in c.bases} & found} - found:
        found |= more
    return found


@cache
def modules():
    """Path in semaim/ -> the nodes of its syntax, of all modules but configs."""
    folder = ROOT / "semaim"
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    names = [name for name in found if not name.startswith("configs/")]
    return {name: list(ast.walk(ast.parse(found[name].read_text(encoding="utf-8")))) for name in names}


def value(node):
    """What stands for a value in a message: its name in capitals, or dots."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in TEXTS:
        return TEXTS[node.func.id]
    names = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)}
    if names & set(REASONS):
        return "REASON"
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name.strip("_").upper() if len(name) > 1 else "..."


def template(node):
    """A message with its values left open."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(value(p.value) if isinstance(p, ast.FormattedValue) else p.value for p in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    if isinstance(node, ast.IfExp):
        return f"{template(node.body)} | {template(node.orelse)}"
    return value(node)


def lines():
    """Path in semaim/ -> the messages of its errors; those that only hand on another text are left out."""
    names, found = kinds(), {}
    for module, nodes in modules().items():
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        raised = [c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) in names and c.args]
        texts = {" ".join(template(call.args[0]).split()) for call in raised}
        if texts := {text for text in texts if re.search(r"[a-z]{2}", re.sub(r"\b[A-Z_]+\b", "", text))}:
            found[module] = sorted(texts, key=str.lower)
    return found


def chosen(module, patterns):
    """The pattern that matches a module most narrowly, or None."""
    matching = [pattern for pattern in patterns if fnmatch(module, pattern)]
    return max(matching, key=lambda pattern: (pattern == module, len(pattern)), default=None)


def page():
    """The page's text, its lists made anew."""
    old, found = PAGE.read_text(encoding="utf-8"), lines()
    patterns = [pattern for place in PLACE.finditer(old) for pattern in place["patterns"].split()]
    if lost := [module for module in found if chosen(module, patterns) is None]:
        raise ValueError(f"{PAGE.name}: no place for the error lines of {lost}")

    def listed(place):
        own = place["patterns"].split()
        texts = {text for module, its in found.items() if chosen(module, patterns) in own for text in its}
        marks = [f"* `` {text} ``" if "`" in text else f"* `{text}`" for text in sorted(texts, key=str.lower)]
        head = '\n<details markdown="1">\n<summary>All lines of this kind</summary>\n\n'
        return place[1] + head + "\n".join(marks) + "\n\n</details>\n\n"

    return PLACE.sub(listed, old)
