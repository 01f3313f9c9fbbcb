"""Whether one of our figures may stand beside a published one, field by field, and what it would take.

A field that the published source does not state neither matches nor forbids. A field that is known and differs forbids.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from semaim.results import Catalogue, Published
from semaim.results.runs import Run

PROVEN = ("read", "derived")  #: statuses of figures that are compared


@dataclass(frozen=True)
class Comparison:
    """One of our figures and a published one of the same task and metric.

    Args:
        differs: fields in which they differ, in words, such as "pretraining epochs 400, published 800".
        unstated: names of fields that the published source does not state.
    """

    differs: tuple[str, ...]
    unstated: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether the difference of the two says something."""
        return not self.differs


def compare(run: Run, figure: Published) -> Comparison:
    """Compare all fields; reasons of the run's own, such as fewer images, are `semaim.results.runs.remarks_of`."""
    differs, unstated = [], []
    pairs = {
        "method": (run.method, figure.method),
        "backbone": (run.backbone, figure.backbone),
        "pretraining epochs": (run.record.pretrain_epochs, figure.pretrain_epochs),
    }
    for name, (ours, theirs) in pairs.items():
        if theirs is None:
            unstated.append(name)
        elif ours != theirs:
            differs.append(f"{name} {'not recorded' if ours is None else ours}, published {theirs}")
    asked = figure.recipe
    if asked is None:
        unstated.append("recipe")
    elif run.recipe and asked in run.recipe.states:
        unstated.append("all of the recipe")
    elif run.recipe is None or asked != run.recipe.name:
        differs.append(f"recipe {run.recipe.name if run.recipe else 'none that is published'}, published {asked}")
    if figure.scales is None:
        unstated.append("scales")
    elif run.scales is None:
        differs.append(f"scales not recorded, published {', '.join(map(str, figure.scales))}")
    return Comparison(tuple(differs), tuple(unstated))


def unusable(figure: Published) -> str:
    """Why nothing can be compared with a published figure; empty if something can."""
    if figure.value is None:
        return "its value is not known"
    if figure.status not in PROVEN:
        return f"it is {figure.status}, not read"
    return "it is a range" if figure.value_to is not None else ""


def reason(run: Run, figures: Iterable[Published]) -> str:
    """Why a run without remarks of its own stands beside none of these figures: the field that differs, by name."""
    figures = [figure for figure in figures if figure.task == run.task and not figure.over]
    if not figures:
        return "nothing published to compare with"
    measured = [figure for figure in figures if figure.metric == run.metric]
    if not measured:
        return f"metric {run.metric}: published are {listed(figure.metric for figure in figures)}"
    own = [figure for figure in measured if figure.method == run.method]
    if not own:
        return f"method {run.method}: nothing published of it"
    same = [figure for figure in own if figure.backbone == run.backbone]
    if not same:
        return f"backbone {run.backbone or 'not recorded'}: published of {run.method} are" + (
            f" {listed(figure.backbone for figure in own)}"
        )
    usable = [figure for figure in same if not unusable(figure)]
    if not usable:
        return f"the published figure: {unusable(same[0])}"
    compared = [(compare(run, figure), figure) for figure in usable]
    nearest, figure = min(compared, key=lambda pair: len(pair[0].differs))
    return f"not compared with {figure.value}: {'; '.join(nearest.differs)}"


def way(figure: Published, catalogue: Catalogue) -> tuple[str, str]:
    """How one of our runs gets beside a published figure: (config, weights); or ("", why none does).

    The weights are a pretraining config of ours, or timm's name of released ones.
    """
    if why := unusable(figure):
        return "", why
    known = {recipe.name: recipe for recipe in catalogue.recipes if recipe.task == figure.task}
    fitting = [recipe for recipe in known.values() if figure.recipe in (None, recipe.name, *recipe.states)]
    if not fitting:
        return "", f"no config here follows its recipe ({figure.recipe})"
    configs = [pair for recipe in fitting for pair in recipe.configs.items()]
    fit = [config for backbone in (figure.backbone, None) for config, has in configs if has == backbone]
    if not fit:
        return "", f"no config here follows its recipe with {figure.backbone}"
    released = {f"timm:{name}": weights for name, weights in catalogue.released.items()}
    asked = (figure.method, figure.backbone, figure.pretrain_epochs)
    for name, weights in {**catalogue.pretrainings, **released}.items():
        given = (weights.method, weights.backbone, weights.pretrain_epochs)
        if all(wanted in (None, has) for wanted, has in zip(asked, given, strict=True)):
            return fit[0], name
    return "", f"no pretraining config here, and no released weights listed, are {weights_words(figure)}"


def way_words(figure: Published, catalogue: Catalogue) -> str:
    """`way` as a remark beside a published figure that has none of ours."""
    config, weights = way(figure, catalogue)
    if not config:
        return f"not comparable: {weights}"
    averaged = " --tta" if figure.scales and len(figure.scales) > 1 else ""
    gain = f", and the same with {figure.over}: --against {figure.over}" if figure.over else ""
    return f"measured by {config}{averaged} on {weights}{gain}"


def weights_words(figure: Published) -> str:
    """The weights of a figure in words."""
    epochs = f", {figure.pretrain_epochs} epochs" if figure.pretrain_epochs else ""
    return f"{figure.method}'s {figure.backbone}{epochs}"


def listed(names: Iterable[str]) -> str:
    """Distinct names with commas."""
    return ", ".join(dict.fromkeys(names))
