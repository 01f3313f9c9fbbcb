"""Triton's kernels of relative positions: the folded form's numbers, interpreted and on a GPU; what they need."""

import inspect
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from commands import CPU, ROOT, flags, one_line, tool

from semaim.benchmarks import detection
from semaim.data.scenes import write_scenes
from semaim.models import relative
from semaim.models.relative import relative_attention
from semaim.models.vitdet import ViTDet

NO_TRITON = "triton is not installed: runs where torch's Linux wheels with CUDA bring it"
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason=NO_TRITON)

# Images, heads, rows, columns, channels. A single patch, row and column; rows that fill their block and do not; blocks
# of several rows, whole and not; queries that are no whole number of blocks; channels that are padded and not.
SIZES = (
    (2, 2, 3, 5, 8), (1, 2, 4, 16, 16), (1, 1, 7, 14, 20), (2, 3, 1, 1, 16), (1, 1, 70, 1, 16), (1, 1, 1, 64, 32),
    (1, 2, 5, 33, 64),
)  # fmt: skip
WIDE = ((1, 1, 20, 6, 80), (1, 1, 2, 100, 128))
CASES = [[*size, "float32"] for size in SIZES] + [[*size, "bfloat16"] for size in (*SIZES[::3], *WIDE)]
CASES += [[*size, "float16"] for size in (SIZES[2], WIDE[0])]

#: Roundings of weights and of gradients of logits to the inputs' dtype, and of the results.
NEAR = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2.5e-2}


@pytest.fixture(scope="module")
def interpreted():
    """What tests/interpreted.py finds."""
    line = [sys.executable, str(ROOT / "tests" / "interpreted.py"), json.dumps(CASES)]
    env = {**os.environ, **CPU, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@with_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_definition(case, interpreted):
    errors = interpreted["errors"][CASES.index(case)]
    wrong = {name: error for name, error in errors.items() if not error < NEAR[case[-1]]}
    assert not wrong


@with_triton
def test_an_encoder_gives_the_same_map_and_gradients_also_recomputed(interpreted):
    found = interpreted["in_an_encoder"]
    assert set(found) == {"plain", "recomputed"} and max(found.values()) < 1e-5


@with_triton
def test_it_compiles_without_a_break_of_the_graph(interpreted):
    assert interpreted["compiled"]["difference"] < 1e-5


@with_triton
def test_the_operator_is_what_pytorch_asks_for_and_its_products_are_counted(interpreted):
    """2 images, 3 heads, 20 patches, 16 channels: two products forward; three, and four, in the backward kernels."""
    product = 2 * (2 * 3) * 20 * 20 * 16
    assert interpreted["registered"] == {"forward": 2 * product, "backward": 7 * product}


@with_triton
def test_the_check_before_the_first_use_sees_a_wrong_output_and_a_wrong_gradient(interpreted):
    for name, (off, tolerance) in interpreted["self_check"].items():
        assert (off > tolerance) == ("wrong" in name), name


# Without a GPU, or where the kernel fails


def inputs_of(grid, dim, heads=2, device="cpu", dtype=torch.float32):
    numbers, tokens = torch.Generator().manual_seed(0), grid[0] * grid[1]
    whole = torch.randn(2, tokens, 3 * heads * dim, generator=numbers).to(device, dtype)
    parts = [part.unflatten(-1, (heads, dim)).transpose(1, 2) for part in whole.chunk(3, -1)]
    tables = [torch.randn(2 * side - 1, dim, generator=numbers).to(device) * 0.3 for side in grid]
    return [tensor.detach().requires_grad_() for tensor in (*parts, *tables)]


@pytest.fixture
def forget():
    """Before and after, nothing has been tried and no line was written."""
    for cached in (relative.find_fault, relative.warn):
        cached.cache_clear()
    yield
    for cached in (relative.find_fault, relative.warn):
        cached.cache_clear()


def test_on_a_cpu_the_folded_form_runs_and_one_line_says_so(forget, caplog):
    *parts, rel_pos_h, rel_pos_w = inputs_of((3, 4), 8)
    for _ in range(2):
        found = relative_attention(*parts, (3, 4), rel_pos_h, rel_pos_w, "triton")
        assert torch.equal(found, relative_attention(*parts, (3, 4), rel_pos_h, rel_pos_w))
    relative_attention(*inputs_of((3, 5), 8)[:3], (3, 5), *inputs_of((3, 5), 8)[3:], "triton")
    line = "rel_pos_kernel='triton': it needs a GPU, not cpu; the folded form runs instead"
    assert caplog.messages == [line]


def test_the_choice_compiles_without_a_break_of_the_graph(forget):
    def run(*tensors):
        return relative_attention(*tensors[:3], (3, 4), *tensors[3:], "triton")

    inputs = inputs_of((3, 4), 8)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, run(*inputs))


