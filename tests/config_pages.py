"""docs/reference/config.md, from the code: keys, types, arguments, defaults, and which shipped configs set them."""

import inspect
import re
from collections import Counter, defaultdict

import recipes
from commands import ROOT
from config_types import PARAMWISE, Shipped, described, grouping, library, ours, parameters

from semaim.engine.config import KEYS
from semaim.engine.config_keys import DETECTOR, FREE, SEGMENTOR, SET_BY_RUN
from semaim.registry import tasks

PAGE = ROOT / "docs/reference/config.md"
HEAD = """# Config keys

Every key of a config by its dotted path, with meaning, type, default, and the shipped configs that set it. The path is
what `--cfg-options` takes, as `PATH=VALUE` in Python's or YAML's notation:

```text
semaim train CONFIG --cfg-options base_lr=1e-4 train_cfg.max_epochs=100 model.network.order=semantic
```

* `[]` in a path stands for the number of an item in a list: `train_dataset.pipeline.3.ratio_range`.
* An unknown key, a type that does not exist and a value of the wrong kind end the command before it starts. The error
  names the nearest key.
* `default` is what the code takes if no config sets the key. `set by` are config files and their values: first the base
  files of `_base_`, from which the others take what they do not set themselves, then the number of further files. Every
  value of each config is in [recipes](../recipes.md).
* A `type` names a class. Arguments of mmengine's, mmdet's, mmseg's and PyTorch's types are in their own references:
  [mmengine](https://mmengine.readthedocs.io/en/latest/api/index.html),
  [mmdet](https://mmdetection.readthedocs.io/en/latest/api.html),
  [mmseg](https://mmsegmentation.readthedocs.io/en/latest/api.html),
  [mmcv](https://mmcv.readthedocs.io/en/2.x/api/index.html), [torch](https://docs.pytorch.org/docs/stable/optim.html).
* A config can name types of your own: [contributing](../contributing.md#how-to-add) has examples.

*Generated from the code by `python tests/generate.py`.*
"""
#: Kinds of types that the engine builds itself.
BUILT_BY_RUN = ("model_wrapper", "runner", "method", "optimizer wrapper constructor")
WIDE = 48  #: characters of a value in a table


def code(value):
    """A value or a name as code in a table; no strokes, which GitHub and Python-Markdown read differently."""
    text = " ".join(str(value).split())
    text = text if len(text) <= WIDE else text[: WIDE - 4] + " ..."
    return f"`{text.replace(' | ', ' or ')}`"


def text(words):
    """Words in a table."""
    words = " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return words if ". " in words else words.rstrip(".")


def short(file):
    """A config's name in a cell: `finetune` for the base file of that name, `knn/vit_base`, `mmdet/plain_mask_rcnn`."""
    return re.sub(r"^semaim/configs/|_configs(?=/)|_base_/|\.py$", "", file)


def plain(value):
    """Whether it is shown as a value: not a dict whose own keys are shown."""
    return not isinstance(value, dict) or not (
        "type" in value or any(isinstance(item, dict) for item in value.values())
    )


def set_by(shipped, path, kind):
    """Which files set a key, and to what."""
    found = [(file, value) for file, value in shipped.settings.get((path, kind), ()) if plain(value)]
    bases = [(file, value) for file, value in found if "/_base_/" in file]
    others = [(file, value) for file, value in found if "/_base_/" not in file]
    by_value = defaultdict(list)
    for file, value in bases or others:
        by_value[recipes.written(value)].append(short(file))
    named = 2 if bases else 1
    shown = {value: files[:named] for value, files in list(by_value.items())[:3]}
    left = len(found) - sum(map(len, shown.values()))
    cells = [f"{code(value)} {', '.join(files)}" for value, files in shown.items()]
    return "; ".join([*cells, f"{left} more"] if left else cells)


def table(rows, heading):
    """A table, or nothing if there are no rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def of_others(function):
    """Whose argument it is, for those that the suite's types pass on: "of mmdet's FPN"."""
    return f"of {function.__module__.partition('.')[0]}'s `{function.__qualname__.partition('.')[0]}`"


def argument_rows(shipped, path, kind, listed, meanings):
    """(rows of a table, names of other libraries' arguments that no shipped config sets, by their owner)."""
    rows, left = [], defaultdict(list)
    for name, (parameter, function) in listed.items():
        where = set_by(shipped, f"{path}.{name}", kind)
        held = (f"{path}.{name}", kind) in shipped.settings
        if name not in meanings and library(function) != "semaim" and not held:
            left[of_others(function)].append(name)
            continue
        meaning = text(meanings[name]) if name in meanings else of_others(function)
        annotation = parameter.annotation
        shown = re.sub(r"\b(\w+\.)+|'", "", inspect.formatannotation(annotation))
        # Python keeps one order of equal unions: that of the first module imported.
        shown = re.sub(r"Union\[([\w, ]+)\]", lambda union: f"Union[{', '.join(sorted(union[1].split(', ')))}]", shown)
        kind_of = code(shown) if annotation is not parameter.empty else ""
        default = code(repr(parameter.default)) if parameter.default is not parameter.empty else "required"
        rows.append((f"`{path}.{name}`", meaning, kind_of, default, where))
    return rows, left


