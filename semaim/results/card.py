"""The model card of an exported encoder, in the Hugging Face hub's format: what its file and its results record."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from semaim import checkpoints
from semaim.checkpoints.normalisation import Statistics
from semaim.checkpoints.reading import Checkpoint
from semaim.checkpoints.same_network import ENCODER
from semaim.checkpoints.sizes import describe
from semaim.engine.results import origin_of
from semaim.errors import UserError
from semaim.registry import task_of
from semaim.results import Catalogue, load_published
from semaim.results.cells import AGAIN, Cell, make_cells
from semaim.results.formats import escaped, pipes
from semaim.results.runs import HARMLESS, Run, find_results, read_runs
from semaim.results.skipping import Skipped, tell
from semaim.results.table import GAINS, JUDGED, SPREAD, Table, by_pipeline, gain_rows, make_table, our_words

NAME = "README.md"
UNKNOWN = "not recorded"
IMAGENET = "ILSVRC/imagenet-1k"  #: the hub's name of it
#: The last line, with a hash of all before it: an unchanged card may be written again.
SEAL = re.compile(r"<!-- semaim export: ([0-9a-f]{64}) -->\n")
#: Columns of `GAINS` in the card.
SHOWN = ("Method", "Baseline", "Task", "Metric", "Gain", "Verdict", "95 % over seeds", "95 % over images", "Remark")
#: Settings of a training: label -> dotted key of its config.
SETTINGS = {
    "batch size": "total_batch_size",
    "learning rate per 256 images": "base_lr",
    "peak learning rate": "optim_wrapper.optimizer.lr",
    "schedule": "param_scheduler.type",
    "warm-up, share of the training": "param_scheduler.warmup",
    "optimizer": "optim_wrapper.optimizer.type",
    "weight decay": "optim_wrapper.optimizer.weight_decay",
    "random seed": "seed",
}


def check_card(folder: str | os.PathLike) -> None:
    """`UserError` if files in the folder would be lost: a card that was edited by hand, or a model without one."""
    card = Path(folder) / NAME
    if not card.is_file():
        for other in (card.with_name(name) for name in ("model.safetensors", "config.json")):
            if other.exists():
                raise UserError(f"{other} is there without a card: move it away, or name another folder")
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    sealed = SEAL.search(text)
    if not (sealed and text.endswith(sealed[0]) and digest(text[: sealed.start()]) == sealed[1]):
        raise UserError(f"{card} is not as `semaim export` writes it: move it away, or name another folder")


def check_license(name: str | None) -> None:
    """`UserError` for what is no licence's name on the hub."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", name):
        raise UserError(
            f"--license {name}: give the hub's name of a licence, such as apache-2.0, cc-by-nc-4.0 or other"
        )


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


class Measured:
    """What the runs in some folders have measured of a checkpoint.

    Args:
        file: the checkpoint.
        folders: searched for results.json.

    Raises:
        UserError: none of them has measured it.
    """

    def __init__(self, file: str | os.PathLike, folders: Sequence[str | os.PathLike] = ()):
        self.cells: list[Cell] = []
        self.table = Table([], [])
        if not folders:
            return
        catalogue, skipped = load_published(), Skipped()
        runs: list[Run] = []
        for path in find_results(map(Path, folders), skipped):
            with skipped.trying(path):
                runs += read_runs(path, catalogue)
        tell(skipped.lines)
        mine = [run for run in runs if is_of(run, file)]
        if not mine:
            others = ", ".join(dict.fromkeys(run.record.checkpoint or "random weights" for run in runs)) or "nothing"
            raise UserError(f"--runs: no results.json there is of {file}; they are of {others}")
        self.cells = make_cells(mine, catalogue)
        order = by_pipeline(cell.runs[0].task for cell in self.cells)
        self.cells.sort(key=lambda cell: order.index(cell.runs[0].task))
        whole = make_table(map(Path, folders), catalogue, published=False)
        gains = [gain for gain in whole.gains if any(is_of(run, file) for run in gain.ours.runs)]
        self.table = Table([], [], gains)

    def results(self) -> list[EvalResult]:
        """The shares of images that were right, which the hub lists as accuracies, in percent."""
        return [
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", cell.data.lower()).strip("-") or "images",
                dataset_name=cell.data,
                metric_type="accuracy",
                metric_name=f"{cell.runs[0].task}, {cell.runs[0].metric}, percent",
                metric_value=round(cell.mean, 2),
            )
            for cell in self.cells
            if cell.runs[0].kind.share
            and AGAIN not in cell.remarks
            and not any(run.record.partly_loaded for run in cell.runs)  # of another network than the file's
        ]

    def lines(self) -> list[str]:
        """Tables of figures and of gains over a baseline."""
        if not self.cells:
            return ["No figures were given with the export."]
        rows = [("Task", "Data", "Metric", "Figure", "Remark")]
        for cell in self.cells:
            run = cell.runs[0]
            rows.append((run.task, cell.data, run.metric, our_words(cell), "; ".join(cell.remarks)))
        lines = [*pipes(rows), "", escaped(SPREAD)]
        if self.table.gains:
            places = [GAINS.index(name) for name in SHOWN]
            gains = [[row[place] for place in places] for row in gain_rows(self.table)]
            lines += ["", *pipes([SHOWN, *gains]), "", escaped(JUDGED)]
        return lines


