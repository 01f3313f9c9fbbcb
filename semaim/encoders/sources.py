"""From what a user calls an encoder to the encoder: names of timm and of the hub, folders, files of every layout.

* `timm:NAME[.TAG]`: weights of timm's, downloaded from the Hugging Face hub and kept in its cache.
* `hf-hub:OWNER/REPO[@REVISION]`: weights on the hub with a config.json of timm, transformers or OpenCLIP.
* `local-dir:DIR`: the same files in a folder.
* a file, with `arch` where it does not tell its architecture.

No code from a file is run. What is not determined by the file, its config or `arch` is asked for, not guessed.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor

from semaim import checkpoints
from semaim.checkpoints import hub_config, normalisation
from semaim.checkpoints.dialects import find_weights
from semaim.checkpoints.files import FORMAT
from semaim.checkpoints.normalisation import Statistics
from semaim.checkpoints.same_network import kinds
from semaim.encoders import (
    inferring,
    layouts,
    sam,  # noqa: F401  registers its family
)
from semaim.encoders.contract import Source, family_of
from semaim.encoders.images import Preparation, cfg_of, preparation_of, preparation_of_arch
from semaim.encoders.own import OwnEncoder
from semaim.encoders.timm_vit import MODULES, TimmEncoder, in_modules
from semaim.errors import UserError
from semaim.places import is_name
from semaim.reading import once, read_json

#: Files of weights in a repository or folder, the first that exists.
WEIGHTS = tuple(f"{name}{ending}" for name in hub_config.WEIGHTS for ending in (".safetensors", ".bin"))
CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")


def open_source(source: str | os.PathLike, arch: str | None = None) -> Source:
    """Find, download if necessary, and read an encoder's weights.

    Args:
        source: see the module.
        arch: timm's name of the architecture, perhaps with the tag of its weights, for a file that does not tell it.

    Raises:
        UserError: there is no such source, it is no plain ViT, or it does not determine its architecture.
    """
    text = os.fspath(source)
    return once(text, lambda _: _open(text, arch), f"encoder {arch}") if os.path.isfile(text) else _open(text, arch)


def _open(text: str, arch: str | None) -> Source:
    if not is_name(text):
        return from_file(text, Path(text), arch)
    kind, _, rest = text.partition(":")
    if kind == "timm":
        return from_tag(text, rest, arch)
    folder = Path(rest) if kind == "local-dir" else download(rest)
    if not folder.is_dir():
        raise UserError(f"{text}: no such folder")
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        found = sorted(file for file in folder.iterdir() if file.suffix in hub_config.ENDINGS)
    if len(found) != 1 and not (found and found[0].name in WEIGHTS):
        listed = ", ".join(file.name for file in found) or "none"
        raise UserError(
            f"{text}: a folder with one file of weights is needed ({', '.join(WEIGHTS[:2])}); it has {listed}"
        )
    return from_file(text, found[0], arch)


# Where weights are


def download(repository: str, names: tuple[str, ...] = ()) -> Path:
    """The folder of a repository's snapshot on the Hugging Face hub with its weights and configs, from the cache.

    Args:
        repository: OWNER/REPO, perhaps with @REVISION.
        names: files of weights to try, in order; empty for `WEIGHTS`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = repository.partition("@")
    try:
        for name in CONFIGS:
            # A repository need not have every config. Without network this also means: not in the cache; then the
            # weights, which come next, decide.
            with suppress(EntryNotFoundError):
                hf_hub_download(repo, name, revision=revision or None)
        last: Exception | None = None
        for name in names or WEIGHTS:
            try:
                return Path(hf_hub_download(repo, name, revision=revision or None)).parent
            except EntryNotFoundError as error:
                last = error
        raise last or FileNotFoundError(repo)
    except Exception as error:  # the hub's and the network's are of many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"cannot get {repo} from the Hugging Face hub: {reason}; with a file of it, give FILE --arch NAME"
        ) from None


def architecture(arch: str) -> Source:
    """An architecture of timm without weights."""
    preparation = preparation_of_arch(arch, Path(arch))
    name = arch.partition(".")[0]
    description: dict = {"family": family_of(name).family, "arch": name, "args": {}, "patch_size": None}
    return Source(arch, Path(arch), "random", description, preparation, {}, [], family_of(name).own_size(name))


