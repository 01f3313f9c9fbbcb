"""A description of a checkpoint, and of what each consumer loads from it."""

import os

from semaim.checkpoints.consumers import LINEAR, verdicts
from semaim.checkpoints.exporting import plain_report
from semaim.checkpoints.loading import grouped
from semaim.checkpoints.normalisation import Statistics
from semaim.checkpoints.reading import read
from semaim.checkpoints.same_network import ENCODER
from semaim.checkpoints.sizes import describe
from semaim.errors import UserError


def inspect(path: str | os.PathLike) -> str:
    """Describe a checkpoint, and what each consumer loads from it or why it refuses it."""
    found = read(path)
    state, sizes = found.state, found.sizes
    encoder = [name for name in state if name.split(".")[0] in ENCODER]
    parts = [name for name in state if name not in encoder]
    rows = [
        ("file", f"{found.path}, {found.path.stat().st_size / 2**20:.1f} MiB"),
        ("dialect", found.dialect),
        ("encoder", describe(sizes)),
        ("heads", f"{sizes['num_heads']}" + (" (a guess: 64 channels each)" if found.heads_guessed else "")),
        ("weights", f"{sum(state[name].numel() for name in encoder):,} in {len(encoder)} tensors"),
        ("epochs", "not recorded" if found.epoch is None else str(found.epoch)),
        ("also in it", grouped(parts) or "nothing"),
        ("images", str(found.statistics or Statistics(origin="ImageNet's, as the file holds none"))),
    ]
    if found.skipped:
        rows.append(("not read", grouped(found.skipped)))
    if head := next((name for name in LINEAR if name in state), None):
        named = ", ".join(map(str, (found.classes or [])[:3])) + (", ..." if len(found.classes or []) > 3 else "")
        rows.append(("classes", f"{len(state[head])}" + (f": {named}" if named else "")))
    rows += verdicts(found)
    try:
        plain_report(found).refuse()
        rows.append(("convert, export", "as a plain ViT"))
    except UserError as error:
        rows.append(("convert, export", f"refused: {error}"))
    return "\n".join(f"{name:15} {value}" for name, value in rows)
