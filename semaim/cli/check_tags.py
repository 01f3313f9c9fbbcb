"""Whether every consumer loads or refuses timm's plain ViTs correctly: tools/check_tags.py (see --help)."""

import argparse
from collections import Counter
from fnmatch import fnmatch

from semaim.errors import UserError

FILES = {False: "bare", True: "config.json"}


def reason(refusal: str) -> str:
    """The reason in a refusal, without the file and the advice."""
    return refusal.partition(": ")[2].partition(" (--allow-partial")[0] or refusal


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Build timm's plain ViTs on the meta device, treat their names and shapes as files, alone and with"
        " timm's config.json next to them, and let every consumer load or refuse them. What loads is compared with"
        " timm's own numbers, in a network of one random block. No weights are downloaded.",
        epilog="Exit status 0 if all that loads is right, 1 if anything is wrong.",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="tags, such as 'vit_base*' (default: all)")
    parser.add_argument("--names-only", action="store_true", help="compute nothing: report 'loads', not 'right'")
    args = parser.parse_args(argv)
    import torch  # takes seconds, as what follows

    from semaim.parity.tags import USES, architectures, judge, plain_tags

    torch.set_num_threads(1)

    groups = architectures(tag for tag in plain_tags() if fnmatch(tag, args.pattern))
    if not groups:
        raise UserError(f"timm has no plain ViT of tags {args.pattern}")
    print(f"{'architecture':52} {'file':11}  " + "  ".join(f"{name[:8]:8}" for name in USES))
    counts: dict[tuple[bool, str], Counter] = {}
    for group in groups:
        verdicts = list(judge(group, compute=not args.names_only))
        for config, file in FILES.items():
            own = {verdict.consumer: verdict for verdict in verdicts if verdict.config == config}
            for name, verdict in own.items():
                counts.setdefault((config, name), Counter())[verdict.word] += len(group)
            words = "  ".join(f"{own[name].word:8}" for name in USES)
            reasons = dict.fromkeys(reason(verdict.refusal) for verdict in own.values() if verdict.refusal)
            many = f" ({len(group)} tags)" if len(group) > 1 else ""
            print(f"{group[0].partition('.')[0] + many:52} {file:11}  {words}  {' | '.join(reasons)}", flush=True)
    print(f"\n{sum(map(len, groups))} tags, {len(groups)} architectures; tags by what a consumer makes of them:")
    kinds = sorted({word for counter in counts.values() for word in counter})
    for (config, name), counter in counts.items():
        print(f"{FILES[config]:11}  {name:13} " + "  ".join(f"{counter[word]:4} {word}" for word in kinds))
    wrong = sum(counter["WRONG"] for counter in counts.values())
    print(f"{wrong} wrong")
    return 1 if wrong else 0