def from_tag(text: str, tag: str, arch: str | None = None) -> Source:
    """The source of timm's weights ARCH or ARCH.TAG."""
    if arch is not None:
        raise UserError(f"{text} names its architecture: leave --arch out")
    cfg = cfg_of(tag)
    if repo := cfg.get("hf_hub_id"):
        folder = download(repo, (cfg["hf_hub_filename"],) if cfg.get("hf_hub_filename") else ())
        path = next(
            folder / name for name in (cfg.get("hf_hub_filename"), *WEIGHTS) if name and (folder / name).is_file()
        )
    else:
        from timm.models import download_cached_file  # type: ignore[attr-defined]

        try:
            path = Path(download_cached_file(cfg["url"], progress=False))
        except Exception as error:  # of the network
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"cannot download {cfg['url']}: {reason}; give the file and --arch {tag}") from None
    return of_timm(text, path, tag.partition(".")[0], {}, Preparation.of_cfg(cfg, f"timm's for {tag}"))


# What is in them


def from_file(text: str, path: Path, arch: str | None = None) -> Source:
    """The source in a file; `text` is what the user called it."""
    content = checkpoints.read_file(path)
    if recorded := trained_here(content):
        if arch is not None and arch.partition(".")[0] != recorded.get("arch"):  # the run's own config has it
            raise UserError(f"{text} records its architecture, {recorded.get('arch') or 'our own'}: leave --arch out")
        return of_run(text, path, content, recorded)
    if arch is not None:
        return of_timm(text, path, arch.partition(".")[0], {}, preparation_of_arch(arch, path), content)
    beside = hub_config.find(path)
    if beside is not None:
        cfg = {**beside["pretrained_cfg"], "architecture": beside["architecture"]}
        preparation = Preparation.of_cfg(cfg, f"from the config next to {path.name}")
        return of_timm(text, path, beside["architecture"], beside["model_args"], preparation, content)
    config = foreign_config(path)
    foreign = layouts.recognise(content, config)
    if foreign is not None:
        if foreign.arch is None:
            raise UserError(
                f"{text} has {foreign.name}'s names and does not determine its architecture: {foreign.reason}"
            )
        preparation = preparation_of(path, foreign.arch, foreign.args)
        return of_timm(text, path, foreign.arch, foreign.args, preparation, content, foreign)
    return of_tensors(text, path, content)