def is_of(run: Run, file: str | os.PathLike) -> bool:
    """Whether a run has measured a checkpoint, or trained it to its end, where it measured it."""
    real = os.path.realpath(file)
    named = run.record.checkpoint
    last = os.path.join(run.folder, "latest.pth")  # an earlier one of the run has other figures
    return bool(named and os.path.realpath(named) == real) or os.path.realpath(last) == real


def write_card(
    file: str | os.PathLike, folder: Path, source: str, architecture: str, license_: str | None, measured: Measured
) -> None:
    """Write the card of an export.

    Args:
        file: the checkpoint.
        folder: of the export, with its config.json.
        source: what timm and this suite open: local-dir:DIR or hf-hub:OWNER/REPO.
        architecture: in timm.
        license_: of the weights, as the hub names it; None if none was stated.
        measured: its figures.
    """
    found, content = checkpoints.read(file), checkpoints.read_file(file)
    classes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_classes"]
    origin = origin_of(str(file), same=True, trained=True)
    catalogue = load_published()
    head = ModelCardData(
        license=license_,
        library_name="timm",
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        tags=["timm", "vision-transformer", *(["self-supervised-learning"] if origin.get("method") else [])],
        datasets=[IMAGENET] if _is_imagenet(origin, catalogue) else None,
        model_name=_name(source) if (results := measured.results()) else None,
        eval_results=results or None,
    )
    title = ": ".join(filter(None, (origin.get("method"), describe(found.sizes))))
    stated = f"The licence of the weights is {license_}." if license_ else "No licence of the weights was stated."
    parts = [
        f"# {escaped(title)}",
        f"The encoder in the checkpoint {escaped(Path(file).name)} ({found.dialect}), a plain Vision Transformer,"
        f" exported by SemAIM's `semaim export`. Whatever the file does not hold is {UNKNOWN}.",
        "## Encoder",
        *_table(_encoder(found, architecture, classes)),
        *_training(found, content, origin),
        "## Figures",
        "\n".join(measured.lines()),
        "## Use",
        *_use(source, classes),
        "## Limitations",
        "\n".join(f"* {line}" for line in _limitations(found, classes, bool(measured.cells))),
        "## Licence",
        stated,
    ]
    text = f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n\n"
    (folder / NAME).write_text(f"{text}<!-- semaim export: {digest(text)} -->\n", encoding="utf-8")


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["\n".join(pipes([("", ""), *((name, words(value)) for name, value in rows.items())]))]


def words(value: Any) -> str:
    """A recorded value as text: None is `UNKNOWN`; anything that is no plain value is not shown."""
    if isinstance(value, bool | float | str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple) and all(isinstance(item, int | float | str) for item in value):
        return ", ".join(map(words, value))
    return UNKNOWN


def _encoder(found: Checkpoint, architecture: str, classes: int) -> dict[str, Any]:
    sizes, statistics = found.sizes, found.statistics or Statistics(origin="ImageNet's, as the file holds none")
    weights = sum(t.numel() for name, t in found.state.items() if name.split(".")[0] in ENCODER)
    heads = f"{sizes['num_heads']}" + (" (a guess: the file has no number)" if found.heads_guessed else "")
    labels = [str(name) for name in found.classes or ()]
    head = f"{classes} classes" if classes else "none: tokens and features"
    if classes and labels:
        head += f": {', '.join(labels[:20])}" + (", ... (all in config.json)" if len(labels) > 20 else "")
    return {
        "architecture in timm": architecture,
        "weights": f"{weights:,}",
        "width, depth, heads": f"{sizes['embed_dim']}, {sizes['depth']}, {heads}",
        "patch": " x ".join(map(str, sizes["patch_size"])) + " pixels",
        "images": " x ".join(map(str, sizes["img_size"])) + " pixels (height x width), RGB",
        "mean, std": str(statistics),
        "head": head,
    }


