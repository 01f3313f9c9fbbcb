"""The results table in each format: Markdown, CSV, LaTeX (booktabs) and HTML."""

import csv
import html
import io
import re
from collections.abc import Iterable, Sequence

from semaim.results.table import HEADER, ORIGIN, Table, at_a_glance, print_form

TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{sign: f"{{{sign}}}" for sign in "[*"},  # after a line break they would be read as its arguments
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"},
}
WIDE = {"Recipe": "p{3cm}", "Remark": "p{4cm}"}  #: LaTeX columns with text


def markdown(table: Table) -> str:
    """A Markdown table, and lists below it."""
    printed = print_form(table)
    lines = [*pipes([HEADER, *printed.rows]), ""]
    lines += [*(f"* {escaped(note)}" for note in printed.notes), ""]
    lines += [f"* {mark}: {escaped(text)}" for mark, text in printed.origins.items()]
    return "\n".join(lines) + "\n"


def glance(table: Table) -> str:
    """A Markdown table of our figures, one line per encoder; empty for a single encoder."""
    return "".join(line + "\n" for line in pipes(at_a_glance(table)))


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
    """One line per row, with unrounded numbers and all other values in separate columns."""
    columns = ["published", "published_to", "status", "source", "ours", "std", "n", "difference", "remark", "notes"]
    origin = [*ORIGIN, "folder"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    labels = [name.lower() for name in (*HEADER[:6], "Data")]
    writer.writerow([name.replace(" ", "_") for name in (*labels, *columns, *origin)])
    for row in table.rows:
        figure, cell = row.published, row.cell
        words: list[object] = (
            [""] * 4 if figure is None else [figure.value, figure.value_to, figure.status, figure.source]
        )
        words += [""] * 3 if cell is None else [number(cell.mean), number(cell.spread), len(cell.runs)]
        words += [number(row.difference), "; ".join(cell.remarks) if cell else ""]
        words.append(" ".join(figure.notes) if figure else "")
        words += [cell.origin[name] if cell else "" for name in origin]
        writer.writerow([*row.labels().values(), *words])
    return file.getvalue()


def number(value: float | None) -> str:
    """All significant digits, without binary rounding noise."""
    return "" if value is None else f"{value:.10g}"


def latex(table: Table) -> str:
    """A booktabs table, and paragraphs below it."""

    def escape(text: str) -> str:
        return " ".join("".join(TEX.get(sign, sign) for sign in text).split())

    printed = print_form(table)
    columns = "".join(WIDE.get(name, "l") for name in HEADER)
    lines = [r"% \usepackage{booktabs}", rf"\footnotesize\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(escape, HEADER)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escape, row)) + r" \\" for row in printed.rows]
    lines += [r"\bottomrule", r"\end{tabular}", ""]
    below = [*printed.notes, *(f"{mark}: {text}" for mark, text in printed.origins.items())]
    lines += [rf"\par\noindent {escape(text)}" for text in below]
    return "\n".join(lines) + "\n"


def hypertext(table: Table) -> str:
    """An HTML fragment that takes its colours from the page, light or dark."""
    printed = print_form(table)

    def line(cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    below = [*printed.notes, *(f"{mark}: {text}" for mark, text in printed.origins.items())]
    return "\n".join(
        [
            '<div class="semaim-results" style="overflow-x: auto">',
            '<table border="1" cellpadding="4" style="border-collapse: collapse">',
            f"<thead>{line(HEADER, 'th')}</thead>",
            "<tbody>",
            *(line(row, "td") for row in printed.rows),
            "</tbody>",
            "</table>",
            "<ul>",
            *(f"<li>{html.escape(text)}</li>" for text in below),
            "</ul>",
            "</div>",
            "",
        ]
    )


FORMATS = {"md": markdown, "csv": comma_separated, "latex": latex, "html": hypertext}