def of_tensors(text: str, path: Path, content: Any) -> Source:
    """The source in a file with timm's names that names no architecture: ours, or what its tensors determine."""
    refused = ""
    try:
        found = checkpoints.recognise(path, content)
        own = {**found.sizes, "img_size": found.sizes["img_size"] or tuple(14 * n for n in found.sizes["patch_size"])}
        with torch.device("meta"):
            checkpoints.fit(OwnEncoder(**own), found)
    except (UserError, ValueError) as error:
        refused = str(error)
    else:
        if found.heads_guessed:
            raise UserError(
                f"{text} does not tell its number of heads: give --arch NAME, or timm's config.json beside it"
            )
        sizes = {key: own[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
        description = {"family": "semaim", **sizes, "patch_size": list(own["patch_size"])}
        statistics = found.statistics or Statistics(origin=f"ImageNet's, as {path.name} holds none")
        preparation = Preparation(to_2tuple(own["img_size"]), 0.875, "center", "bicubic", statistics)
        return Source(text, path, found.dialect, description, preparation, {}, found.skipped, own["img_size"], found)
    inferred = inferring.infer(encoder_weights(content, text)[0])
    if inferred.arch is None:
        among = ", ".join(inferred.candidates[:4]) + (", ..." if len(inferred.candidates) > 4 else "")
        if inferred.candidates:
            raise UserError(
                f"{text} does not determine its architecture: {among} have its tensors and differ in {inferred.differ}:"
                " give --arch NAME"
            )
        raise UserError(f"{refused}; and no plain ViT of timm {timm.__version__} has its tensors")
    # Several architectures compute the same, and the weights may be any one's: DeiT's or MAE's, say.
    preparation = preparation_of_arch(inferred.arch, path, alike=inferred.candidates)
    return of_timm(text, path, inferred.arch, inferred.args, preparation, content)


def of_timm(
    text: str,
    path: Path,
    arch: str,
    args: Mapping[str, Any],
    preparation: Preparation,
    content: Any = None,
    foreign: layouts.Foreign | None = None,
) -> Source:
    """The source of weights for an architecture of timm.

    Args:
        text, path: the source.
        arch, args: the architecture, and its arguments besides.
        preparation: of its images.
        content: of the file, if it was read.
        foreign: of the file, if it was recognised.
    """
    content = checkpoints.read_file(path) if content is None else content
    foreign = foreign or layouts.recognise(content, None)
    if foreign is not None:
        if foreign.unread:
            raise UserError(f"{text} ({foreign.name}) holds tensors that are not understood: {kinds(foreign.unread)}")
        state, left, layout = foreign.state, foreign.left, foreign.name
    else:
        state, left = encoder_weights(content, text)
        layout = "timm"
    args = {name: value for name, value in dict(args).items() if name not in ("num_classes", "pretrained")}
    size, patch = args.get("img_size"), args.pop("patch_size", None)
    if family_of(arch).resizes:  # the size is the task's choice; else it belongs to the architecture
        args.pop("img_size", None)
    size = to_2tuple(size or family_of(arch).own_size(arch))
    fixed = "pos_embed" in state or any(name.endswith("relative_position_bias_table") for name in state)
    if (
        fixed
        and in_modules(arch, MODULES)
        and preparation.size != size
        and _rows_fit(state, arch, args, preparation.size, patch)
    ):
        size = preparation.size
    description = {"family": family_of(arch).family, "arch": arch, "args": args, "patch_size": patch}
    return Source(text, path, layout, description, preparation, dict(state), list(left), size)


def _rows_fit(state: Mapping[str, Tensor], arch: str, args: dict, size: tuple[int, int], patch: int | None) -> bool:
    """Whether a file's tables are made for images of this size."""
    try:
        with torch.device("meta"):
            own = TimmEncoder(arch, args, img_size=size, patch_size=patch).vit.state_dict()
    except (UserError, AssertionError, ValueError, TypeError):
        return False
    tables = [n for n in own if n.rpartition(".")[2] in ("pos_embed", "relative_position_bias_table")]
    return all(n in state and state[n].shape == own[n].shape for n in tables)


def encoder_weights(content: Any, text: str) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors without the prefix of the encoder's names, and the names that do not have that prefix."""
    _, weights = find_weights(content)
    ends = ("patch_embed.proj.weight", "patch_embed.projection.weight")
    anchors = [name for name in weights if name.endswith(ends)]
    if not anchors:
        held = ", ".join(list(dict.fromkeys(name.split(".")[0] for name in weights))[:6]) or "nothing"
        raise UserError(f"no ViT encoder in {text}: it holds {held}")
    first = min(anchors, key=len)
    prefix = first[: first.rindex("patch_embed")]
    state = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return state, [name for name in weights if not name.startswith(prefix)]


# What this suite trained


def trained_here(content: Any) -> dict | None:
    """The encoder's description in a checkpoint of a plain network of this suite; None for any other file."""
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        return None
    config = content.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    for part in ("network", "backbone"):
        holder = model.get(part) if isinstance(model, Mapping) else None
        if isinstance(holder, Mapping) and isinstance(holder.get("encoder"), Mapping):
            return dict(holder["encoder"])
    return None


def of_run(text: str, path: Path, content: Mapping, description: dict) -> Source:
    """The source in a checkpoint that one of the plain networks has trained."""
    model = content["config"]["model"]
    holder = model.get("network") or model.get("backbone")
    _, weights = find_weights(content)
    inside = ("encoder.vit.", "backbone.encoder.vit.", "encoder.", "backbone.encoder.")
    prefix = next((p for p in inside if any(name.startswith(f"{p}patch_embed.") for name in weights)), None)
    if prefix is None:
        raise UserError(f"{text}: no encoder among its weights, though its config describes one")
    state = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    left = [name for name in weights if not name.startswith(prefix)]
    statistics = normalisation.of_run(content["config"], path)
    size = holder.get("img_size")
    if size is None and holder is model.get("backbone"):
        raise UserError(f"{text}: its config does not tell the size of its images, model.backbone.img_size")
    own = family_of(description["arch"]).own_size(description["arch"]) if "arch" in description else 224
    size = to_2tuple(size or own)
    if holder is model.get("backbone") and holder.get("patch_size"):  # a classifier keeps the encoder's own
        description = {**description, "patch_size": holder["patch_size"]}
    kept = content["config"].get("dataset") or {}
    preparation = Preparation(
        size,
        kept.get("crop_pct") or 0.875,
        kept.get("crop_mode") or "center",
        kept.get("interpolation") or "bicubic",
        statistics,
    )
    source = Source(text, path, "semaim", description, preparation, state, left, size)
    if description.get("family") == "semaim":
        found = checkpoints.recognise(path, state)
        source.checkpoint = found
    return source


def foreign_config(path: Path) -> dict | None:
    """The config.json of transformers or OpenCLIP in the file's folder, if the file is its weights; else None."""
    for name in ("config.json", "open_clip_config.json"):
        file = path.with_name(name)
        if path.name in WEIGHTS and file.is_file():
            try:
                config = read_json(file)
            except UserError as error:
                raise UserError(f"cannot read {file}, next to {path.name}: {error}") from None
            if isinstance(config, dict) and ("model_type" in config or "model_cfg" in config):
                return config
    return None
