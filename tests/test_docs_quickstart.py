"""The quickstart, which stands both on the home page and in the README."""

import re
from codeop import compile_command
from pathlib import Path

from docs_tools.blocks import find_blocks

ROOT = Path(__file__).parents[1]


def quickstart(name: str) -> str:
    text = (ROOT / name).read_text("utf-8")
    return re.search(r"^## Quickstart\n.*?(?=^## )", text, re.DOTALL | re.MULTILINE).group()


def test_readme_and_home_page_have_the_same_quickstart():
    assert quickstart("README.md") == quickstart("docs/index.md")


def test_quickstart_can_be_typed_into_an_interpreter():
    blocks = find_blocks(quickstart("README.md"), "README.md")
    assert len(blocks) == 3
    for block in blocks:
        # As the interpreter does: a statement ends where it is complete, a compound one at the
        # first blank line.
        statement: list[str] = []
        for line in [*block.code.split("\n"), ""]:
            statement.append(line)
            if compile_command("\n".join(statement)):
                statement = []
        assert not any(statement)