def summary(built):
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(built) or "").partition("\n\n")[0].split())


def type_section(shipped, built, names):
    """The section of one of the suite's types: where it stands, and its arguments."""
    places = {path: configs for path, configs in shipped.places[built].items() if "evaluations." not in path}
    path, configs = max(places.items(), key=lambda item: (len(item[1]), item[0]))
    kind = Counter(node["type"] for _, node in configs).most_common(1)[0][0]
    out = [f"### {path}: {names.get(built, (kind,))[0]}", "", summary(built), ""]
    if more := sorted(set(places) - {path}):
        out += [f"Also at {', '.join(f'`{other}`' for other in more)}.", ""]
    rows, left = argument_rows(shipped, path, kind, parameters(built), described(built))
    out += table(rows, ("key", "meaning", "type", "default", "set by"))
    for owner, others in left.items():  # torch's grow with its version
        listed = f": {', '.join(f'`{other}`' for other in others)}" if "torch's" not in owner else ""
        out += [f"Further arguments {owner}{listed}.", ""]
    return path, out


def foreign_rows(shipped, top):
    """(path, type, library, arguments that configs set) of other libraries' types below a key."""
    rows = {}
    for built, places in shipped.places.items():
        for path, configs in places.items():
            if path.partition(".")[0].partition("[")[0] == top and built and library(built) != "semaim":
                kind = configs[0][1]["type"]
                given = {key for _, node in configs for key in node} - {"type"}
                names = ", ".join(f"`{name}`" for name in sorted(given))
                rows[path, kind, library(built)] = (f"`{path}`", f"`{kind}`", library(built), names)
    return [rows[key] for key in sorted(rows)]


def top_rows(shipped):
    """The top-level keys of all configs."""
    return [(f"`{key}`", text(meaning), set_by(shipped, key, None)) for key, meaning in KEYS.items()]


def task_rows(shipped):
    """The top-level keys that tasks add."""
    of_tasks = defaultdict(list)
    for task in tasks():
        for key in task.keys:
            of_tasks[key].append(task)
    rows = []
    for key, having in of_tasks.items():
        names = ", ".join(task.name for task in having)
        rows.append((f"`{key}`", text(having[0].keys[key]), names, set_by(shipped, key, None)))
    return rows


def free_rows():
    """Dicts without a type, and the keys that they may have."""
    ends = {f"...{name}": keys for name, keys in FREE.items()}
    tables = [(ends, "any"), (DETECTOR, "mmdet's detectors"), (SEGMENTOR, "mmseg's segmentors")]
    return [
        (f"`{path}`", owner, ", ".join(f"`{key}`" for key in sorted(keys)))
        for found, owner in tables
        for path, keys in found.items()
    ]


def page():
    """The page's text."""
    shipped, names = Shipped(), ours()
    out = [HEAD, "## Top level", ""]
    out += table(top_rows(shipped), ("key", "meaning", "set by"))
    out += ["Keys of some tasks:", ""]
    out += table(task_rows(shipped), ("key", "meaning", "tasks", "set by"))
    out += ["These paths are set by the run, and refused in `--cfg-options`:", ""]
    out += [f"* `{path}`: set {text(instead)} in its place" for path, instead in SET_BY_RUN.items()] + [""]
    parts = defaultdict(list)
    for built in shipped.places:
        if built and library(built) == "semaim":
            path, lines = type_section(shipped, built, names)
            parts[re.split(r"[.\[]", path)[0]].append((path, lines))
    tops = dict.fromkeys([*KEYS, *(key for task in tasks() for key in task.keys)])
    for top in tops:
        foreign = foreign_rows(shipped, top)
        if top not in parts and not foreign:
            continue
        out += [f"## {top}", ""]
        for _, lines in sorted(parts[top], key=lambda part: (part[0].count("."), part)):
            out += lines
        if top == "optim_wrapper":
            listed, meanings = grouping()
            rows, _ = argument_rows(shipped, PARAMWISE, None, listed, meanings)
            out += [f"### {PARAMWISE}", "", "Learning rates and weight decay by parameter.", ""]
            out += table(rows, ("key", "meaning", "type", "default", "set by"))
        if foreign:
            out += [f"### {top}: types of other libraries", ""]
            out += table(foreign, ("path", "type", "library", "arguments that shipped configs set"))
    out += ["## Dicts without a type", "", "`...` stands for any path.", ""]
    out += table(free_rows(), ("path", "of", "keys"))
    built = {part for part in shipped.places if part}
    unused = [(f"`{name}`", kind, text(summary(own))) for own, (name, kind) in names.items() if own not in built]
    out += ["## Types that no shipped config names", ""]
    out += table([row for row in unused if row[1] not in BUILT_BY_RUN], ("type", "kind", "what it is"))
    return "\n".join(out).rstrip() + "\n"


def undocumented():
    """(type, argument) of the suite's own arguments that no docstring describes."""
    found = []
    for built, (name, kind) in ours().items():
        if kind not in ("model_wrapper", "runner"):
            meanings = described(built)
            for argument, (_, function) in parameters(built).items():
                if argument not in meanings and library(function) == "semaim":
                    found.append((name, argument))
    listed, meanings = grouping()
    return found + [(PARAMWISE, argument) for argument in listed if argument not in meanings]
