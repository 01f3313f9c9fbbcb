"""Speed and memory compared with a baseline: tools/benchmark.py pretrain, and more (see --help)."""

import argparse
from pathlib import Path

from semaim.errors import UserError

#: Default sizes, command -> flag -> value: on a CPU for about two minutes, on a GPU those of the targets.
ON_CPU = {
    "pretrain": {"model": "small", "batch": 16, "img_size": 224},
    "attention": {"model": "small", "batch": 8, "img_size": 224},
    "vitdet": {"model": "base", "batch": 1, "img_size": 512},
    "upernet": {"model": "base", "batch": 1, "img_size": 512},
    "scaling": {"model": "tiny", "batch": 16, "img_size": 224},
}
ON_GPU = {
    "pretrain": {"model": "base", "batch": 256, "img_size": 224},
    "attention": {"model": "base", "batch": 256, "img_size": 224},
    "vitdet": {"model": "base", "batch": 1, "img_size": 1024},
    "upernet": {"model": "base", "batch": 2, "img_size": 512},
    "scaling": {"model": "base", "batch": 64, "img_size": 224},
}


def number(least: int):
    """Type of a flag: a whole number from `least` on."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise UserError(f"{text!r}: give a whole number of {least} or more")
        return int(text)

    return read


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure ours and a baseline alternately, in one run, after a check that both give the same result."
        " What a machine cannot measure is listed as such. docs/performance.md has measured tables.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "pretrain": "the pretraining step against explicit masks: images/s, memory",
        "attention": "attention alone, fused against scores, mask and softmax in steps",
        "vitdet": "ViTDet's global block against a bias built for all pairs; Mask R-CNN's step",
        "upernet": "UperNet's encoder against that of mmseg, which has to be installed",
        "loader": "images/s of the loader against Pillow and torchvision's v1 transforms",
        "scaling": "cost against tokens, images and processes; a plot",
        "startup": "time until the first step",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=f"Measures {text}.")
        if name in ON_CPU:
            command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
            command.add_argument("--model", choices=("tiny", "small", "base", "large"), help=default(name, "model"))
            command.add_argument("--precision", choices=("bf16", "fp32"), help="of ours (default: bf16 on a GPU)")
            if name != "scaling":
                command.add_argument("--batch", type=number(1), metavar="N", help=f"images, {default(name, 'batch')}")
                command.add_argument(
                    "--img-size", type=number(16), metavar="N", help=f"pixels, {default(name, 'img_size')}"
                )
        repeats = 3 if name in ("scaling", "startup") else 5
        command.add_argument(
            "--repeats", type=number(1), default=repeats, metavar="N", help="turns that count (default: %(default)s)"
        )
        command.add_argument("--out", type=Path, metavar="FILE.json", help=f"default: work_dirs/benchmarks/{name}.json")
    commands.choices["pretrain"].add_argument("--order", default="semantic", help="default: %(default)s")
    commands.choices["pretrain"].add_argument("--depth", type=number(1), metavar="N", help="blocks (default: model's)")
    commands.choices["pretrain"].add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="also ours with compiled blocks (default: on a GPU)"
    )
    for name, repository, what in (
        ("pretrain", "skyoux/SemAIM", "the official step"),
        ("vitdet", "facebookresearch/detectron2", "the whole backbone beside its own"),
    ):
        text = f"a clone of github.com/{repository}: also time {what}; runs the code in DIR"
        commands.choices[name].add_argument("--reference", metavar="DIR", help=text)
    commands.choices["vitdet"].add_argument(
        "--mask-rcnn", action="store_true", help="also Mask R-CNN's step on a CPU, where it takes long; needs mmdet"
    )
    loader = commands.choices["loader"]
    loader.add_argument("--data", metavar="DIR", help="images (default: 200 generated textures of 500 x 375)")
    loader.add_argument("--img-size", type=number(16), default=224, metavar="N", help="pixels (default: %(default)s)")
    loader.add_argument("--batch", type=number(1), default=32, metavar="N", help="images (default: %(default)s)")
    loader.add_argument("--workers", type=number(0), default=2, metavar="N", help="processes (default: %(default)s)")
    loader.add_argument(
        "--copies", type=number(16), nargs="+", default=[], metavar="N",
        help="also ours on copies of short sides of N pixels, as tools/shrink.py writes, against ours on the originals",
    )  # fmt: skip
    scaling = commands.choices["scaling"]
    scaling.add_argument("--depth", type=number(1), default=2, metavar="N", help="blocks (default: %(default)s)")
    scaling.add_argument(
        "--sides", type=number(2), nargs="+", default=[8, 16, 32, 64], metavar="N",
        help="patches along a side; tokens are their squares (default: %(default)s)",
    )  # fmt: skip
    scaling.add_argument(
        "--batches", type=number(1), nargs="+", default=[1, 2, 4, 8, 16], metavar="N",
        help="images at 14 x 14 patches (default: %(default)s)",
    )  # fmt: skip
    scaling.add_argument("--plot", type=Path, metavar="FILE.png", help="default: next to the JSON")
    roofline = commands.add_parser(
        "roofline", help="a step's operations, counted: its ideal time on a card, and what it keeps; no GPU is used",
        description="Counts the operations of a training step, and from them its ideal time on a card. Runs anywhere.",
    )  # fmt: skip
    roofline.add_argument(
        "step", nargs="?", default="pretrain", choices=("pretrain", "vitdet", "upernet"), help="default: %(default)s"
    )
    roofline.add_argument("--model", choices=("tiny", "small", "base", "large"), default="base", help="default: base")
    roofline.add_argument(
        "--batch", type=number(1), metavar="N", help="images (default: 256, 1, 2 for the three steps)"
    )
    roofline.add_argument("--img-size", type=number(16), metavar="N", help="pixels (default: 224, 1024, 512)")
    roofline.add_argument("--card", choices=("h200", "h100", "a100", "4090"), default="h200", help="default: h200")
    roofline.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default: work_dirs/benchmarks/roofline_STEP.json"
    )
    return parser.parse_args(argv)


def default(command: str, flag: str) -> str:
    """Help for a flag whose default depends on the device."""
    return f"default: {ON_CPU[command][flag]} on a CPU, {ON_GPU[command][flag]} on a GPU"


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on the device."""
    import torch

    from semaim.benchmarks.measuring import check_device
    from semaim.engine.precision import cpu_has_bf16

    args.device = check_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    on_gpu = args.device == "cuda"
    if getattr(args, "compile", False) is None:
        args.compile = on_gpu
    args.precision = args.precision or ("bf16" if on_gpu else "fp32")
    if args.precision == "bf16" and not on_gpu and not cpu_has_bf16():
        raise UserError("--precision bf16: this processor has no instructions for it (AVX-512 BF16)")
    for name, value in (ON_GPU if on_gpu else ON_CPU)[args.command].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def measure(args: argparse.Namespace) -> tuple[list, dict]:
    """The rows of a command, and further values for the JSON."""
    if args.command == "loader":
        from semaim.benchmarks.loading import loader

        return loader(args.data, args.img_size, args.batch, args.workers, args.repeats, args.copies), {}
    if args.command == "startup":
        from semaim.benchmarks.startup import startup

        return startup(args.repeats), {}
    complete(args)
    given = args.model, args.img_size, args.batch, args.device, args.precision, args.repeats
    if args.command == "upernet":
        from semaim.benchmarks.backbones import backbone

        return backbone("mmseg", *given), {}
    if args.command == "vitdet":
        from semaim.benchmarks.backbones import backbone
        from semaim.benchmarks.detection import mask_rcnn, vitdet

        rows = backbone("detectron2", *given, args.reference) if args.reference else []
        return vitdet(*given) + mask_rcnn(*given, anyway=args.mask_rcnn) + rows, {}
    from semaim.benchmarks.pretraining import Setting, attention, pretrain

    names = ("order", "depth", "compile", "reference") if args.command == "pretrain" else ()
    more = {name: getattr(args, name) for name in names}
    setting = Setting(args.model, args.batch, args.img_size, device=args.device, precision=args.precision, **more)
    if args.command == "pretrain":
        return pretrain(setting, args.repeats), {}
    if args.command == "attention":
        return attention(setting, args.repeats), {}
    from semaim.benchmarks.scaling import processes, scaling

    setting = Setting(args.model, device=args.device, precision=args.precision, depth=args.depth)
    plot = args.plot or args.out.with_suffix(".png")
    rows, times = scaling(setting, tuple(args.sides), tuple(args.batches), args.repeats, plot)
    alone = Setting("small" if args.model == "base" else args.model, batch=args.batch, depth=args.depth)
    return rows + processes(alone), {"seconds": times}


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    name = f"roofline_{args.step}" if args.command == "roofline" else args.command
    args.out = args.out or Path("work_dirs/benchmarks") / f"{name}.json"
    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: name a .json file")
    from semaim.benchmarks import rows as results  # takes a second to import

    if args.command == "roofline":
        from semaim.benchmarks import roofline

        counted = roofline.roofline(args.step, args.model, args.batch, args.img_size, args.card)
        forms = roofline.summary(counted)
        roofline.show(forms)
        results.write(args.out, name, [], card=args.card, forms=forms)
    else:
        rows, more = measure(args)
        results.show(rows)
        results.write(args.out, name, rows, **more)
    print(f"wrote {args.out}")
    return 0
