"""Every command and every block of Python of the pages is run as it stands, or listed with the reason why not."""

import re
import shlex
from collections import Counter

import documented
import pytest
from commands import ROOT
from documented import Step, check, commands_in, listed, pages, run_page, steps, to_run

from semaim.errors import UserError

LISTED = listed()
#: The pages that are run here.
RUN = [page for page in pages() if page not in LISTED.run_by and to_run(page)]


@pytest.fixture(scope="session")
def sandboxes(tmp_path_factory):
    """Page -> the folder in which its commands were run, after those that it continues; each page is run once."""
    made = {}

    def make(page):
        if page not in made:
            before = make(LISTED.continues[page]) if page in LISTED.continues else None
            folder = tmp_path_factory.mktemp("page")
            run_page(page, folder, before)
            made[page] = folder
        return made[page]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_a_pages_commands_work_in_its_order(page, sandboxes):
    assert sandboxes(page).is_dir()


def test_what_is_listed_is_documented_once_and_has_a_known_reason():
    assert {*LISTED.not_run} <= {*LISTED.reasons}
    for page in pages():
        names = Counter(step.name for step in steps(page))
        twice = [name for name, count in Counter(LISTED.names(page)).items() if count > 1]
        gone = [name for name in LISTED.names(page) if name not in names]
        assert not twice and not gone, f"{page} in tests/not_run.yaml: listed twice {twice}, not documented {gone}"
    there = {*LISTED.run_by, *LISTED.continues, *LISTED.continues.values()}
    there |= {page for listed in LISTED.not_run.values() for page in listed}
    assert there <= {*pages()}, f"no such page: {sorted(there - {*pages()})}"


def test_every_command_is_whole():
    for page in pages():
        for step in steps(page):
            if not step.python:
                assert shlex.split(step.text), f"{page}: {step.text}"  # it raises where a quotation is not closed


def test_pages_that_another_test_runs_are_read_by_it():
    for page, test in LISTED.run_by.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(), f"{test} does not read {page}"


@pytest.mark.parametrize("page", [page for page in pages() if LISTED.names(page)])
def test_what_is_not_run_has_right_arguments(page):
    wrong = []
    for step in steps(page):
        reason = LISTED.reason(step)
        if reason and not step.python:
            try:
                check(step.text, placeholders=reason == "placeholder")
            except (AssertionError, UserError) as error:
                wrong.append(f"{step.text}\n    {error}")
        elif reason:
            compile(step.text, page, "exec")
    assert not wrong, "\n".join(wrong)


# The reading itself.


def test_commands_are_found_as_a_shell_reads_them():
    text = "a \"x # y\" b#c   # a comment\n# none\n\nb \\\n    --c=1 \\\n  d    # of b\nO=1 e 'f # g'\n"
    assert commands_in(text) == ['a "x # y" b#c', "b --c=1 d", "O=1 e 'f # g'"]
    assert commands_in("$ a b\nwhat it prints\n$ c", console=True) == ["a b", "c"]
    with pytest.raises(AssertionError, match="nothing follows"):
        commands_in("a \\\n")


def test_steps_are_the_blocks_of_a_shell_and_of_python_in_their_order():
    page = "x\n```bash\na\n```\n\n```text\nb\n```\n* item\n  ```python\n  c = 1\n  d\n  ```\n"
    page += "```\ne\n```\n```yaml\nf: 1\n```\n"
    found = steps("P", page)
    assert found == [Step("P", False, "a"), Step("P", True, "c = 1\nd\n"), Step("P", False, "e")]
    assert [step.name for step in found] == ["a", "python: c = 1", "e"]


@pytest.mark.parametrize(
    "command",
    [
        "semaim train semaim/configs/linear/vit_tiny_scenes.py --pretrained FILE --gpus 8",
        ".venv/bin/python tools/test.py mmseg_configs/semaim_knn.py FILE --cfg-options num_workers=0",
        "NNODES=4 PORT=29500 tools/pretrain.sh semaim/configs/pretrain/semaim_vit_base_800e.py 8 --resume",
        "GPUS=16 tools/slurm_train.sh PARTITION JOB mmdet_configs/semaim_mask_rcnn.py DIR --pretrained FILE",
        "python -m semaim.data.scenes DIR --images 10 && ls DIR | head",
        "semaim test semaim/configs/knn/vit_base.py FILE 8 --tasks knn,fast_probe",
        "python -m pytest -m gpu tests",
    ],
)
def test_right_commands_pass(command):
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "semaim train semaim/configs/knn/vit_tiny_scenes.py --pretraind FILE",
        "semaim trian semaim/configs/knn/vit_tiny_scenes.py",
        "semaim test semaim/configs/knn/vit_tiny.py FILE",
        "semaim test CONFIG FILE",
        "semaim test semaim/configs/knn/vit_base.py FILE --tasks knn,probe",
        "semaim inspect FILE | no_such_program",
        "semaim train mmdet_configs/semaim_mask_rcnn.py --cfg-options no_such_key=1",
        "tools/dist_train.sh semaim/configs/finetune/vit_base_100e.py 8 --gpus-per-node 8",
        "tools/slurm.sh PARTITION JOB CONFIG DIR",
        "python tools/trian.py semaim/configs/knn/vit_tiny_scenes.py",
        "python -m semaim.benchmarks.centers FILE",
        "python -m semaim.benchmarks.look FILE --no-such-flag",
    ],
)
def test_wrong_commands_are_found(command):
    with pytest.raises((AssertionError, UserError)):
        check(command)


def test_a_page_is_run_until_a_command_fails(tmp_path, monkeypatch):
    page = "```bash\nmkdir -p data\nsemaim scenes data/s --images 2 --size 32\nls data/s > data/list\n```\n"
    page += "```python\nfrom pathlib import Path\nkept = Path('data/list').read_text()\n```\n"
    page += "```python\nPath('data/again').write_text(kept)\n```\n"
    found = steps("README.md", page)
    monkeypatch.setattr(documented, "steps", lambda _: found)
    run_page("README.md", tmp_path / "first")
    kept = (tmp_path / "first/data/again").read_text()
    assert "classes" in kept and "coco" in kept and not (ROOT / "data/again").exists()
    found.append(Step("README.md", False, "semaim inspect nothing.pth"))
    with pytest.raises(AssertionError, match="exit status 2 of\nsemaim inspect nothing.pth\n(.|\n)*no such"):
        run_page("README.md", tmp_path / "second", before=tmp_path / "first")


def test_nothing_is_installed_by_a_page(tmp_path):
    installs = re.compile(r"\bpip3? install|tools/(setup|quickstart|test)\.sh|\buv\b|\bconda\b")
    for page in pages():
        assert not [step.name for step in to_run(page) if installs.search(step.text)]
    documented.links(tmp_path)
    for line in ("tools/setup.sh", "tools/quickstart.sh", "tools/test.sh"):
        assert documented.run(Step("README.md", False, line), tmp_path).returncode == 127
