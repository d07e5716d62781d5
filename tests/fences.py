"""All fences of the documentation, found by other means than those of the executor."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A fence may stand after the marks of quotes and of list items too.
FENCE = re.compile(r"(?:[ \t>]|[-*+]\s|\d+[.)]\s)*(`{3,}|~{3,})(.*)")


@dataclass(frozen=True)
class Fence:
    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def first_line(self) -> str:
        return self.code.strip("\n").partition("\n")[0]


def fences_in(text: str, page: str, first_line: int = 1) -> Iterator[Fence]:
    """Find the fences of a Markdown text, also those that are commented out or misplaced."""
    opening = None
    for number, line in enumerate(text.split("\n"), first_line):
        match = FENCE.fullmatch(line)
        if opening is None:
            if match and "`" not in match[2]:
                opening, info, start, code = match[1], match[2], number, []
        elif match and match[1].startswith(opening) and not match[2].strip():
            language = re.match(r"[\s{.]*([^\s}]*)", info)[1]
            yield Fence(page, start, language, inspect.cleandoc("\n" + "\n".join(code)))
            opening = None
        else:
            code.append(line)
    assert opening is None, f"{page}:{start}: this fence is never closed"


def markdown_pages() -> dict[str, str]:
    """Give the text of each page that is written in Markdown."""
    paths = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(paths)}


def tutorials() -> dict[str, str]:
    """Give the script of each tutorial."""
    paths = sorted(ROOT.glob("examples/**/*.py"))
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}


def comments(script: str) -> str:
    """Give the comments of a script, in their lines."""
    lines = [line if line.startswith("#") else "" for line in script.split("\n")]
    return "\n".join(re.sub("^# ?", "", line) for line in lines)


def docstrings() -> Iterator[tuple[str, int, str]]:
    """Give the module, the line and the text of each docstring of the package."""
    for path in sorted(ROOT.glob("xplique_flax/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for child in ast.iter_child_nodes(node):
                # Those below attributes count too, although Python does not keep them.
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                    if isinstance(child.value.value, str):
                        text = inspect.cleandoc(child.value.value)
                        yield str(path.relative_to(ROOT)), child.lineno, text


def all_fences() -> list[Fence]:
    fences = [fence for page in markdown_pages().items() for fence in fences_in(page[1], page[0])]
    for name, script in tutorials().items():
        fences += fences_in(comments(script), name)
    for name, line, text in docstrings():
        fences += fences_in(text, name, line)
    return fences
