"""Keep the outputs of executed pages for as long as nothing that they depend on changes."""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path

from docs_tools.blocks import Block
from docs_tools.kernel import Output


@dataclass(frozen=True)
class Cache:
    """Outputs in `folder`, by the code of a page and by the state of everything that it uses."""

    folder: Path
    state: str

    def load(self, blocks: Sequence[Block]) -> list[list[Output]] | None:
        """Give the outputs of these blocks if they were kept."""
        path = self._path(blocks)
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def store(self, blocks: Sequence[Block], outputs: list[list[Output]]) -> None:
        """Keep the outputs of these blocks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(blocks)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(outputs), "utf-8")
        unfinished.replace(path)

    def key(self, blocks: Sequence[Block]) -> str:
        """Give the name under which the outputs of these blocks are kept."""
        code = [(block.code, block.options.get("raises")) for block in blocks]
        return _digest(self.state, json.dumps(code))

    def _path(self, blocks: Sequence[Block]) -> Path:
        return self.folder / f"{self.key(blocks)}.json"


def state_of(sources: Iterable[Path]) -> str:
    """Sum up the files and folders `sources`, this interpreter and its packages."""
    files = sorted(
        (str(file.relative_to(source.parent)), file)
        for source in sources
        for file in (source, *source.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    )
    contents = (f"{name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in files)
    return _digest(_installed_packages(), *contents)


@lru_cache
def _installed_packages() -> str:
    # All of them, rather than a list that would have to name every package a page may import.
    packages = {(found.name, found.version) for found in distributions()}
    return "\n".join([sys.version, *(f"{name}=={version}" for name, version in sorted(packages))])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()