def raises(*unused):
    raise RuntimeError("out of resource: shared memory\nand more")


@pytest.mark.parametrize(
    "found, message",
    [
        (raises, "RuntimeError: out of resource: shared memory;"),
        (lambda *unused: 0.25, "it is off by 2.5e-01 for torch.bfloat16, more than 3e-02;"),
        (lambda *unused: float("inf"), "it is off by inf for torch.bfloat16"),
        (lambda *unused: 1e-3, None),
    ],
    ids=["raises", "wrong", "not a number", "right"],
)
def test_a_kernel_that_raises_or_is_wrong_is_not_used(found, message, forget, caplog, monkeypatch):
    monkeypatch.setattr(relative, "difference", found)
    monkeypatch.setattr(relative, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    used = {relative.works(torch.device("cuda", 0), torch.bfloat16, dim, 16, 64) for dim in (64, 80)}
    assert used == {message is None}
    assert len(caplog.messages) == (message is not None) and (not message or message in caplog.messages[0])


def test_old_gpus_and_a_missing_triton_are_named(forget, caplog, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    for present, message in ((True, "T4 is older than compute capability 8.0"), (False, "triton is not installed")):
        monkeypatch.setattr(relative, "find_spec", lambda name, present=present: present or None)
        relative.find_fault.cache_clear()
        assert not relative.works(torch.device("cuda", 0), torch.bfloat16, 64, 16, 64)
        assert message in caplog.messages[-1]


@with_triton
def test_sizes_without_a_kernel():
    from semaim.models.relative_kernel import plan

    for dtype, dim, width in ((torch.float64, 64, 64), (torch.bfloat16, 136, 64), (torch.float32, 64, 65)):
        with pytest.raises(ValueError, match=f"heads of {dim} channels, rows of {width} patches and {dtype}"):
            plan(dtype, dim, width)


def test_the_switch_of_a_config_reaches_the_global_blocks_alone():
    from semaim.engine.config import load_config

    config = ROOT / "mmdet_configs/semaim_mask_rcnn.py"
    with torch.device("meta"):
        for options, kernel in (({}, "folded"), ({"model.backbone.rel_pos_kernel": "triton"}, "triton")):
            backbone = load_config(config, options).model.backbone
            model = ViTDet(**{key: value for key, value in backbone.items() if key not in ("type", "init_cfg")})
            kernels = {index: block.attn.kernel for index, block in enumerate(model.blocks)}
            assert kernels == {index: kernel if index in (2, 5, 8, 11) else "folded" for index in range(12)}
        with pytest.raises(ValueError, match="rel_pos_kernel 'cuda': choose from folded, triton"):
            ViTDet(rel_pos_kernel="cuda")


def test_a_wrong_value_is_one_line(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    write_scenes(tmp_path / "scenes", 8, 96, seed=0)
    places = ["--data-root", tmp_path / "scenes" / "coco", "--work-dir", tmp_path / "run"]
    options = flags({"model.backbone.rel_pos_kernel": "cuda", "total_batch_size": 2})
    done = tool("train.py", "mmdet_configs/semaim_mask_rcnn_scenes.py", *places, *options)
    one_line(done, "rel_pos_kernel 'cuda': choose from folded, triton")


def test_the_benchmark_says_why_the_kernel_was_not_measured_and_gives_rows_where_it_was(forget, monkeypatch):
    block, maps = detection.build_block("tiny", 64, 1, "cpu")
    for row in detection.kernel_rows(block, maps, "fp32", 1, {}):
        assert row.verdict == "not measured: it needs a GPU, not cpu"
    monkeypatch.setattr(detection, "find_fault", lambda *unused: None)
    monkeypatch.setattr(detection, "gpu_peak", lambda work, device: 2e6)
    time, memory = detection.kernel_rows(block, maps, "fp32", 3, {})
    assert time.ours > 0 and time.spread[0] <= time.ratio <= time.spread[1] and (memory.ours, memory.ratio) == (2, 1)
    assert block.attn.kernel == "folded"


# Compiled for GPUs, without one: shared memory per block in bytes, as NVIDIA's programming guide lists it.

MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
REAL = (("bf16", 64, 64),)
OTHERS = (("bf16", 14, 64), ("bf16", 32, 64), ("fp16", 64, 80), ("bf16", 128, 64), ("bf16", 100, 128), ("fp32", 64, 64))


def resources(kernel, blocks, chosen, width, dim, dtype, target):
    """(registers, spilled bytes, bytes of shared memory) of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = dict(WIDTH=width, DIM=dim, BLOCK_D=chosen.block_d, BLOCK_W=chosen.block_w, ROWS=blocks.rows)
    fixed |= dict(BLOCK_M=blocks.queries, PRECISION="ieee")
    inputs = {"q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"}
    sums = {"along_h", "along_w", "grad_h", "grad_w", "lse", "delta"}
    signature, aligned = {}, {}
    for place, name in enumerate(inspect.signature(kernel.fn).parameters):
        signature[name] = "constexpr" if name in fixed else f"*{dtype}" if name in inputs else "i32"
        if name in sums or name == "scale":
            signature[name] = "fp32" if name == "scale" else "*fp32"
        if name in inputs | sums or re.fullmatch("[qkvg]_(image|head|token)|tokens|height", name):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": 8, "num_stages": blocks.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assembler = triton.knobs.nvidia.ptxas.path
    architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    line = [assembler, "-v", "--gpu-name", architecture, "-o", os.devnull, "-"]
    done = subprocess.run(line, input=compiled.asm["ptx"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    registers, stored, loaded = (
        int(re.search(rf"(\d+) {what}", done.stderr or done.stdout)[1])
        for what in ("registers", "bytes spill stores", "bytes spill loads")
    )
    return registers, stored + loaded, compiled.metadata.shared


def every_kernel(dtype, width, dim, target):
    from semaim.models import relative_kernel

    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    chosen = relative_kernel.plan(named, dim, width)
    for name in ("forward", "backward_queries", "backward_keys"):
        blocks = getattr(chosen, name.removeprefix("backward_"))
        yield name, resources(getattr(relative_kernel, f"_{name}"), blocks, chosen, width, dim, dtype, target)


@pytest.fixture
def ptxas():
    if find_spec("triton") is None:
        pytest.skip(NO_TRITON)
    import triton

    try:
        return triton.knobs.nvidia.ptxas.path
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this triton has no ptxas ({error}): runs where its wheel for NVIDIA's GPUs is installed")


@pytest.mark.parametrize("target", MEMORY)
def test_at_the_size_of_a_detector_no_loop_spills_and_shared_memory_fits(target, ptxas, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (registers, spilled, shared) in every_kernel("bf16", 64, 64, target):
        # 8.0 and 8.9 put up to five numbers aside before the loop over keys and read them after it: 2 x 20 bytes.
        assert registers <= 255 and spilled <= 40 and shared <= MEMORY[target], (name, spilled, shared)


@pytest.mark.slow
@pytest.mark.parametrize("target", MEMORY)
@pytest.mark.parametrize("dtype, width, dim", OTHERS)
def test_other_sizes_compile_and_hardly_spill(dtype, width, dim, target, ptxas, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (_, spilled, shared) in every_kernel(dtype, width, dim, target):
        assert spilled <= 100 and shared <= MEMORY[target], (name, spilled, shared)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: runs where torch sees one")
class TestOnGPU:
    @with_triton
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("grid, dim", [((64, 64), 64), ((14, 14), 64), ((9, 33), 20), ((50, 64), 32)], ids=str)
    def test_output_and_gradients_are_those_of_the_folded_form(self, grid, dim, dtype, forget, caplog):
        inputs = inputs_of(grid, dim, device="cuda", dtype=dtype)
        results = []
        for kernel in ("triton", "triton", "folded"):
            leaves = [tensor.double() if kernel == "folded" else tensor for tensor in inputs]
            with torch.autocast("cuda", enabled=False):
                out = relative_attention(*leaves[:3], grid, *leaves[3:], kernel)
                results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
        assert not caplog.messages  # the kernel itself ran
        ours, again, exact = results
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], again[:4], strict=True))  # no sum has a random order
        for mine, expected in zip(ours, exact, strict=True):
            assert (mine - expected).norm() <= 2 * relative.TOLERANCE[dtype] * expected.norm()

    @with_triton
    @pytest.mark.parametrize("with_cp", [False, True])
    def test_an_encoder_in_bf16_gives_the_folded_forms_map_and_gradients(self, with_cp, forget, caplog):
        found = {}
        for kernel in ("folded", "triton"):
            torch.manual_seed(0)
            size = dict(size="tiny", depth=8, img_size=256, window_size=7, with_cp=with_cp)
            model = ViTDet(**size, rel_pos_kernel=kernel).cuda().train()
            for name, table in model.named_parameters():
                if "rel_pos" in name:
                    torch.nn.init.normal_(table, std=0.1)
            with torch.autocast("cuda", torch.bfloat16):
                out = model(torch.randn(2, 3, 256, 192, generator=torch.Generator().manual_seed(1)).cuda())
            out.float().square().mean().backward()
            found[kernel] = [out.detach().float(), *(parameter.grad for parameter in model.parameters())]
        assert not caplog.messages
        for mine, expected in zip(found["triton"], found["folded"], strict=True):
            assert (mine - expected).norm() <= 0.1 * expected.norm() + 1e-6
