"""timm's config.json beside a file of weights: which network the weights are of, and what its images look like."""

import json
import os
from pathlib import Path

from semaim.errors import UserError


def beside(path: str | os.PathLike) -> dict | None:
    """The config.json (`architecture`, `model_args`, `pretrained_cfg`) in the folder of a .safetensors or .bin file.

    None where there is none, or one that is not timm's.
    """
    path = Path(path)
    config = path.with_name("config.json")
    if path.suffix not in (".safetensors", ".bin") or not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {config}, which tells what {path.name} is: {error}") from None
    return content if isinstance(content, dict) and isinstance(content.get("architecture"), str) else None
