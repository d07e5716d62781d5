"""Execute the examples of the docstrings that the reference shows.

mkdocstrings loads this extension of Griffe: see `mkdocs.yml`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

from docs_tools.blocks import PageError
from docs_tools.execute import Executed
from docs_tools.session import Document, Session

_DIRECTIVE = re.compile(r"^::: (\S+)\n((?: {4}.*\n?)*)", re.MULTILINE)
_MEMBERS = re.compile(r"members: \[(.*)\]")


class ExecuteExamples(griffe.Extension):
    """Put the outputs of a docstring's Python blocks under them."""

    session: Session
    shown: Callable[[PageError], Executed]
    """What is shown in the place of a docstring with a failing block."""
    blocks: int = 0
    """How many blocks the docstrings have, which are all on the reference's pages."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and "```" in obj.docstring.value:
            try:
                executed = self.session.execute(document_of(obj, self.session.root))
            except PageError as error:
                executed = self.shown(error)
            obj.docstring.value = executed.markdown
            ExecuteExamples.blocks += len(executed.blocks)


def document_of(obj: griffe.Object, root: Path) -> Document:
    assert obj.docstring and isinstance(obj.filepath, Path)
    name = f"{obj.filepath.relative_to(root)} ({obj.path})"
    return Document(name, obj.docstring.value, obj.docstring.lineno or 1)


def load(root: Path) -> griffe.Object:
    package = griffe.load("xplique_flax", search_paths=[root], try_relative_path=False)
    assert isinstance(package, griffe.Object)
    return package


def docstrings_with_blocks(root: Path) -> list[Document]:
    """Give the docstrings of the package that have Python blocks."""
    package = load(root)
    found: list[Document] = []
    seen: list[griffe.Object] = [package]
    for obj in seen:
        seen += [member for member in obj.members.values() if isinstance(member, griffe.Object)]
        if obj.docstring and "```" in obj.docstring.value:
            found.append(document_of(obj, root))
    return found


def shows_docstrings(markdown: str) -> bool:
    return bool(_DIRECTIVE.search(markdown))


def with_docstrings(markdown: str, session: Session) -> str:
    """Put docstrings, as they are written, in the place of the directives that ask for them."""

    def text_of(match: re.Match[str]) -> str:
        top = load(session.root)[match[1].partition(".")[2]]
        names = _MEMBERS.search(match[2])
        members = [top[name] for name in names[1].split(", ")] if names else []
        return "\n\n".join(map(described, [top, *members])) + "\n"

    def described(obj: griffe.Object) -> str:
        written = obj.docstring.value if obj.docstring else ""
        if "```" in written:
            written = session.execute(document_of(obj, session.root)).markdown
        function = obj.members.get("__init__", obj)
        heading: object = obj.name
        if isinstance(function, griffe.Function):
            heading = function.signature(name=obj.name)
        return f"## `{heading}`\n\n{written}"

    return _DIRECTIVE.sub(text_of, markdown)
