"""Mutated checkpoints: no crash, no traceback, no bomb; and with checksums no damage that nobody sees."""

import json
import subprocess
import sys

import pytest
from broken_files import CHECKED, FORMATS
from commands import CPU, ROOT
from counts import record

#: Reads every mutated file in four ways, with a memory limit, and a time limit for each.
CHILD = """
import collections, json, resource, signal, sys, traceback, warnings
from pathlib import Path
sys.path[:0] = [{faults!r}, {tests!r}]
import torch
from broken_files import CHECKED, SIZES, files, mutated
from semaim import checkpoints
from semaim.checkpoints.files import read_checkpoint
from semaim.cli.checkpoint import inspected
from semaim.errors import UserError
from semaim.models.vit import VisionTransformer
warnings.simplefilter("ignore")
work, written, whole = Path({work!r}), files(), {{}}
work.mkdir(parents=True, exist_ok=True)

def plain(value):
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {{key: plain(item) for key, item in value.items()}}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)

for name, data in written.items():
    (work / name).write_bytes(data)
    whole[name] = repr(plain(checkpoints.read_file(work / name)))
    inspected(str(work / name))
    checkpoints.load(VisionTransformer(**SIZES), work / name)
limit = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + {limit}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for name, seed in json.loads(sys.argv[1]):
    data, kind, fitted = mutated(name, written[name], seed)
    path = work / name
    path.write_bytes(data)
    print(json.dumps(["begin", name, seed, kind]), flush=True)
    results = {{}}
    for way, call in (
        ("read_file", lambda: checkpoints.read_file(path)),
        ("read_checkpoint", lambda: read_checkpoint(path)),
        ("mapped", lambda: read_checkpoint(path, mmap=True)),
        ("inspect", lambda: inspected(str(path))),
        ("load", lambda: checkpoints.load(VisionTransformer(**SIZES), path)),
    ):
        signal.alarm(60)
        try:
            content = call()
            results[way] = "read"
            if name in CHECKED and not fitted and way == "read_file" and repr(plain(content)) != whole[name]:
                results[way] = "silent damage"
            if way == "inspect" and not content.replace("\\n", "").isprintable():
                results[way] = "control characters"
        except UserError as error:
            results[way] = "refused" if str(error).isprintable() else f"refused oddly: {{str(error)[:300]!a}}"
        except BaseException:
            results[way] = "traceback: " + traceback.format_exc()[-1200:]
        signal.alarm(0)
    print(json.dumps(["end", name, seed, kind, results, data == written[name]]), flush=True)
print(json.dumps(["peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024]), flush=True)
"""


def attack(cases, work, limit=2**31):
    """[file, seed, kind of mutation, result by way of reading, whether it is as before], crashes, MB above start."""
    places = {"faults": str(ROOT / "tests/faults"), "tests": str(ROOT / "tests"), "work": str(work)}
    code, left, found, crashes, peaks = CHILD.format(limit=limit, **places), list(cases), [], [], [0]
    while left:
        env = {**CPU, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-c", code, json.dumps(left)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)
        told = [json.loads(text) for text in done.stdout.splitlines()]
        found += [it[1:] for it in told if it[0] == "end"]
        peaks += [it[1] for it in told if it[0] == "peak"]
        begun = [it[1:3] for it in told if it[0] == "begin"]
        if done.returncode == 0:
            break
        assert begun, done.stderr[-2000:]
        crashes.append((begun[-1], done.returncode, done.stderr[-1000:]))
        left = left[[list(case) for case in left].index(begun[-1]) + 1 :]
    return found, crashes, max(peaks)


def wrong_in(found):
    """Results that are neither a whole content nor a refusal in one line."""
    return [it for it in found if any(result not in ("read", "refused") for result in it[3].values())]


@pytest.mark.slow
def test_some_mutated_checkpoints(tmp_path):
    found, crashes, _ = attack([(name, seed) for name in FORMATS for seed in range(12)], tmp_path)
    assert not crashes and not wrong_in(found)
    read = [it[0] for it in found if it[3]["read_file"] == "read"]
    assert 5 < len(read) < len(found) - 5, "some mutations hit what carries no data, or what has no checksum"


@pytest.mark.faults
def test_mutated_checkpoints(tmp_path):
    count = 500
    found, crashes, peak = attack([(name, seed) for name in FORMATS for seed in range(1000, 1000 + count)], tmp_path)
    wrong = wrong_in(found)
    by_format = {
        name: {
            result: sum(it[0] == name and it[3]["read_file"] == result for it in found)
            for result in ("read", "refused")
        }
        for name in FORMATS
    }
    silent = [it for it in wrong if "silent damage" in it[3].values()]
    tracebacks = [it for it in wrong if any(result.startswith("traceback") for result in it[3].values())]
    record("checkpoints", files=len(found), reads=sum(len(it[3]) for it in found), crashes=len(crashes),
           tracebacks=len(tracebacks), silent_damage_of_checked=len(silent), wrong=len(wrong), by_format=by_format,
           checked=CHECKED, peak_mb_above_start=peak)  # fmt: skip
    assert not crashes and not wrong, (crashes[:3], wrong[:5])
