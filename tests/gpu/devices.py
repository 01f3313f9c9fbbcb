"""What the tests of this folder share: steps in fp64 on a CPU and on a device, compiled blocks, tools on a device."""

import copy
import os
import subprocess
import sys

import torch
from commands import CPU, ROOT, tool

from semaim.engine.compiling import compile_blocks


def on(device, name, *arguments):
    """A tool's whole run on a device, the first GPU or the CPU; its output if it fails."""
    done = tool(name, *arguments, **({"CUDA_VISIBLE_DEVICES": "0"} if device == "cuda" else {}))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def torchrun(device, *arguments):
    """A script in one process that joins a process group of its own: NCCL's on a GPU, gloo's on a CPU."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *arguments]
    env = {**os.environ, **CPU, "CUDA_VISIBLE_DEVICES": "0" if device == "cuda" else ""}
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def compiled(network, device):
    """Compile a network's blocks: by the default compiler on a GPU, on a CPU only as far as the graphs, in seconds."""
    compile_blocks(network, "inductor" if device == "cuda" else "aot_eager")
    return network


def in_double(module):
    """A copy on the CPU in fp64."""
    return copy.deepcopy(module).cpu().double()


def difference(ours, expected):
    """Relative norm of the difference of two sequences of tensors, on the CPU in fp64."""
    a, b = (torch.cat([t.detach().cpu().double().flatten() for t in tensors]) for tensors in (ours, expected))
    return ((a - b).norm() / b.norm()).item()
