"""What the shipped configs build, and what the arguments of these types mean: for the reference of the configs."""

import ast
import copy
import inspect
import logging
import os
import re
from collections import defaultdict
from functools import cache, cached_property
from unittest.mock import patch

import griffe
import recipes
from mmengine.config import Config
from torch import nn

import semaim.detection
import semaim.methods
import semaim.segmentation
import semaim.tasks  # noqa: F401  # registers, as the others
from semaim.engine.config_keys import OF_THE_MODEL, Types, built_by, initialisers
from semaim.engine.schedule import GIVEN, ScheduleInShares

SCOPES = ("semaim", "mmdet", "mmseg")
#: Arguments that the engine gives, whatever a config says.
GIVEN_BY_RUN = {"self", "runner", "dataloader", "optimizer", "params", "lr", "accumulative_counts"}
#: The constructor of the optimizer wrapper takes what stands here.
PARAMWISE = "optim_wrapper.paramwise_cfg"

logging.getLogger("griffe").setLevel(logging.ERROR)


@cache
def types(scope):
    """The registries of a scope's configs."""
    return Types(scope)


def read_configs():
    """Path of every config and base file -> its content, each file read once and not again for every one it serves."""
    read = Config._file2dict
    once = cache(read)

    def copied(filename, *_, **__):
        return copy.deepcopy(once(os.path.realpath(filename)))

    with patch.object(Config, "_file2dict", staticmethod(copied)):
        return {str(path): Config.fromfile(recipes.ROOT / path).to_dict() for path in recipes.files()}


def parents(path):
    """Paths of the files that a config names in `_base_`."""
    for node in ast.parse((recipes.ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_base_":
            named = ast.literal_eval(node.value)
            names = [named] if isinstance(named, str) else named
            folder = (recipes.ROOT / path).parent
            return [str((folder / name).resolve().relative_to(recipes.ROOT)) for name in names]
    return []


def leaves(node, path="", kind=None):
    """(path, type of the dict that holds it, value) of everything in a config; items of lists share a path."""
    if isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        for item in node:
            yield from leaves(item, f"{path}[]", kind)
    elif isinstance(node, dict) and path != "cfg_options":
        own = node.get("type") if path else None
        if path:
            yield path, kind, node
        for key, item in node.items():
            if not str(key).startswith("_"):
                yield from leaves(item, f"{path}.{key}" if path else str(key), own)
    elif path:
        yield path, kind, node


class Shipped:
    """The shipped configs, and which of them set what."""

    def __init__(self):
        self.configs = read_configs()

    @cached_property
    def places(self):
        """Type -> path -> [(config, its dict there)] of the configs that build it there."""
        found = defaultdict(lambda: defaultdict(list))
        for name, cfg in self.configs.items():
            if "/_base_/" not in name:
                for path, _, node in leaves(cfg):
                    if isinstance(node, dict) and "type" in node:
                        built = types(cfg["default_scope"]).find(node["type"])
                        found[built_by(built)][path].append((name, node))
        return found

    @cached_property
    def settings(self):
        """(path, type name) -> [(file, value)] of the files that set it other than the files that they build on."""
        found = defaultdict(list)
        held = {name: defaultdict(list) for name in self.configs}
        for name, cfg in self.configs.items():
            for path, kind, value in leaves(cfg):
                held[name][path, kind].append(value)
        for name, own in held.items():
            above = [held[parent] for parent in parents(name)]
            for place, values in own.items():
                if not any(part.get(place) == values for part in above):
                    found[place] += [(name, value) for value in values]
        return found


def described(built):
    """Argument -> what the docstrings of the suite say of it, those of base classes included."""
    found = {}
    for part in inspect.getmro(built) if inspect.isclass(built) else [built]:
        own = getattr(part, "__module__", "").startswith("semaim")
        init = vars(part).get("__init__") if inspect.isclass(part) else None
        passes_to = getattr(init or part, "arguments_of", None)
        texts = [part.__doc__, getattr(init, "__doc__", None)] if own else []
        for section in (s for text in texts if text for s in griffe.Docstring(text).parse("google")):
            if section.kind is griffe.DocstringSectionKind.parameters:
                for entry in section.value:
                    names, words = entry.name.split(", "), " ".join(entry.description.split())
                    words = f"{entry.name}: {words}" if len(names) > 1 else words
                    for name in names if not elsewhere(entry.description) else ():
                        found.setdefault(name, words)
        if own and passes_to:
            found = described(passes_to) | found
    return found


def elsewhere(text):
    """Whether a description only says where another is."""
    return re.fullmatch(r"(as for|see|of) `\w+`\.?", text) is not None


def parameters(built):
    """Argument -> (its parameter, the function that has it), as `config_keys.arguments` finds them."""
    found = {}
    for function in initialisers(built) if inspect.isclass(built) else [built]:
        if function is nn.Module.__init__:
            break
        try:
            listed = inspect.signature(function).parameters.values()
        except ValueError:
            break
        for parameter in listed:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, (parameter, function))
        passes_to = getattr(function, "arguments_of", None)
        if passes_to:
            for name, value in parameters(passes_to).items():
                found.setdefault(name, value)
        if passes_to or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in listed):
            break
    schedule = inspect.isclass(built) and issubclass(built, ScheduleInShares)
    given = GIVEN_BY_RUN.union(GIVEN, ["verbose"]) if schedule else GIVEN_BY_RUN
    return {name: value for name, value in found.items() if name not in given}


def grouping():
    """The arguments of `optim_wrapper.paramwise_cfg`: their parameters and descriptions."""
    constructor = types("semaim").find("GroupedOptimizer")
    built = constructor.arguments_of.arguments_of
    return {name: value for name, value in parameters(built).items() if name not in OF_THE_MODEL}, described(built)


def ours():
    """Type -> (name, registry) of all types of the suite that a config may name."""
    found = {}
    for scope in SCOPES:
        for registry in types(scope).registries:
            for name, built in registry.module_dict.items():
                own = built_by(built)
                if getattr(own, "__module__", "").startswith("semaim"):
                    found.setdefault(own, (name, registry.name))
    return found


def library(built):
    """The package that a type is of."""
    return built.__module__.partition(".")[0]
