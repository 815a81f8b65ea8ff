"""Every Python block of the README and the pages runs, in the order in which a reader meets it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", re.M | re.S)


def blocks(page):
    """Line number and source of each block that is to be run."""
    text = page.read_text()
    return [
        (text[: found.start(2)].count("\n"), found[2]) for found in BLOCK.finditer(text) if found[1] is None
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for line, source in blocks(page):
        code = compile("\n" * line + source, str(page), "exec")  # so that an error names the page's line
        exec(code, names)


def test_the_pages_have_blocks_and_links_that_lead_somewhere():
    assert sum(len(blocks(page)) for page in PAGES) >= 10
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for path in re.findall(r"`((?:examples|benchmarks|lasnn_sj|tests)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
