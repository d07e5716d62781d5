"""Make a Jupyter notebook of an executed page."""

import re
from collections.abc import Iterator
from urllib.parse import urljoin

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from docs_tools.execute import Executed
from docs_tools.kernel import Output
from docs_tools.weave import DARK

_ADMONITION = re.compile(r'(?:!!!|\?\?\?\+?) (?P<kind>\w+)(?: "(?P<title>.*)")?')
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<url>[^)#:][^):]*)\)")


def to_notebook(markdown: str, executed: Executed, address: str) -> str:
    """Give the page's text and code, with the outputs, in the form of an `.ipynb` file.

    Parameters
    ----------
    markdown
        The page, before it was executed.
    executed
        What came of it.
    address
        The page's address, to which its links are relative; empty as long as it is not known:
        then links to other pages become plain text.
    """
    lines = markdown.split("\n")
    cells = []
    start = 0
    for number, (block, outputs) in enumerate(zip(executed.blocks, executed.outputs, strict=True)):
        cells.append(_text_cell(lines[start : block.first], address))
        code = new_code_cell(block.code, execution_count=number + 1)
        code.outputs = [_plain(output, number + 1) for output in outputs]
        cells.append(code)
        start = block.last + 1
    cells.append(_text_cell(lines[start:], address))
    notebook = new_notebook(cells=[cell for cell in cells if cell.source])
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random by default: two builds would differ
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.validate(notebook)
    return nbformat.writes(notebook)


def _text_cell(lines: list[str], address: str) -> nbformat.NotebookNode:
    def link(match: re.Match[str]) -> str:
        if not address:
            return match["text"]
        url = re.sub(r"(index)?\.(md|py)(?=#|$)", "", match["url"])
        return f"[{match['text']}]({urljoin(address + '/', '../' + url)})"

    return new_markdown_cell(_LINK.sub(link, "\n".join(_quoted(lines))).strip())


def _quoted(lines: list[str]) -> Iterator[str]:
    """Turn admonitions, which notebooks do not know, into quotes."""
    inside, blank = False, 0
    for line in lines:
        match = _ADMONITION.fullmatch(line)
        if not line:
            blank += 1
            continue
        still_inside = inside and line.startswith("    ")
        yield from [">" if still_inside else ""] * blank
        inside, blank = bool(match) or still_inside, 0
        if match:
            title = match["title"] if match["title"] is not None else match["kind"].capitalize()
            yield f"> **{title}**"
        else:
            yield f"> {line.removeprefix('    ')}" if inside else line


def _plain(output: Output, number: int) -> nbformat.NotebookNode:
    plain = nbformat.from_dict(output)
    if "data" in plain:
        plain.data = {kind: value for kind, value in plain.data.items() if kind != DARK}
    if plain.output_type == "execute_result":
        plain.execution_count = number
    return plain
