"""The documents as a site: whole, readable without a network, and refused where a link is dead."""

from __future__ import annotations

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.documents import NAMES, ROOT

LEFT_OUT = (".*", "build", "runs", "*.egg-info", "*.so", "__pycache__")


def copy_repository(folder: Path) -> Path:
    """What the site is made from: files that links may lead to lie anywhere."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, there."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--clean"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = copy_repository(tmp_path_factory.mktemp("site") / "repository")
    done = build(folder)
    assert done.returncode == 0, done.stdout
    return folder / "build" / "docs"


class Page(HTMLParser):
    """Ids of a page, where its links lead, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if found := given.get("id"):
            self.ids.add(found)
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given.get("href") or "")
        elif source := given.get("src"):
            self.fetched.append(source)


def test_make_docs_builds_it_so() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ndocs: install ##")[2]
    assert recipe.splitlines()[1].endswith("/bin/mkdocs build --clean")


def test_every_document_is_a_page(site: Path) -> None:
    for name in NAMES:
        if name.startswith("docs/"):
            page = site / name.removeprefix("docs/").replace(".md", ".html")
        else:
            path = Path(name)
            stem = "index" if path.stem == "README" else path.stem
            page = site / "repository" / path.parent / f"{stem}.html"
        assert page.is_file(), page


def test_links_of_pages_lead_somewhere(site: Path) -> None:
    """Also those that lead out of docs/ in the repository, and back into it."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link in (".", "#"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (path, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, (path, link)
            checked += 1
    assert checked > 500


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for source in Page(path).fetched:
            assert not urlsplit(source).netloc, (path, source)
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        text = path.read_text(encoding="utf-8")
        assert "url(http" not in text and "@import" not in text, path


def test_what_is_dead_ends_the_build(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "repository")
    with (folder / "docs" / "gpu.md").open("a") as page:
        page.write("\n[a](nowhere.md) [b](fusion.md#no-such-heading) [c](#nor-this)\n")
        page.write("[d](../examples/nowhere.md) [e](../examples/README.md#nor-that)\n")
    (folder / "docs" / "forgotten.md").write_text("# Not in the nav\n")
    done = build(folder)
    assert done.returncode != 0
    for dead in (
        "'nowhere.md'",
        "fusion.md#no-such-heading",
        "'#nor-this'",
        "../examples/nowhere.md",
        "repository/examples/README.md#nor-that",
        "forgotten.md",
    ):
        assert dead in done.stdout, done.stdout
    assert "with 6 warnings" in done.stdout, done.stdout  # and nothing else is wrong
