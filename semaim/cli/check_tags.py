"""Whether every consumer is right with each of timm's plain ViTs: `semaim tags` (see --help)."""

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from semaim.errors import UserError

if TYPE_CHECKING:
    from semaim.parity.tags import Verdict

WORDS = ("right", "loads", "refused", "WRONG")
#: A tag is right if these are: not every model has a class token, or a pooling of its own.
NEEDED = ("images", "pool avg", "fine-tuning", "ViTDet", "UperNet")
OWN = "own "  #: first part of the names of the recipes for our own ViT
Verdicts = dict[str, dict[str, "Verdict"]]  #: by tag, then by consumer


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Let every consumer load or refuse each plain ViT that timm has weights for, and compare what it"
        " computes with timm's own numbers. Nothing is downloaded: timm's own names and shapes stand for the file, and"
        " random values in a network of one or two blocks. 'own' are the recipes for our own ViT, with timm's"
        " config.json next to the file.",
        epilog="Exit status 0 if nothing is WRONG, else 1.",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="tags, such as 'vit_base*' (default: all)")
    parser.add_argument("--names-only", action="store_true", help="compute nothing: report 'loads', not 'right'")
    parser.add_argument("--table", metavar="FILE.md", help="write the verdicts by families of architectures")
    args = parser.parse_args(argv)
    import torch  # takes seconds, as what follows

    from semaim.parity.tags import CONSUMERS, RECIPES, architectures, judge, plain_tags

    torch.set_num_threads(1)
    groups = architectures(tag for tag in plain_tags() if fnmatch(tag, args.pattern))
    if not groups:
        raise UserError(f"timm has no plain ViT of tags {args.pattern}")
    consumers, verdicts, known = [*CONSUMERS, *RECIPES], Verdicts(), dict[tuple, "Verdict"]()
    print(f"{'architecture':52} " + " ".join(f"{short(name):8}" for name in consumers))
    for group in groups:
        for verdict in judge(group, compute=not args.names_only, known=known):
            verdicts.setdefault(verdict.tag, {})[verdict.consumer] = verdict
        own = verdicts[group[0]]
        many = f" ({len(group)} tags)" if len(group) > 1 else ""
        print(f"{arch_of(group[0]) + many:52} " + " ".join(f"{own[name].word:8}" for name in consumers), flush=True)
        for reason in reasons(own.values()):
            print(f"    {reason}", flush=True)
    print(f"\n{len(verdicts)} tags of {len(groups)} architectures; tags by what a consumer makes of them:")
    for name, counts in count(verdicts, consumers).items():
        print(f"{name:16}" + "  ".join(f"{counts[word]:4} {word}" for word in WORDS if word != "loads" or counts[word]))
    wrong = [tag for tag, own in verdicts.items() if any(one.word == "WRONG" for one in own.values())]
    print(f"{len(right_tags(verdicts))} of {len(verdicts)} tags right in {', '.join(NEEDED)}; {len(wrong)} wrong")
    if args.table:
        with open(args.table, "w") as file:
            file.write(table(verdicts, consumers, args.names_only))
    return 1 if wrong else 0


def right_tags(verdicts: Verdicts) -> list[str]:
    """The tags that every consumer of `NEEDED` is right with, or loads, and that none is WRONG with."""
    return [
        tag
        for tag, own in verdicts.items()
        if all(own[name].word in ("right", "loads") for name in NEEDED)
        and not any(one.word == "WRONG" for one in own.values())
    ]


def arch_of(tag: str) -> str:
    """The architecture of a tag."""
    return tag.partition(".")[0]


def short(name: str) -> str:
    """The name of a consumer, for the head of a column."""
    return name.removeprefix("pool ").replace("fine-tuning", "tuning")[:8]


def reasons(own: Iterable["Verdict"]) -> list[str]:
    """The reasons of what is refused or WRONG, each once: of the recipes for our own ViT without file and advice."""
    found: dict[str, list[str]] = {}
    for verdict in own:
        reason = verdict.reason
        if verdict.consumer.startswith(OWN) and verdict.word == "refused":
            reason = reason.partition(": ")[2].partition(" (--allow-partial")[0] or reason
        if reason:
            found.setdefault(f"{verdict.word}: {reason}", []).append(verdict.consumer)
    return [f"{', '.join(names)} {reason}" for reason, names in found.items()]


def count(verdicts: Verdicts, consumers: Iterable[str]) -> dict[str, Counter]:
    """The number of tags of each word, by consumer."""
    return {name: Counter(own[name].word for own in verdicts.values()) for name in consumers}


# The table


