"""Turn the outputs of a block into Markdown."""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from docs_tools.blocks import Block, PageError
from docs_tools.kernel import COLOURS, Output

_NOISE = (
    COLOURS,
    re.compile(r"[^\n]*\r(?!\n)|\x08"),  # what a progress bar overwrites
    re.compile(r"\S*/ipykernel_\d+/\d+\.py:\d+: "),  # the temporary file of the block itself
    re.compile(r"\S*/site-packages/"),
    re.compile(re.escape(f"{Path(__file__).parents[1]}/")),
)


def weave(
    outputs: Sequence[Output], block: Block, figure_folder: str, page: str, line: int
) -> tuple[list[str], dict[str, bytes]]:
    """Give the Markdown lines that follow a block, and its figures by file name."""
    alt = block.options.get("alt", "")
    markdown: list[str] = []
    figures: dict[str, bytes] = {}
    for kind, group in groupby(outputs, key=_kind):
        if kind == "figure":
            for output in group:
                content = base64.b64decode(output["data"]["image/png"])
                name = hashlib.sha256(content).hexdigest()[:16] + ".png"
                figures[name] = content
                markdown += ["", _image(alt, figure_folder + name, output)]
        else:
            markdown += _text("".join(map(_content, group)), kind)
    if len(figures) > 1:
        raise PageError(page, line, "this block shows more than one figure: split it")
    if figures and not alt.strip():
        raise PageError(page, line, 'this block shows a figure: describe it, by alt="..."')
    if "alt" in block.options and not figures:
        raise PageError(page, line, "this block has an `alt` text but shows no figure")
    return [(block.prefix + text).rstrip() for text in [*markdown, ""]], figures


def _kind(output: Output) -> str:
    if output["output_type"] == "stream":
        return "output" if output["name"] == "stdout" else "stderr"
    if output["output_type"] == "error":
        return "error"
    return "figure" if "image/png" in output["data"] else "output"


def _content(output: Output) -> str:
    if output["output_type"] == "stream":
        return str(output["text"])
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}"
    return f"{output['data'].get('text/plain', '')}\n"


def _text(text: str, kind: str) -> Iterator[str]:
    for noise in _NOISE:
        text = noise.sub("", text)
    if text.strip():
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        extra = "" if kind == "output" else f" .{kind}"
        opening = f"{fence} {{ .text .no-copy .output{extra} }}"
        yield from ("", opening, *text.strip("\n").split("\n"), fence)


def _image(alt: str, url: str, output: Output) -> str:
    alt = re.sub(r"([\\`*_{}\[\]])", r"\\\1", html.escape(alt, quote=False))
    width = output.get("metadata", {}).get("image/png", {}).get("width")
    return f"![{alt}]({url}){{ .output{f' width={width}' if width else ''} }}"
