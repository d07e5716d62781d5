"""What a reader copies from the built pages runs, where nothing but the package is installed."""

import re
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from bs4 import BeautifulSoup, Tag

from tests.clean_environment import ROOT, run_blocks
from tests.fences import all_fences, tutorials
from tests.site_server import PAGES, base, file_at

pytestmark = [pytest.mark.usefixtures("built_site"), pytest.mark.timeout(1800)]

TOKEN = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?(?:e[-+]?\d+)?|[^\W\d]+|[^\w\s]")
# Numbers differ a little between two runs, and times differ a lot.
TOLERANCE = {"rel": 0.02, "abs": 0.02}
MEASURES_TIME = "perf_counter"


@dataclass
class Shown:
    """A block of a page, the exception that its class names, and what is shown under it."""

    code: str
    raises: str
    printed: str = ""
    error: str = ""


def parse(page: str) -> BeautifulSoup:
    return BeautifulSoup(file_at(base() + page).read_text("utf-8"), "html.parser")


def blocks_of(page: str) -> list[Shown]:
    blocks: list[Shown] = []
    for element in parse(page).select("div.language-python, div.output:not(.stderr)"):
        text, classes = element.code.get_text(), element["class"]
        if "output" not in classes:
            blocks.append(Shown(text, "".join(name.partition("raises-")[2] for name in classes)))
        elif "error" in classes:
            blocks[-1].error += text
        else:
            blocks[-1].printed += text
    return blocks


def same(expected: str, got: str, *, numbers: bool = True) -> bool:
    """Compare texts, whatever their white space; numbers may differ a little."""
    tokens, others = TOKEN.findall(expected), TOKEN.findall(got)
    return len(tokens) == len(others) and all(
        (not numbers or float(token) == pytest.approx(float(other), **TOLERANCE))
        if token[0].isdigit() and other[0].isdigit() and "x" not in token + other
        else token == other or token[:2] == other[:2] == "0x"
        for token, other in zip(tokens, others, strict=True)
    )


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text))


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_and_shows_what_the_page_shows(page, reader, tmp_path):
    blocks = blocks_of(page)
    if not blocks:
        return
    text = parse(page).article.get_text()
    results = run_blocks(reader, [block.code for block in blocks], tmp_path)
    for block, result in zip(blocks, results, strict=True):
        where = f"in this block of {page}:\n{block.code}"
        raised = result["error"].partition(":")[0]
        assert raised == block.raises, f"{result['error'] or 'nothing raised'} {where}"
        assert same(block.error, result["error"]), f"another message {where}"
        numbers = MEASURES_TIME not in block.code
        printed = result["printed"]
        if block.printed or not printed:
            assert same(block.printed, printed, numbers=numbers), f"{printed!r} {where}"
        else:  # shown as Markdown
            assert words(printed) <= words(text), f"{printed!r} {where}"


def test_code_on_the_pages_is_that_of_the_fences():
    """Code that is written otherwise, such as by indenting it, is on a page but in no fence."""
    written = Counter(fence.language for fence in all_fences() if fence.page != "README.md")
    for script in tutorials().values():
        written["python"] += len(re.findall(r"(?m)^# %%(?! \[markdown\])", script))
    shown: Counter[str] = Counter()
    for page in PAGES:
        for block in parse(page).select("pre"):
            shown.update(languages_of(block.find_parent("div", class_="highlight")))
    assert shown == written


def languages_of(block: Tag | None) -> list[str]:
    """Give the language that a block of code carries as a class; none if it is an output."""
    classes = block["class"] if block else ["language-none"]
    found = [name.partition("language-")[2] for name in classes if name.startswith("language-")]
    assert len(found) == 1
    return [] if {"output", "doc-signature"} & set(classes) else found


@pytest.mark.parametrize("page", PAGES)
def test_no_page_shows_where_it_was_built(page):
    text = parse(page).get_text()
    assert str(ROOT) not in text
    assert sys.prefix not in text