def table(verdicts: Verdicts, consumers: list[str], names_only: bool) -> str:
    """The verdicts in Markdown: counts, a row per family of architectures, and what is refused."""
    import timm

    done = (
        "Right is computed: in networks of the tag's width and one or two random blocks, features, maps and gradients"
        " equal timm's in float64, and images are prepared as timm does."
    )
    done = "Names and shapes were compared, not numbers." if names_only else done
    lines = [
        f"`semaim tags --table FILE.md` wrote this about {len(verdicts)} tags of timm {timm.__version__}, of which"
        f" {len(right_tags(verdicts))} are right in every task. {done} No weights were downloaded: a file is taken to"
        " hold the names and shapes of timm's network.",
        "",
        "| consumer | right | refused | WRONG | why refused |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, counts in count(verdicts, consumers).items():
        why = Counter(general(own[name]) for own in verdicts.values() if own[name].word == "refused")
        told = "; ".join(f"{reason} ({number})" for reason, number in why.most_common())
        right = counts["right"] + counts["loads"]
        lines.append(f"| {name} | {right} | {counts['refused']} | {counts['WRONG']} | {told} |")
    lines += [
        "",
        "`own` are the recipes for our own ViT, which is of MAE's shape, with timm's config.json next to the file; the"
        " last column names those that read a tag.",
    ]
    columns = [name for name in consumers if name != "images" and not name.startswith(OWN)]
    lines += ["", "| architectures | tags | " + " | ".join(columns) + " | own |"]
    lines.append("| --- " * (len(columns) + 3) + "|")
    families: dict[str, list[str]] = {}
    for tag in sorted(verdicts):
        families.setdefault(family(arch_of(tag)), []).append(tag)
    recipes = [name for name in consumers if name.startswith(OWN)]
    for name, tags in families.items():
        cells = [cell([answer(verdicts[tag][column]) for tag in tags]) for column in columns]
        cells.append(cell([recipes_of(verdicts[tag], recipes) for tag in tags]))
        lines.append(f"| `{name}` | {len(tags)} | " + " | ".join(cells) + " |")
    lines += ["", *exceptions(verdicts)]
    return "\n".join(lines).rstrip() + "\n"


def general(verdict: "Verdict") -> str:
    """The reason of a refusal, without names."""
    if verdict.consumer.startswith(OWN):
        return "another network than MAE's: `semaim tags TAG` names its tensors"
    return verdict.reason.replace(verdict.tag, "it").replace(arch_of(verdict.tag), "it")


def family(arch: str) -> str:
    """An architecture without its size, patch and image size: vit_base_patch16_siglip_224 is of vit_*_siglip."""
    before, _, after = arch.partition("_patch")
    words = before.split("_")
    kinds = [words.pop()] if words[-1] in ("plus", "distilled") else []
    kinds += [re.sub(r"reg\d+", "reg", word) for word in after.split("_") if word and not word.isdigit()]
    return "_".join([*words[:-1], "*", *kinds])


def answer(verdict: "Verdict") -> str:
    """A verdict in a cell."""
    return {"right": "yes", "loads": "yes", "refused": "no"}.get(verdict.word, verdict.word)


def recipes_of(own: dict[str, "Verdict"], recipes: list[str]) -> str:
    """The recipes for our own ViT that may be used with a tag."""
    may = [name.removeprefix(OWN) for name in recipes if own[name].word in ("right", "loads")]
    return "yes" if len(may) == len(recipes) else ", ".join(may) or "no"


def cell(answers: list[str]) -> str:
    """One answer if all tags have it, else the number of each."""
    counts = Counter(answers)
    return answers[0] if len(counts) == 1 else ", ".join(f"{number} {word}" for word, number in counts.most_common())


def exceptions(verdicts: Verdicts) -> list[str]:
    """Architectures that a task refuses or is WRONG with, and those whose images are not square."""
    from timm.models import get_pretrained_cfg

    found: dict[str, None] = {}
    for tag, own in verdicts.items():
        asked = (*NEEDED, "pool native")
        told = [one for one in own.values() if one.word == "WRONG" or one.word == "refused" and one.consumer in asked]
        found |= dict.fromkeys(f"* `{arch_of(tag)}`: {reason}." for reason in reasons(told))
    sizes = {tag: cfg.input_size[1:] for tag in verdicts if (cfg := get_pretrained_cfg(tag)) is not None}
    if tall := [f"`{arch_of(tag)}`" for tag, (height, width) in sizes.items() if height != width]:
        found[f"* Images are not square, so `model.network.img_size` has to be set, for {', '.join(tall)}."] = None
    return list(found)
