"""Execute the examples of the docstrings that the reference shows.

mkdocstrings loads this extension of Griffe: see `mkdocs.yml`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

from docs_tools.blocks import PageError
from docs_tools.execute import Executed
from docs_tools.session import Document, Session


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


def docstrings_with_blocks(root: Path) -> list[Document]:
    """Give the docstrings of the package that have Python blocks."""
    package = griffe.load("xplique_flax", search_paths=[root], try_relative_path=False)
    found: list[Document] = []
    seen: list[griffe.Object] = [package]  # type: ignore[list-item]
    for obj in seen:
        seen += [member for member in obj.members.values() if isinstance(member, griffe.Object)]
        if obj.docstring and "```" in obj.docstring.value:
            found.append(document_of(obj, root))
    return found
