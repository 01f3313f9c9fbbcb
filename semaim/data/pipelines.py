"""Transform pipelines of configs, reused from another config with some steps changed."""

from collections.abc import Iterable, Mapping

from semaim.errors import UserError


def changed(pipeline: Iterable[Mapping], **steps: Mapping | None) -> list[dict]:
    """The steps of a pipeline, with the steps of some types changed or left out.

    Args:
        pipeline: dicts with a `type`.
        steps: type of a step -> the arguments that change, or None to leave it out; `UserError` if there is no such
            step.
    """
    pipeline = [dict(step) for step in pipeline]
    if missing := steps.keys() - {step["type"] for step in pipeline}:
        raise UserError(f"the pipeline has no {min(missing)}: it has {', '.join(step['type'] for step in pipeline)}")
    return [{**step, **(steps.get(step["type"]) or {})} for step in pipeline if steps.get(step["type"], {}) is not None]
