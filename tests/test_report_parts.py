"""What a report reads of its runs: configs, methods, seeds, stages, and figures in their units."""

import json
import shutil
from dataclasses import replace

import pytest
from mmengine.config import Config
from test_opening import KNN, PRETRAINED, SCRATCH
from test_report import checked, put

from semaim.drawing.curves import COLOURS
from semaim.engine.config import load_config
from semaim.errors import UserError
from semaim.record import record_of
from semaim.registry import task_named
from semaim.results import load_published
from semaim.results.config_text import read_config
from semaim.results.figures import classes_of, figures_of
from semaim.results.overlays import overlays_of
from semaim.results.parts import in_order, read_part
from semaim.results.report import results_of, stages_of, write_report
from semaim.results.table import GAINS, JUDGED, make_table


def plain(value):
    """A value with lists in place of tuples."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ["pretrain/semaim_vit_base_800e", "finetune/vit_base_100e", "knn/vit_base"])
def test_a_config_is_read_as_mmengine_reads_it(name, tmp_path):
    file = tmp_path / "config.py"
    load_config(f"semaim/configs/{name}.py", check=False).dump(file)
    assert read_config(file.read_text()) == plain(Config.fromfile(file).to_dict())


def test_a_config_is_not_run(tmp_path):
    text = f"a = 1\nb = open({str(tmp_path / 'made')!r}, 'w')\nc = [2, b]\n"
    text += "d = dict(e=-1.5, f=(None, 'x'))\nfor g in 'h': i = 3\n"
    assert read_config(text) == {"a": 1, "d": {"e": -1.5, "f": [None, "x"]}}
    assert list(tmp_path.iterdir()) == []
    assert read_config("a = (") == {} and read_config("a = " + "(" * 5000 + ")" * 5000) == {}


def trained(folder, method, seed, losses, **more):
    """The folder of a pretraining of one epoch for each loss."""
    origin = {"config": "c.py", "method": method, "commit": "abc"}
    cfg = {"task": "pretrain", "seed": seed, "origin": origin, "train_cfg": {"max_epochs": 2}, "cfg_options": {}} | more
    text = "\n".join(f"{key} = {value!r}" for key, value in cfg.items())
    lines = [{"loss": loss, "iter": 10 * i, "epoch": i, "lr": 0.1} for i, loss in enumerate(losses, 1)]
    return put(folder, {"1/vis_data/config.py": text, "1/vis_data/scalars.json": "\n".join(map(json.dumps, lines))})


def test_runs_of_a_stage_share_a_chart(tmp_path):
    runs = [
        trained(tmp_path / "a", "SemAIM", 0, [3.0, 2.0]),
        trained(tmp_path / "b", "MAE", 0, [1.0, 0.5]),
        trained(tmp_path / "c", "SemAIM", 1, [3.0, 1.0]),
    ]
    parts = [read_part(run, run.name, load_published()) for run in runs]
    assert [(part.stage, part.method, part.seed) for part in parts] == [
        *(("pretraining", "SemAIM", "0"), ("pretraining", "MAE", "0"), ("pretraining", "SemAIM", "1")),
    ]
    places: dict[str, int] = {}
    loss, rate = overlays_of(parts, "a", places)
    assert [(key.series, key.curves, key.last) for key in loss.chart.keys] == [("SemAIM", 2, 1.5), ("MAE", 1, 0.5)]
    assert loss.notes == [
        "Thin: each seed. Thick: their mean.",
        "Losses of methods with different targets cannot be compared.",
    ]
    assert rate.notes == loss.notes[:1] and loss.label.endswith("last: SemAIM 1.5, MAE 0.5")
    # Another length, or another option, is no further seed; and a method keeps its colour in the next stage.
    longer = trained(tmp_path / "d", "SemAIM", 0, [3.0], train_cfg={"max_epochs": 9})
    other = trained(tmp_path / "e", "SemAIM", 0, [3.0], cfg_options={"model.network.order": "raster"})
    more = [read_part(run, run.name, load_published()) for run in (runs[1], longer, other)]
    names = [key.series for key in overlays_of(more, "b", places)[0].chart.keys]
    assert names == ["MAE", "SemAIM, 9 epochs", "SemAIM, 2 epochs, model.network.order=raster"]
    (alone,) = overlays_of(parts[1:2], "c", places)[0].chart.keys
    assert alone.series == "MAE" and alone.colour == 1 and max(places.values()) < COLOURS


def test_stages_are_in_the_order_of_the_pipeline(tmp_path):
    names = ["segmentation", "detection", "fine-tuning", "linear probing", "fast linear probe", "k-NN", "of my own"]
    for number, name in enumerate(names):
        put(tmp_path / f"w/{number}", {"results.json": {"task": name, "metrics": {"x": 1.0}}})
    trained(tmp_path / "w/9", "MAE", 0, [1.0])
    parts = [read_part(path, path.name, load_published()) for path in sorted((tmp_path / "w").iterdir())]
    assert list(in_order(parts)) == ["pretraining", *names[5::-1], "of my own"]
    stages = stages_of(parts)
    assert [stage.name for stage in stages[:3]] == ["Pretraining", "k-NN", "Fast linear probe"]
    anchors = [run.anchor for stage in stages for run in stage.runs]
    assert len(set(anchors)) == len(parts)
    write_report([tmp_path / "w"], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert set(anchors) <= set(page.ids) and {f"#{anchor}" for anchor in anchors} <= set(page.links)


def shown(task, **metrics):
    """Label -> figure with its unit, and whether lists of runs show it."""
    found = figures_of(record_of({"task": task, "metrics": metrics}))
    return {it.label: (it.words, it.headline) for it in found}


def test_figures_are_in_the_unit_of_their_metric():
    ap = {"coco/bbox_mAP": 0.006, "coco/bbox_mAP_50": 0.5, "coco/bbox_mAP_s": -1.0, "coco/segm_mAP": 1.0}
    assert shown("detection", **ap, **{"coco/cat_precision": 0.125, "coco/dog_precision": float("nan")}) == {
        **{"AP box": ("0.60 %", True), "AP50 box": ("50.00 %", True), "AP box, small objects": ("–", False)},
        **{"AP mask": ("100.00 %", True), "AP mask, cat": ("12.50 %", False), "AP mask, dog": ("–", False)},
    }
    assert list(shown("k-NN", knn20_top5=90.0, knn10_top1=30.0, knn20_top1=41.257).items()) == [
        *(("top-1, k = 10", ("30.00 %", False)), ("top-1, k = 20", ("41.26 %", True))),
        ("top-5, k = 20", ("90.00 %", False)),
    ]
    assert shown("fine-tuning", top1=50.0, loss=1.23456) == {"top-1": ("50.00 %", True), "loss": ("1.235 nats", False)}
    assert shown(None, top1=50.0, own=0.25) == {"top-1": ("50.00 %", True), "own": ("0.25", False)}
    assert shown("of my own", own=7) == {"own": ("7", True)}
    assert task_named("detection").metrics["coco/bbox_mAP"].tabled


def test_a_task_that_is_not_known_describes_its_metrics_itself():
    reported = {"gap": {"label": "the gap", "unit": "points", "factor": 10}}
    (found,) = figures_of(record_of({"task": "elsewhere", "metrics": {"gap": 0.5}, "reported": reported}))
    assert (found.heading, found.words) == ("the gap, points", "5 points")


def test_a_log_with_a_broken_table_is_passed_over():
    log = "| category | mAP | x |\n| cat | 0.5 |\n| dog | 0.25 | 3 |\n"
    (table,) = classes_of([f"Evaluating bbox...\n{log}\n"])
    assert table.head == ["class", "AP box, %", "x"] and table.rows == [["cat", "50.00"], ["dog", "25.00", "3"]]


def test_figures_by_class_are_a_table_of_the_run_and_no_column(tmp_path):
    by_class = {"IoU": {"road": 91.5, "tram": None}, "Acc": {"road": 95.25, "tram": None}}
    found = {"task": "segmentation", "metrics": {"mIoU": 91.5}, "classwise": by_class, "seed": 0}
    put(tmp_path / "run", {"results.json": found})
    logged = "+---+---+---+\n| Class | IoU | Acc |\n+---+---+---+\n| road | 7.0 | 8.0 |\n+---+---+---+\n"
    (tmp_path / "run/1").mkdir()
    (tmp_path / "run/1/1.log").write_text(logged)
    part = read_part(tmp_path / "run", "run", load_published())
    [table] = part.classes
    assert table.title == "IoU, Acc of each class" and table.head == ["class", "IoU, %", "Acc, %"]
    assert table.rows == [["road", "91.50", "95.25"], ["tram", "–", "–"]], "the file's, not the log's"
    assert [figure.label for figure in part.figures] == ["mIoU"] and "classwise" not in part.recorded
    for broken in ({"IoU": 7}, {"IoU": {"road": "much"}}, [7]):
        put(tmp_path / "run", {"results.json": {**found, "classwise": broken}})
        with pytest.raises(UserError, match="is broken: classwise"):
            read_part(tmp_path / "run", "run", load_published())


def test_notes_and_origins_are_of_rows_that_are_shown(tmp_path):
    mine = {**KNN, "task": "fine-tuning", "config": "vit_base_100e.py", "epochs": 100, "metrics": {"top1": 80.0}}
    put(tmp_path / "w/s", {"results.json": mine | PRETRAINED})
    put(tmp_path / "w/r", {"results.json": mine | SCRATCH})
    table = make_table([tmp_path / "w"], load_published())
    found = results_of(table)
    assert len(found.ours) == 2 and len(found.rows) > 5
    assert set(found.origins) == {"R1", "R2"} and all(mark[0] == "P" for mark in found.more_origins)
    assert found.notes and not any(note.startswith("Note ") for note in found.notes)
    assert found.more_notes and all(note.startswith("Note ") for note in found.more_notes)
    # The gain of one over the other is a table of its own, with the note on its verdicts.
    assert found.gains[0] == list(GAINS) and len(found.gains) == 2 and found.gain_notes == [JUDGED]
    page = report_of(tmp_path)
    assert "gains" in page.ids and "#gains" in page.links
    assert all(cell in page.text for cell in found.gains[1]) and JUDGED in page.text
    # One encoder alone has none.
    shutil.rmtree(tmp_path / "w/r")
    assert "gains" not in report_of(tmp_path).ids and JUDGED not in report_of(tmp_path).text


def report_of(tmp_path):
    """The page about the runs in w."""
    write_report([tmp_path / "w"], tmp_path / "r.html")
    return checked(tmp_path / "r.html")


def test_pictures_say_what_they_show(tmp_path):
    part = read_part(
        put(tmp_path / "run", {"results.json": {"task": "detection", "metrics": {}}}), "run", load_published()
    )
    assert part.captions["predictions"] == task_named("detection").shows
    assert "predictions" not in replace(part, task=None).captions and "order" in part.captions["orders"]
