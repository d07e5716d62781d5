"""Read a tutorial: a Python script whose cells begin with `# %%`, as a Markdown page."""

import re
from itertools import pairwise

from docs_tools.blocks import PageError

_MARKER = re.compile(r"# %%(?P<rest>.*)")
_TEXT = " [markdown]"


def to_markdown(script: str, page: str) -> str:
    """Give the script as Markdown in which each line keeps its number."""
    lines = [*script.rstrip("\n").split("\n"), "", "# %% [markdown]"]
    starts = [index for index, line in enumerate(lines) if _MARKER.match(line)]
    if starts[0] != 0:
        raise PageError(page, 1, "a tutorial begins with `# %%`")
    markdown: list[str] = []
    for start, end in pairwise(starts):
        marker = _MARKER.fullmatch(lines[start])
        assert marker
        if lines[end - 1]:
            raise PageError(page, end, "a blank line is missing before the next cell")
        if marker["rest"] == _TEXT:
            markdown += ["", *_uncommented(lines[start + 1 : end], page, start + 2)]
        else:
            # The closing fence takes the place of the blank line before the next cell.
            markdown += [f"```python{marker['rest']}", *lines[start + 1 : end - 1], "```"]
    return "\n".join(markdown)


def _uncommented(lines: list[str], page: str, first_line: int) -> list[str]:
    for number, line in enumerate(lines, first_line):
        if line and not line.startswith("# ") and line != "#":
            raise PageError(page, number, "a line of a text cell begins with `# `")
    return [line.removeprefix("#").removeprefix(" ") for line in lines]
