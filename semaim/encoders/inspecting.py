"""A description of an encoder's source, and of what each task would read of it."""

import os
from collections.abc import Iterator

from semaim.checkpoints import grouped
from semaim.encoders.contract import POOLS, Source, without_memory
from semaim.encoders.networks import PlainClassifier, PlainSegmentationViT, PlainViTDet
from semaim.encoders.sources import open_source
from semaim.errors import UserError

#: Task -> its network on a source's encoder.
NETWORKS = {
    "k-NN, probes": lambda source, pool: PlainClassifier(source.description, 0, pool, probe=True, img_size=source.size),
    "fine-tuning": lambda source, pool: PlainClassifier(source.description, 1, "avg", img_size=source.size),
    "detection": lambda source, pool: PlainViTDet(source.description),
    "segmentation": lambda source, pool: PlainSegmentationViT(source.description),
}


def describe(source: str | os.PathLike, arch: str | None = None) -> str:
    """Describe an encoder by its source; `UserError` if it cannot be opened."""
    found = open_source(source, arch)
    with without_memory():
        encoder = found.build()
    prefix = encoder.num_prefix_tokens
    named = ["class token"] * encoder.has_class_token
    others = prefix - len(named)
    named += [f"{others} other token{'s' * (others > 1)}"] if others else []
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    preparation = found.preparation
    height, width = found.size
    rows = [
        ("source", found.name),
        ("file", f"{found.path}, {found.path.stat().st_size / 2**20:.1f} MiB"),
        ("names", found.layout),
        ("architecture", encoder.title + (f" with {args}" if (args := found.description.get("args")) else "")),
        ("encoder", f"width {encoder.embed_dim}, depth {encoder.depth}, patch {encoder.patch_size[0]}"),
        ("prefix tokens", f"{prefix}" + (f": {', '.join(named)}" if named else "")),
        ("weights", f"{weights:,}"),
        ("positions", f"for {height} x {width} pixels"),
        ("images", f"{preparation}"),
        ("pooling", ", ".join(name for name in POOLS if _has(encoder, name))),
    ]
    if found.left:
        rows.append(("not read", grouped(found.left)))
    rows += verdicts(found)
    return "\n".join(f"{name:15} {value}" for name, value in rows)


def _has(encoder, pool: str) -> bool:
    try:
        encoder.check_pool(pool)
    except UserError:
        return False
    return True


def verdicts(found: Source) -> Iterator[tuple[str, str]]:
    """What each task would load from a source, or why it would refuse it."""
    for task, build in NETWORKS.items():
        try:
            with without_memory():
                probe = found.build()
                network = build(found, "cls" if probe.has_class_token else "avg")
                report = network.encoder.load(found)
        except UserError as error:
            yield task, f"refused: {error}"
            continue
        resized = f"; resized: {grouped(line.split()[0] for line in report.resized)}" if report.resized else ""
        windows = f"; windows of {network.window_size} patches" if isinstance(network, PlainViTDet) else ""
        yield task, f"{len(report.matched)} tensors{resized}{windows}"
