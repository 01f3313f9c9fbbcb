"""Published figures as data, and the results table that compares ours with them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STATUSES = ("read", "derived", "remembered", "unknown")  #: explained at the top of published.yaml

SINGLE = (1.0,)  #: scales of a prediction that is not averaged


def measured(metric: str, scales: tuple[float, ...] | None) -> str:
    """A metric's name, with the scales if predictions were averaged; `scales` is None if they are not known."""
    if scales == SINGLE:
        return metric
    return f"{metric}, {len(scales) if scales else 'several'} scales and flipped"


@dataclass(frozen=True)
class Published:
    """One published figure. None means not stated or, for `value`, not known.

    Args:
        value: percent, or points for gains; the lower end of a range if `value_to` is given.
        status: one of `STATUSES`.
        source: where it was read.
        notes: printed wherever the figure is.
        scales: image scales that predictions are averaged over, each also flipped; `SINGLE` for one, unflipped.
        over: the method that a gain is over; None for a figure that is no gain. `metric` says it, too.
    """

    method: str
    backbone: str
    pretrain_epochs: int | None
    task: str
    data: str
    metric: str
    recipe: str | None
    value: float | None
    status: str
    source: str
    value_to: float | None = None
    notes: tuple[str, ...] = ()
    scales: tuple[float, ...] | None = SINGLE
    over: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How a published figure was trained.

    Args:
        configs: those of ours that follow it, by file name -> backbone; None for any.
        epochs, iterations: length of the training.
        states: recipes of published figures that agree with this one in all that their sources state.
        images: how images are prepared for validation, as results.json records it; None if that is not stated.
        unlike: config -> in what it differs from the recipe.
    """

    name: str
    task: str
    configs: dict[str, str | None]
    epochs: int | None = None
    iterations: int | None = None
    states: tuple[str, ...] = ()
    images: dict[str, Any] | None = None
    unlike: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pretraining:
    """What weights are: of one of our configs, or released by others, with the source that says so."""

    method: str
    backbone: str
    pretrain_epochs: int
    source: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Number of images in the whole data set: `train_images` has the numbers that count as complete."""

    name: str
    train_images: tuple[int, ...]
    val_images: int


@dataclass(frozen=True)
class Catalogue:
    """Everything known about published figures."""

    figures: list[Published] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)
    datasets: dict[str, Dataset] = field(default_factory=dict)  # by task
    pretrainings: dict[str, Pretraining] = field(default_factory=dict)  # by config file
    released: dict[str, Pretraining] = field(default_factory=dict)  # by timm's name

    def recipe_of(self, config: str, task: str | None) -> Recipe | None:
        """The recipe that a config follows, by its file name; of two files of one name that of the task's."""
        found = [recipe for recipe in self.recipes if config in recipe.configs]
        return next((recipe for recipe in found if recipe.task == task), next(iter(found), None))


def load_published() -> Catalogue:
    """Read `published.yaml`; sources and notes are expanded to their full text."""
    text = (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    figures = []
    for group in raw["groups"]:
        shared = {key: value for key, value in group.items() if key != "figures"}
        for entry in group["figures"]:
            entry = {**shared, **entry}
            notes = tuple(raw["notes"][name] for name in entry.get("notes", ()))
            entry |= {"source": raw["sources"][entry["source"]], "notes": notes}
            entry["scales"] = tuple(entry.get("scales", SINGLE))
            gain = f", gain over {entry['over']}" if entry.get("over") else ""
            entry["metric"] = measured(entry["metric"], entry["scales"]) + gain
            figures.append(Published(**entry))
    recipes = [Recipe(**{**recipe, "states": tuple(recipe.get("states", ()))}) for recipe in raw["recipes"]]
    released = {
        name: Pretraining(**{**known, "source": raw["sources"][known["source"]]})
        for name, known in raw["released"].items()
    }
    sizes = {name: Dataset(name, tuple(n["train_images"]), n["val_images"]) for name, n in raw["datasets"].items()}
    return Catalogue(
        figures,
        recipes,
        {group["task"]: sizes[group["data"]] for group in raw["groups"]},
        {config: Pretraining(**known) for config, known in raw["pretrainings"].items()},
        released,
    )
