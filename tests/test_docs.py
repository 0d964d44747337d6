"""Documentation executes: every python block of every page, in order, one namespace a page; and every path exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=page_id)
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    namespace: dict = {"__name__": "__docs__", "OUTPUT": tmp_path}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), page_id(page), "exec"), namespace)


def tracked_files() -> set[str]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return set(out.stdout.split()) if out.returncode == 0 else set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"broken link: {target}"
    for path in re.findall(r"`((?:python|src|tests|tools|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"no such file: {path}"
