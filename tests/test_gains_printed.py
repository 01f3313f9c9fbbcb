"""Gains as they are printed: every format, at a glance, and the command."""

import csv
import io
import re

import pytest
from commands import one_line, tool
from test_gains import MAE, pair
from test_results import CATALOGUE, WHOLE, write

from semaim.cli.results_table import main
from semaim.results.formats import FORMATS, glance
from semaim.results.table import GAINS, at_a_glance, gain_rows, gains_at_a_glance, make_table


@pytest.fixture
def compared(tmp_path):
    """Two methods, three seeds."""
    pair(tmp_path, [84.0, 84.3, 84.15], [83.5, 83.6, 83.55])
    return tmp_path


def test_gains_are_printed_in_every_format(compared):
    table = make_table([compared], CATALOGUE)
    (row,) = gain_rows(table)
    assert len(row) == len(GAINS)
    words = dict(zip(GAINS, row, strict=True))
    assert words["Gain"] == "+0.60" and words["Verdict"] == "better" and words["Published gain"] == "+0.5"
    assert (words["Method"], words["Baseline"], words["Seeds"]) == ("SemAIM", "MAE", "3")
    markdown = FORMATS["md"](table)
    (line,) = [line for line in markdown.splitlines() if "| better |" in line]
    assert re.sub(r"\\(.)", r"\1", line) == "| " + " | ".join(row) + " |" and "* Gain: mean difference" in markdown
    assert r" & ".join(row).replace("%", r"\%") in FORMATS["latex"](table)
    assert f"<td>{'</td><td>'.join(row)}</td>" in FORMATS["html"](table)
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))
    (line,) = [line for line in lines if line["gain"]]
    assert (line["baseline"], line["verdict"], line["published"], line["n"]) == ("MAE", "better", "0.5", "3")
    assert float(line["gain"]) == pytest.approx(0.6) and float(line["difference"]) == pytest.approx(0.1)
    (gain,) = table.gains
    ends = (gain.over_seeds.low, gain.over_seeds.high, gain.over_images.low, gain.over_images.high)
    columns = [f"{end}_over_{what}" for what in ("seeds", "images") for end in ("low", "high")]
    assert [float(line[name]) for name in columns] == pytest.approx(list(ends))
    assert "SemAIM over MAE" in glance(table) and ": better |" in glance(table)


def test_at_a_glance_recipes_and_backbones_have_columns_of_their_own(tmp_path):
    pair(tmp_path / "base", [84.0], [83.5])
    pair(tmp_path / "large", [84.0], [85.0], backbone="ViT-L")
    write(tmp_path / "mae", WHOLE, **MAE, config="vit_base_100e_mae.py", metrics={"top1": 83.0})
    table = make_table([tmp_path], CATALOGUE)
    recipes = [f"{name} fine-tuning, 100 epochs" for name in ("SemAIM", "MAE")]
    header, *lines = at_a_glance(table)
    assert {name.partition("top-1 ")[2] for name in header[-2:]} == {f"({recipe})" for recipe in recipes}
    assert all(figure.count(".") <= 1 for line in lines for figure in line)
    header, line = gains_at_a_glance(table)
    assert {name.partition("top-1 ")[2] for name in header[1:]} == {"(ViT-B)", "(ViT-L)"}  # the recipe is one
    assert [figure[:5] for figure in line[1:]] == ["+0.50", "-1.00"]


def test_the_command_takes_a_baseline(compared, capsys):
    main([str(compared), "--against", "mae", "--no-published"])
    printed = capsys.readouterr().out
    assert "| SemAIM | MAE | fine-tuning, ImageNet-1k | top-1 | +0.60 | better |" in printed and "+0.60" in printed
    main([str(compared), "--against", "semaim", "--glance"])
    printed = capsys.readouterr().out
    assert "MAE over SemAIM" in printed and "-0.60" in printed
    one_line(tool("results_table.py", compared, "--against", "dino"), "--against dino")
