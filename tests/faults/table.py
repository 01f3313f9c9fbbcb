"""Print the counts of the attacks as Markdown tables, from work_dirs/faults/*.json: `python tests/faults/table.py`.

docs/reliability.md has them; they are never typed by hand.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(os.environ.get("SEMAIM_FAULTS", Path(__file__).resolve().parents[2] / "work_dirs" / "faults"))
KILLS = ("starting", "stepping", "saving", "rotating", "stored", "validating", "finishing", "measured")


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table, with its first row as head."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def mib(numbers: dict) -> list[str]:
    """Slope, its interval and the largest value, in MiB."""
    low, high = numbers["slope_95"]
    return [f"{numbers['slope'] / 2**20:+.2f}", f"{low / 2**20:+.2f} to {high / 2**20:+.2f}",
            f"{numbers['largest'] / 2**20:.0f}"]  # fmt: skip


def plain(content: dict) -> str:
    """What an attack without a table of its own counted, in one cell."""
    left = {
        key: value for key, value in content.items() if key not in ("attack", "python", "seconds", "problems", "kinds")
    }
    return "; ".join(f"{key.replace('_', ' ')}: {in_words(value)}" for key, value in left.items()).replace("|", "\\|")


def in_words(value: object) -> str:
    """A count, or counts by name: {"read": 3, "refused": {"a": 1}} -> read 3, refused (a 1); an empty list is 0."""
    if isinstance(value, dict):
        inner = ((name, in_words(part), isinstance(part, dict)) for name, part in value.items())
        return ", ".join(f"{name} ({text})" if deep else f"{name} {text}" for name, text, deep in inner)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "0"
    return str(value)


def tables(contents: list[dict]) -> str:
    """All tables: kills, leaks, and whatever else was counted."""
    kills = [content for content in contents if content["attack"].startswith("kills_")]
    leaks = [content for content in contents if content["attack"].startswith("leaks_")]
    noticed = [content for content in contents if "noticed" in content]
    others = [content for content in contents if content not in [*kills, *leaks, *noticed]]
    spots = [spot for spot in KILLS if any(spot in content["spots"] for content in kills)]
    total = {spot: sum(content["spots"].get(spot, 0) for content in kills) for spot in spots}
    parts = []
    if kills:
        rows = [
            [content["attack"][6:].replace("_", ", "), content["kills"], content["lives"],
             *(content["spots"].get(spot, 0) or "" for spot in spots),
             content.get("after_a_checkpoint", "-"), content.get("while_writing", "-"), len(content["problems"]),
             content["seconds"]]
            for content in kills
        ]  # fmt: skip
        rows.append(["all", sum(c["kills"] for c in kills), sum(c["lives"] for c in kills), *total.values(),
                     sum(c.get("after_a_checkpoint", 0) for c in kills), sum(c.get("while_writing", 0) for c in kills),
                     sum(len(c["problems"]) for c in kills), sum(c["seconds"] for c in kills)])  # fmt: skip
        head = ["killed", "kills", "runs", *spots, "after a checkpoint", "file half-written", "problems", "seconds"]
        parts.append(markdown(head, rows))
    for content in leaks:
        over = f"{content['steps']} steps" if "steps" in content else f"{content['images']} images"
        rows = []
        for name, numbers in content["found"].items():
            if name.startswith(("memory", "shared")):
                cells = mib(numbers)
                rows.append([f"{name}, MiB", *cells])
            else:
                low, high = numbers["slope_95"]
                rows.append([name, f"{numbers['slope']:+.1f}", f"{low:+.1f} to {high:+.1f}", numbers["largest"]])
        unit = "1,000 steps" if "steps" in content else over
        parts.append(markdown([f"over {over}", f"growth in {unit}", "95 % interval", "largest"], rows))
    for content in noticed:
        by = list(next(iter(content["noticed"].values())))
        rows = [[damage, *(found[reader] for reader in by)] for damage, found in content["noticed"].items()]
        parts.append(markdown([f"damage of {content['photographs']} photographs, noticed by", *by], rows))
    if others:
        rows = [[content["attack"].replace("_", " "), plain(content)] for content in others]
        parts.append(markdown(["attack", "counted"], rows))
    return "\n\n".join(parts)


def main() -> int:
    """Print them; exit status 1 if there is nothing to print."""
    contents = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    if not contents:
        print(f"nothing in {FOLDER}: run tools/test.sh --faults first", file=sys.stderr)
        return 1
    print(tables(contents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
