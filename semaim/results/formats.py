"""The results table in each format: Markdown, CSV, LaTeX (booktabs) and HTML."""

import csv
import html
import io
import re
from collections.abc import Iterable, Sequence

from semaim.results import Published
from semaim.results.cells import ORIGIN
from semaim.results.table import GAINS, HEADER, Row, Table, at_a_glance, gain_rows, gains_at_a_glance, print_form

TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{sign: f"{{{sign}}}" for sign in "[*"},  # after a line break they would be read as its arguments
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"},
}
WIDE = {"Recipe": "p{3cm}", "Remark": "p{4cm}"}  #: LaTeX columns with text
#: Columns of a gain in CSV, besides those of every row: ends of its intervals over seeds and over images.
JUDGED = (
    "baseline",
    "gain",
    *(f"{end}_over_{what}" for what in ("seeds", "images") for end in ("low", "high")),
    "verdict",
)


def markdown(table: Table) -> str:
    """A Markdown table, and lists below it."""
    printed = print_form(table)
    lines = [*pipes([HEADER, *printed.rows]), ""]
    lines += [*pipes(printed.gains), ""] if printed.gains else []
    lines += [*(f"* {escaped(note)}" for note in printed.notes), ""]
    lines += [f"* {mark}: {escaped(text)}" for mark, text in printed.origins.items()]
    return "\n".join(lines) + "\n"


def glance(table: Table) -> str:
    """Markdown tables of our figures, one line per encoder, and of gains; empty for a single encoder."""
    tables = [pipes(rows) for rows in (at_a_glance(table), gains_at_a_glance(table)) if rows]
    return "\n".join("".join(line + "\n" for line in lines) for lines in tables)


def pipes(rows: Iterable[Sequence[str]]) -> list[str]:
    """Header and rows as lines of a Markdown table."""
    lines = [[escaped(cell) for cell in row] for row in rows]
    lines[1:1] = [["---"] * len(row) for row in lines[:1]]
    return ["| " + " | ".join(line) + " |" for line in lines]


def escaped(text: str) -> str:
    """Text escaped for Markdown."""
    text = re.sub(r"[\\|*`<>&\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda sign: f"\\{sign[0]}", text)
    return " ".join(text.split())


def comma_separated(table: Table) -> str:
    """One line per row, then one per gain, with unrounded numbers and all other values in separate columns."""
    columns = ["published", "published_to", "status", "source", "ours", "std", "n", "difference", "remark", "notes"]
    origin = [*ORIGIN, "folder"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    labels = [name.lower() for name in (*HEADER[:6], "Data")]
    writer.writerow([name.replace(" ", "_") for name in (*labels, *columns, *origin, *JUDGED)])
    for row in table.rows:
        figure, cell = row.published, row.cell
        words: list[object] = published_cells(figure)
        words += [""] * 3 if cell is None else [number(cell.mean), number(cell.spread), len(cell.runs)]
        words += [number(row.difference), "; ".join(row.remarks)]
        words.append(" ".join(figure.notes) if figure else "")
        words += [cell.origin[name] if cell else "" for name in origin]
        writer.writerow([*row.labels().values(), *words, *[""] * len(JUDGED)])
    for gain, printed in zip(table.gains, gain_rows(table), strict=True):
        words = [*published_cells(gain.published), "", "", gain.seeds, number(gain.difference)]
        words += ["; ".join(gain.remarks), " ".join(gain.published.notes) if gain.published else ""]
        words += [gain.ours.origin[name] for name in origin]
        words += [printed[GAINS.index("Baseline")], number(gain.points)]
        for interval in (gain.over_seeds, gain.over_images):
            words += [number(interval.low), number(interval.high)] if interval else ["", ""]
        writer.writerow([*Row(None, gain.ours).labels().values(), *words, gain.verdict])
    return file.getvalue()


def published_cells(figure: Published | None) -> list[object]:
    """A published figure's value, upper end, status and source; empty without one."""
    return [""] * 4 if figure is None else [figure.value, figure.value_to, figure.status, figure.source]


def number(value: float | None) -> str:
    """All significant digits, without binary rounding noise."""
    return "" if value is None else f"{value:.10g}"


def latex(table: Table) -> str:
    """A booktabs table, and paragraphs below it."""

    def escape(text: str) -> str:
        return " ".join("".join(TEX.get(sign, sign) for sign in text).split())

    def tabular(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
        columns = "".join(WIDE.get(name, "l") for name in header)
        lines = [rf"\footnotesize\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [" & ".join(map(escape, header)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(escape, row)) + r" \\" for row in rows]
        return [*lines, r"\bottomrule", r"\end{tabular}", ""]

    printed = print_form(table)
    lines = [r"% \usepackage{booktabs}", *tabular(HEADER, printed.rows)]
    lines += [r"\par", *tabular(printed.gains[0], printed.gains[1:])] if printed.gains else []
    below = [*printed.notes, *(f"{mark}: {text}" for mark, text in printed.origins.items())]
    lines += [rf"\par\noindent {escape(text)}" for text in below]
    return "\n".join(lines) + "\n"


def hypertext(table: Table) -> str:
    """An HTML fragment that takes its colours from the page, light or dark."""
    printed = print_form(table)

    def line(cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
        return [
            '<table border="1" cellpadding="4" style="border-collapse: collapse">',
            f"<thead>{line(header, 'th')}</thead>",
            "<tbody>",
            *(line(row, "td") for row in rows),
            "</tbody>",
            "</table>",
        ]

    below = [*printed.notes, *(f"{mark}: {text}" for mark, text in printed.origins.items())]
    return "\n".join(
        [
            '<div class="semaim-results" style="overflow-x: auto">',
            *grid(HEADER, printed.rows),
            *(grid(printed.gains[0], printed.gains[1:]) if printed.gains else []),
            "<ul>",
            *(f"<li>{html.escape(text)}</li>" for text in below),
            "</ul>",
            "</div>",
            "",
        ]
    )


FORMATS = {"md": markdown, "csv": comma_separated, "latex": latex, "html": hypertext}
