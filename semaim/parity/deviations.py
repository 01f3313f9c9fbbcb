"""Deliberate differences of the suite from its references: `deviations.yaml` as data and as the docs' table."""

from dataclasses import dataclass
from importlib.resources import files

import yaml

from semaim.errors import UserError


@dataclass(frozen=True)
class Deviation:
    """One difference: its stage and subject, what the reference does, what the suite does, and why."""

    stage: str
    what: str
    reference: str
    ours: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reference}; here {self.ours} ({self.why})"


def read_deviations() -> list[Deviation]:
    """All differences, by stage, in the order of the file."""
    stages = yaml.safe_load((files("semaim.parity") / "deviations.yaml").read_text())
    try:
        return [
            Deviation(stage, **{key: " ".join(str(text).split()) for key, text in entry.items()})
            for stage, entries in stages.items()
            for entry in entries or ()
        ]
    except TypeError as error:
        raise UserError(
            f"semaim/parity/deviations.yaml: an entry has what, reference, ours and why ({error})"
        ) from None


def as_table(stage: str) -> str:
    """The differences of a stage as a table in Markdown."""
    rows = [("What", "Reference", "Here", "Why"), ("---",) * 4]
    rows += [(d.what, d.reference, d.ours, d.why) for d in read_deviations() if d.stage == stage]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows) + "\n"
