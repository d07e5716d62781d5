"""Execute all documents of a build, several at a time."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from docs_tools.blocks import PageError, find_blocks
from docs_tools.cache import Cache, state_of
from docs_tools.execute import Executed, execute

HOW_BLOCKS_ARE_RUN = [Path(__file__).with_name(name) for name in ("kernel.py", "dark_figures.py")]
AT_ONCE = min(4, (os.cpu_count() or 1) + 1)  # one more than cores: not all of it is computing


def cache_of(root: Path) -> Cache:
    """Give the cache of a project: outputs depend on its package, and on how blocks are run."""
    return Cache(root / ".cache" / "docs", state_of([root / "xplique_flax", *HOW_BLOCKS_ARE_RUN]))


@dataclass(frozen=True)
class Document:
    """A Markdown text, where it comes from, and the number of its first line there."""

    name: str
    markdown: str
    first_line: int = 1


@dataclass
class Session:
    """The documents of the project in `root`, executed at most once per build."""

    root: Path
    progress: Callable[[str], object] = print
    docstrings: list[Document] = field(default_factory=list)
    cache: Cache = field(init=False)
    failed: dict[Document, PageError] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.cache = cache_of(self.root)

    def prepare(self, documents: Iterable[Document]) -> None:
        """Execute those documents whose outputs are not kept."""
        pending = {key: document for key, document in map(self._key, documents) if key}
        count = len(pending)
        if not count:
            self.progress("Nothing to execute: all outputs are kept.")
            return
        self.progress(f"Executing {count} pages, {min(AT_ONCE, count)} at a time.")
        done = 0

        def run(document: Document) -> None:
            nonlocal done
            try:
                self.execute(document)
            except PageError as error:
                self.failed[document] = error
            done += 1
            self.progress(f"{document.name}: done ({done} of {count} pages)")

        # The longest first, so that at the end no core waits for another.
        longest_first = sorted(pending.values(), key=lambda document: -len(document.markdown))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(run, longest_first))

    def execute(self, document: Document, figure_folder: str = "") -> Executed:
        """Give the document with its outputs, or raise the `PageError` of its failing block."""
        if document in self.failed:
            raise self.failed[document]
        return execute(
            document.markdown,
            document.name,
            first_line=document.first_line,
            figure_folder=figure_folder,
            cache=self.cache,
            progress=self.progress,
        )

    def _key(self, document: Document) -> tuple[str | None, Document]:
        # Two documents with the same code, such as the home page and the README, are one.
        try:
            blocks = find_blocks(document.markdown, document.name, document.first_line)
        except PageError as error:
            self.failed[document] = error
            return None, document
        kept = not blocks or self.cache.load(blocks) is not None
        return None if kept else self.cache.key(blocks), document
