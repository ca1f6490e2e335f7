"""CONTRIBUTING.md names what there is; hooks and templates lead to what there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.documents import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", TEXT)
PATHS = [word for word in CODE if re.fullmatch(r"[\w.*-]+/[\w./*-]*|[\w*-]+\.(py|md|yml)", word)]
IDENTIFIERS = [
    word for word in CODE if re.fullmatch(r"_?[a-zA-Z]+(_[a-zA-Z]+)+|_[a-z]+|[A-Z]{5,}", word)
]
FROM_BUILDS = {"build/docs"}
STANDS_FOR_ONE = {"examples/problems/NAME.json"}


def test_the_words_are_found() -> None:
    assert len(PATHS) > 30
    assert len(IDENTIFIERS) > 8


@pytest.mark.parametrize("path", sorted({*PATHS} - FROM_BUILDS - STANDS_FOR_ONE))
def test_paths_exist(path: str) -> None:
    """In the repository, or in the package, where its name is left out."""
    package = ROOT / "megatron_rlhfuse"
    assert [*ROOT.glob(path), *package.glob(path), *package.rglob(f"*/{path}")]


@pytest.mark.parametrize("name", sorted({*IDENTIFIERS} - {"megatron_rlhfuse"}))
def test_identifiers_exist(name: str) -> None:
    sources = [*(ROOT / "megatron_rlhfuse").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in sources)


def test_hooks_run_what_make_install_has_installed() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in settings["repos"]} == {"local"}
    for repository in settings["repos"]:
        for hook in repository["hooks"]:
            program, *arguments = hook["entry"].split()
            assert hook["language"] == "system"
            assert (Path(sys.prefix) / program.removeprefix(".venv/")).exists(), program
            assert all((ROOT / word).exists() for word in arguments if "/" in word)


def test_templates_have_what_the_site_that_shows_them_wants() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) == 3
    for template in templates:
        _, head, body = template.read_text(encoding="utf-8").split("---\n", 2)
        assert {"name", "about"} <= set(yaml.safe_load(head)) and body.strip()
        for page in re.findall(r"docs/[\w-]+\.md", body):
            assert (ROOT / page).is_file()


def test_the_license_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text and len(text) > 10_000
