"""The documentation: generated pages are those of the code, the site builds without a warning, and its links lead."""

import ast
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from urllib.parse import unquote, urlsplit

import command_pages
import error_pages
import pytest
import yaml
from browser import MISSING, browser, find_browser
from commands import ROOT

DOCS = ROOT / "docs"
HINT = "run: python tests/generate.py"
#: Pages outside of docs/ that link to it, and are read on GitHub.
OUTSIDE = sorted(ROOT.glob("*.md"))
PAGES = [*OUTSIDE, *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|^\[[\w-]+\]: (\S+)$", re.M)
needs_zensical = pytest.mark.skipif(
    find_spec("zensical") is None or find_spec("mkdocstrings") is None,
    reason="zensical and mkdocstrings-python are not installed: runs after pip install '.[docs]'",
)


class Loader(yaml.SafeLoader):
    """Of mkdocs.yml, whose tags name Python objects."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def settings():
    return Loader((ROOT / "mkdocs.yml").read_text()).get_single_data()


def in_navigation(node):
    """Paths of the pages below an entry of the navigation."""
    if isinstance(node, str):
        return [node]
    return [path for item in (node.values() if isinstance(node, dict) else node) for path in in_navigation(item)]


def slugs(path):
    """Anchors of a page on GitHub: its headings in lower case, without punctuation, numbered where they repeat."""
    found, text = [], CODE.sub(lambda code: code[0] if code[0].count("\n") == 0 else "", path.read_text())
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def test_commands_are_those_of_the_parsers():
    assert command_pages.PAGE.read_text() == command_pages.page(), HINT


def test_examples_of_commands_are_valid():
    assert set(command_pages.EXAMPLES) <= set(command_pages.COMMANDS)
    command_pages.check_examples()


def test_every_argument_of_a_command_says_what_it_is():
    assert not re.findall(r"^\| `(.+)` \| +\|$", command_pages.PAGE.read_text(), re.M)


def test_error_lines_are_those_of_the_code():
    assert error_pages.PAGE.read_text() == error_pages.page(), HINT


def test_an_error_line_keeps_its_words():
    message = """f"cannot read {path}: {error.strerror}: {nearest(name, known)}" + " at all" """
    assert (
        error_pages.template(ast.parse(message).body[0].value) == "cannot read PATH: REASON: did you mean NAME? at all"
    )
    assert error_pages.chosen("data/coco.py", ["data/*.py", "*.py", "data/coco.py"]) == "data/coco.py"
    assert error_pages.chosen("data/few.py", ["data/*.py", "*.py", "data/coco.py"]) == "data/*.py"


def test_config_keys_are_those_of_the_code():
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    pytest.importorskip("griffe", reason="griffe is not installed: runs after pip install '.[docs]'")
    import config_pages

    assert config_pages.undocumented() == [], "give them a line in their docstring's Args"
    assert config_pages.PAGE.read_text() == config_pages.page(), HINT


def test_every_page_is_in_the_navigation():
    listed = in_navigation(settings()["nav"])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(set(listed)), "a page stands twice"
    assert set(listed) == pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_on_github(path):
    """Also from the files outside of the site; those inside are checked again in the built site."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    lost = []
    for target in (one or other for one, other in LINK.findall(text)):
        url = urlsplit(target)
        if url.scheme:
            continue
        file = path.parent / unquote(url.path) if url.path else path
        included = file.exists() and file.suffix == ".md" and '--8<-- "' in file.read_text()
        # The pages of CONTRIBUTING.md and others have its headings on the site alone.
        anchored = not url.fragment or file.suffix != ".md" or included or "reference/api" in file.as_posix()
        if not file.exists() or not (anchored or url.fragment in slugs(file)):
            lost.append(target)
    assert not lost


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from a copy, as Zensical writes inside the folder of its settings."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs")
    for path in (*OUTSIDE, ROOT / "mkdocs.yml"):
        shutil.copy(path, root)
    ignored = shutil.ignore_patterns("__pycache__", "configs")
    shutil.copytree(ROOT / "semaim", root / "semaim", ignore=ignored)
    line = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert done.returncode == 0 and "No issues found" in said, said[-4000:]
    assert not re.search("warning|griffe|mkdocstrings", said, re.I), said
    return root / "site"


@needs_zensical
def test_the_site_builds_and_its_links_lead(site):
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) == len(list(DOCS.rglob("*.md")))
    anchors = {path: set(re.findall(r'\sid="([^"]+)"', text)) for path, text in pages.items()}
    lost = []
    for path, text in pages.items():
        for target in re.findall(r'\s(?:href|src)="([^"]+)"', text):
            url = urlsplit(target)
            if url.scheme in ("http", "https", "mailto", "data"):
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path not in ("", ".") else path
            if not file.exists() or url.fragment and file in anchors and unquote(url.fragment) not in anchors[file]:
                lost.append((path.name, target))
    assert not lost


@needs_zensical
def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r'<(?:script|link|img|iframe)[^>]*\s(?:src|href)="(?:https?:)?//[^"]*"')
    assert not [found for path in site.rglob("*.html") for found in loaded.findall(path.read_text())]
    assert not [path for path in site.rglob("*.css") if re.search(r"url\([\"']?https?:", path.read_text())]


#: Elements that reach beyond the window, but not inside a box that scrolls, a menu that is shut, or hidden text.
BEYOND = """[...document.querySelectorAll(".md-content *, .md-header *")].filter(it => {
    const box = it.getBoundingClientRect();
    return box.width && box.height && it.checkVisibility({visibilityProperty: true, opacityProperty: true})
        && (box.right > document.documentElement.clientWidth + 1 || box.left < -1)
        && !it.closest(".md-typeset__scrollwrap, pre, code, .md-search, svg, .highlight, .headerlink");
}).map(it => it.tagName + " " + it.textContent.slice(0, 40))"""
FOUND = """(() => {
    const roots = [document, ...[...document.querySelectorAll("*")].map(it => it.shadowRoot).filter(it => it)];
    return roots.flatMap(root => [...root.querySelectorAll("a[href]")]).map(it => it.href)
        .filter(it => it.includes("troubleshooting.html")).length;
})()"""
#: Pages of every kind: prose, wide tables, generated ones.
LOOKED_AT = ("encoders", "recipes", "architecture", "contributing", "troubleshooting", "reference/commands")
LOOKED_AT += ("reference/config", "reference/api")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """A tab of a browser."""
    if find_browser() is None:
        pytest.skip(MISSING)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.slow
@needs_zensical
@pytest.mark.parametrize("page", LOOKED_AT)
def test_in_a_browser(site, window, page):
    grounds = []
    for width in (400, 800, 1400):
        for dark in (False, True):
            window.look(width, dark)
            window.open(site / f"{page}.html")
            where = f"{page}, {width} px, {'dark' if dark else 'light'}"
            assert window.run("document.documentElement.scrollWidth <= innerWidth"), where
            assert window.run(BEYOND) == [], where
            assert window.complaints == [], where
            grounds.append(window.run("getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == 2


@pytest.mark.slow
@needs_zensical
def test_the_search_finds_an_error_line(site, window):
    window.look(1400)
    window.open(site / "encoders.html")
    window.run("document.querySelector('label[for=__search], .md-search__button').click()")
    before = window.run(FOUND)
    window.call("Input.insertText", text="shared memory full read-only")
    end = time.monotonic() + 30
    while window.run(FOUND) <= before and time.monotonic() < end:
        time.sleep(0.1)
    assert window.run(FOUND) > before and window.complaints == []
