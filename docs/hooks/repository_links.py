"""For mkdocs: links from docs/ to files outside it work in the site as they do in the repository.

A link such as `../examples/README.md` is right where the repository is looked at. In the site a
file that is linked so is a page, or a file to download, under `repository/`, with its path in the
repository behind that; and its own links are followed in the same way. A link to a file that is
not there is left as it is, so that mkdocs warns of it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")
DOCS = "docs/"
OUTSIDE = "repository/"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages of the site though no other one need link to them."""


def on_files(files: Files, config: Any) -> Files:
    """Adds what is linked, directly or through an added page, and lies outside docs/."""
    root = Path(config.config_file_path).resolve().parent
    waiting = [page for page in PAGES if (root / page).is_file()]
    for page in files.documentation_pages():
        waiting += _linked(root, _in_repository(page.src_uri), page.content_string)
    while waiting:
        path = waiting.pop()
        if path.startswith(DOCS) or files.get_file_from_path(OUTSIDE + path) is not None:
            continue
        added = File.generated(config, OUTSIDE + path, abs_src_path=str(root / path))
        files.append(added)
        if added.is_documentation_page():
            waiting += _linked(root, path, added.content_string)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links that lead out of docs/, or into it, turned to where the site has them."""
    root = Path(config.config_file_path).resolve().parent
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        path = _target(root, _in_repository(here), match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(_in_site(path), posixpath.dirname(here))}{match[2]})"

    return LINK.sub(turned, markdown)


def _linked(root: Path, page: str, text: str) -> list[str]:
    """The repository's files that a page links to; `page` and they are paths in the repository."""
    targets = (_target(root, page, match[1]) for match in LINK.finditer(text))
    return [path for path in targets if path is not None]


def _target(root: Path, page: str, link: str) -> str | None:
    """The file that a link leads to, as a path in the repository; None where there is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    leaves = path.startswith("..") or os.path.isabs(path) or ":" in link
    return path if not leaves and (root / path).is_file() else None


def _in_repository(page: str) -> str:
    return page.removeprefix(OUTSIDE) if page.startswith(OUTSIDE) else DOCS + page


def _in_site(path: str) -> str:
    return path.removeprefix(DOCS) if path.startswith(DOCS) else OUTSIDE + path
