"""Pipelines of transforms as configs write them, taken over from another config with some of their steps changed."""

from collections.abc import Iterable, Mapping

from semaim.errors import UserError


def changed(pipeline: Iterable[Mapping], **steps: Mapping | None) -> list[dict]:
    """The steps of a pipeline, those of some types with other arguments, or left out.

    Args:
        pipeline: dicts with a `type`.
        steps: type of a step -> its arguments that differ, or None to leave it out; `UserError` for one that is not
            there.
    """
    pipeline = [dict(step) for step in pipeline]
    if missing := steps.keys() - {step["type"] for step in pipeline}:
        raise UserError(f"the pipeline has no {min(missing)}: it has {', '.join(step['type'] for step in pipeline)}")
    return [{**step, **(steps.get(step["type"]) or {})} for step in pipeline if steps.get(step["type"], {}) is not None]
