"""Execute the examples of the docstrings that the reference shows.

mkdocstrings loads this extension of Griffe: see `mkdocs.yml`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

from docs_tools.blocks import PageError, find_blocks
from docs_tools.execute import Executed
from docs_tools.session import Document, Session

_DIRECTIVE = re.compile(r"^::: (\S+)\n((?: {4}.*\n?)*)", re.MULTILINE)
_MEMBERS = re.compile(r"members: \[(.*)\]")
_MARK = re.compile(r"^<!-- (\S+) -->\n", re.MULTILINE)


class ExecuteExamples(griffe.Extension):
    """Put the outputs of a docstring's Python blocks under them."""

    session: Session
    shown: Callable[[PageError], Executed]
    """What is shown in the place of a docstring with a failing block."""
    blocks: int = 0
    """How many blocks the docstrings have, which are all on the reference's pages."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and "```" in obj.docstring.value:
            ExecuteExamples.blocks += len(find_blocks(obj.docstring.value, obj.path))
            try:
                obj.docstring.value = executed_docstring(obj, self.session)
            except PageError as error:
                obj.docstring.value = self.shown(error).markdown


def executed_docstring(obj: griffe.Object, session: Session) -> str:
    """Give a docstring with its outputs, or raise the `PageError` of a failing block."""
    file = _document_of(obj, session.root).name.partition(" ")[0]
    (document,) = (each for each in session.docstrings if each.name == file)
    marks_and_texts = _MARK.split(session.execute(document).markdown)
    return marks_and_texts[marks_and_texts.index(obj.path) + 1]


def files_with_blocks(root: Path) -> list[Document]:
    """Give the docstrings that have Python blocks, as one document for each source file.

    Each docstring stands on the lines that it has in the file, under a mark with its path.
    """
    files: dict[str, list[str]] = {}
    for document in sorted(docstrings_with_blocks(root), key=lambda each: each.first_line):
        file, _, path = document.name.partition(" ")
        lines = files.setdefault(file, [])
        lines += [""] * (document.first_line - 2 - len(lines))
        lines += [f"<!-- {path.strip('()')} -->", *document.markdown.split("\n")]
    return [Document(file, "\n".join(lines)) for file, lines in files.items()]


def docstrings_with_blocks(root: Path) -> list[Document]:
    """Give the docstrings of the package that have Python blocks."""
    found: list[Document] = []
    seen = [_load(root)]
    for obj in seen:
        seen += [member for member in obj.members.values() if isinstance(member, griffe.Object)]
        if obj.docstring and "```" in obj.docstring.value:
            found.append(_document_of(obj, root))
    return found


def _load(root: Path) -> griffe.Object:
    package = griffe.load("xplique_flax", search_paths=[root], try_relative_path=False)
    assert isinstance(package, griffe.Object)
    return package


def _document_of(obj: griffe.Object, root: Path) -> Document:
    assert obj.docstring and isinstance(obj.filepath, Path)
    name = f"{obj.filepath.relative_to(root)} ({obj.path})"
    return Document(name, obj.docstring.value, obj.docstring.lineno or 1)


def shows_docstrings(markdown: str) -> bool:
    """Tell whether a page asks for docstrings."""
    return bool(_DIRECTIVE.search(markdown))


def with_docstrings(markdown: str, session: Session) -> str:
    """Put docstrings, as they are written, in the place of the directives that ask for them."""

    def text_of(match: re.Match[str]) -> str:
        top = _load(session.root)[match[1].partition(".")[2]]
        names = _MEMBERS.search(match[2])
        members = [top[name] for name in names[1].split(", ")] if names else []
        return "\n\n".join(map(described, [top, *members])) + "\n"

    def described(obj: griffe.Object | griffe.Alias) -> str:
        if isinstance(obj, griffe.Alias):
            return described(obj.final_target)
        written = obj.docstring.value if obj.docstring else ""
        if "```" in written:
            written = executed_docstring(obj, session)
        function = obj.members.get("__init__", obj)
        heading: object = obj.name
        if isinstance(function, griffe.Function):
            heading = function.signature(name=obj.name)
        return f"## `{heading}`\n\n{written.strip()}\n"

    return _DIRECTIVE.sub(text_of, markdown)