def _training(found: Checkpoint, content: Any, origin: Mapping) -> list[str]:
    """Sections on how the encoder was pretrained and, if the file is of a later task, trained after that."""
    config = found.config or {}
    task = task_of(config) if found.config else None
    kept = _at(config, "origin")
    own = {
        **{label: _at(config, key) for label, key in SETTINGS.items()},
        "optimizer steps": content.get("step") if isinstance(content, Mapping) else None,
        "data": _folder(_at(config, "dataset.root") or _at(config, "train_dataset.data_root")),
        "images": content.get("images") if isinstance(content, Mapping) else None,
        "commit of the code": kept.get("commit") if isinstance(kept, Mapping) else None,
        "version of SemAIM": content.get("version") if isinstance(content, Mapping) and found.native else None,
        "version of PyTorch, hardware": None,
    }
    begun = {
        "method": origin.get("method"),
        "config": origin.get("pretrain_config") or (_at(config, "origin.config") if task and task.pretrains else None),
        "epochs": origin.get("pretrain_epochs"),
        "changes to the config": _changes(origin.get("pretrain_options")),
    }
    if task and task.pretrains:
        return ["## Pretraining", *_table({**begun, **own})]
    first = ["## Pretraining", *_table({**begun, "images": origin.get("pretrain_images")})]
    if task is None:
        return first
    epochs, iterations = origin.get("epochs"), origin.get("iterations")
    then = {
        "config": _at(config, "origin.config"),
        **({"iterations": iterations} if iterations else {"epochs": epochs}),
        "changes to the config": _changes(origin.get("cfg_options")),
    }
    return [*first, f"## Training after it: {escaped(task.title)}", *_table({**then, **own})]


def _use(source: str, classes: int) -> list[str]:
    result = (
        "print(model(images).softmax(dim=1))  # (1, classes)"
        if classes
        else "print(model.forward_features(images).shape)  # tokens (1, prefix + patches, width)"
    )
    snippets = {
        "With timm:": f"""python
import timm
import torch
from PIL import Image

model = timm.create_model({source!r}, pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
prepare = timm.data.create_transform(**config, is_training=False)
images = prepare(Image.new("RGB", (640, 480))).unsqueeze(0)  # or Image.open(FILE).convert("RGB")
with torch.no_grad():
    {result}""",
        "With SemAIM, for tokens, features and maps of blocks:": f"""python
import semaim
import torch

encoder = semaim.load_encoder({source!r})
images = torch.rand(1, 3, *encoder.img_size)  # pixels from 0 to 1
mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
with torch.no_grad():
    print(encoder((images - mean) / std).shape)  # tokens (1, prefix + patches, width)""",
        "To measure it by k-NN on labelled class folders, DATA/train/CLASS/... and DATA/val/CLASS/...:": f"""bash
semaim test semaim/configs/knn/plain_vit.py {shlex.quote(source)} --data-root DATA""",
    }
    # A fence is longer than every run of the same sign inside, which a path might have.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", source) or [""]))
    return [part for head, code in snippets.items() for part in (head, f"{fence}{code}\n{fence}")]


def _limitations(found: Checkpoint, classes: int, measured: bool) -> Iterable[str]:
    yield "Images have to be normalised with the mean and standard deviation above, and their sides be whole patches."
    yield (
        "It was made for images of the size above. For other sizes its position table is resampled (in timm:"
        " `img_size=SIZE`), which changes the features."
    )
    if found.skipped or any(name.split(".")[0] not in (*ENCODER, "head", "fc_norm") for name in found.state):
        yield "Decoders and prediction heads of the pretraining are not in it."
    if not found.statistics:
        yield "Mean and standard deviation are ImageNet's by assumption: the file held none."
    if found.heads_guessed:
        yield "The number of heads is a guess, and a wrong one gives wrong features."
    yield (
        ("The figures hold for the data they name" if measured else "It comes without figures")
        + "; what it is worth on other images, and which biases of its training images it has, was not measured here."
    )
    if classes:
        yield "It always answers with one of its classes, for images of anything."


def _at(config: Mapping, key: str) -> Any:
    """The value at a dotted key of a config that is not trusted; None if there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _name(source: str) -> str:
    """OWNER/REPO, or the name of a local folder."""
    kind, _, rest = source.partition(":")
    return rest if kind == "hf-hub" else Path(rest).resolve().name


def _folder(path: Any) -> str | None:
    """A folder's name, without where it lay."""
    return Path(path).name if isinstance(path, str) else None


def _changes(options: Any) -> str | None:
    """Options that were given on the command line, without paths."""
    if not isinstance(options, Mapping):
        return None
    kept = [f"{key}={_unplaced(value)}" for key, value in options.items() if not HARMLESS.fullmatch(str(key))]
    return ", ".join(kept) or "none"


def _unplaced(value: Any) -> Any:
    """A value with the last part alone of every path in it."""
    if isinstance(value, Mapping):
        return {key: _unplaced(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_unplaced(one) for one in value]
    return _folder(value) if isinstance(value, str) and "/" in value else value


def _is_imagenet(origin: Mapping, catalogue: Catalogue) -> bool:
    """Whether the encoder was pretrained on as many images as ImageNet-1k has."""
    return origin.get("pretrain_images") in catalogue.datasets["fine-tuning"].train_images
