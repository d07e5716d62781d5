"""Find the Python blocks of a Markdown text."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PYTHON = ("python", "python3", "py")
OUR_OPTIONS = ("alt", "output", "raises")
SITE_OPTIONS = ("title", "hl_lines", "linenums")

_FENCE = re.compile(r"(?P<prefix>[ \t>]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>.*?)[ \t]*")
_LOOKS_LIKE_PYTHON = re.compile(r"[{.\s]*(python|py|ipython)", re.IGNORECASE)
_OPTION = re.compile(r'\s+(\w+)="([^"]*)"')


class PageError(Exception):
    """What is wrong with a page, and in which line of its Markdown file."""

    def __init__(self, page: str, line: int, message: str) -> None:
        super().__init__(f"{page}:{line}: {message}")
        self.page, self.line, self.message = page, line, message


@dataclass(frozen=True)
class Block:
    """A Python block: `first` and `last` are the indices of its fences in the page's lines."""

    first: int
    last: int
    prefix: str
    fence: str
    code: str
    options: Mapping[str, str]

    @property
    def opening(self) -> str:
        """The opening fence without the options that only the executor reads.

        What a block is expected to raise stays readable, as a class of the shown code.
        """
        kept = [f'{name}="{self.options[name]}"' for name in SITE_OPTIONS if name in self.options]
        if "raises" in self.options:
            options = " ".join([".python", f".raises-{self.options['raises']}", *kept])
            return f"{self.prefix}{self.fence} {{ {options} }}"
        return " ".join([f"{self.prefix}{self.fence}python", *kept])


def find_blocks(markdown: str, page: str, first_line: int = 1) -> list[Block]:
    """Find every Python block, also those in admonitions, tabs, lists and quotes.

    Whatever looks like a Python block but could not be run is refused, so that no page can show
    code that was not executed.
    """
    blocks = []
    lines = markdown.split("\n")
    numbered = enumerate(lines)
    commented_out = False
    for first, line in numbered:
        match = _FENCE.fullmatch(line)
        if commented_out or not match or (match["fence"][0] == "`" and "`" in match["info"]):
            commented_out = "-->" not in line.rpartition("<!--")[2] and (
                commented_out or "<!--" in line
            )
            continue
        last = _closing_fence(numbered, match)
        if last is None:
            raise PageError(page, first + first_line, "this fence is never closed")
        options = _python_options(match["info"], page, first + first_line)
        if options is None:
            continue
        code = _dedent(lines[first + 1 : last], match["prefix"], page, first + 1 + first_line)
        _check_syntax(code, page, first + 1 + first_line)
        blocks.append(Block(first, last, match["prefix"], match["fence"], code, options))
    return blocks


def _closing_fence(numbered: Iterator[tuple[int, str]], opening: re.Match[str]) -> int | None:
    closing = (opening["prefix"] + opening["fence"]).rstrip()
    return next((index for index, line in numbered if line.rstrip() == closing), None)


def _python_options(info: str, page: str, line: int) -> dict[str, str] | None:
    if not _LOOKS_LIKE_PYTHON.match(info):
        return None
    language, rest = re.fullmatch(r"(\S+)(.*)", info).groups()  # type: ignore[union-attr]
    options = dict(_OPTION.findall(rest))
    known = set(options) <= {*OUR_OPTIONS, *SITE_OPTIONS}
    if language not in PYTHON or _OPTION.sub("", rest) or not known:
        names = ", ".join(f'{name}="..."' for name in OUR_OPTIONS + SITE_OPTIONS)
        raise PageError(
            page,
            line,
            f"cannot read `{info}`: every Python block is executed; "
            f"write `python`, followed by nothing or by any of {names}",
        )
    if options.get("output", "markdown") != "markdown":
        raise PageError(page, line, f"`output` is {options['output']!r}; accepted is 'markdown'")
    return options


def _dedent(lines: list[str], prefix: str, page: str, first_line: int) -> str:
    for number, line in enumerate(lines, first_line):
        if not line.startswith(prefix) and line.strip(" \t>"):
            raise PageError(page, number, "this line of code is indented less than its fence")
    return "\n".join(line.removeprefix(prefix) if line.strip(" \t>") else "" for line in lines)


def _check_syntax(code: str, page: str, first_line: int) -> None:
    # Python alone decides, so IPython's magics and shell commands, which a reader's interpreter
    # would not understand, are refused as well.
    try:
        ast.parse(code)
    except SyntaxError as error:
        line = first_line + (error.lineno or 1) - 1
        raise PageError(page, line, f"SyntaxError: {error.msg}") from None
