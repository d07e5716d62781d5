"""Turn the outputs of a block into Markdown."""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from docs_tools.blocks import Block, PageError
from docs_tools.kernel import COLOURS, Output

DARK = "application/x-dark-png"
LONGEST_OUTPUT = 30
"""Lines of output that stand open; more are folded."""

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
    number = 0
    for kind, group in groupby(outputs, key=_kind):
        if kind == "figure":
            for output in group:
                number += 1
                variants = _variants(output)
                figures |= dict(variants.values())
                urls = {scheme: figure_folder + name for scheme, (name, _) in variants.items()}
                markdown += ["", _images(alt, urls, output)]
        elif kind == "output" and block.options.get("output") == "markdown":
            markdown += ["", *_clean("".join(map(_content, group))).strip("\n").split("\n")]
        else:
            markdown += _text("".join(map(_content, group)), kind)
    if number > 1:
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


def _clean(text: str) -> str:
    for noise in _NOISE:
        text = noise.sub("", text)
    return text


def _text(text: str, kind: str) -> Iterator[str]:
    lines = _clean(text).strip("\n").split("\n")
    if not any(lines):
        return
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    extra = "" if kind == "output" else f" .{kind}"
    fenced = [f"{fence} {{ .text .no-copy .output{extra} }}", *lines, fence]
    if len(lines) <= LONGEST_OUTPUT:
        yield from ("", *fenced)
    else:
        yield from ("", f'??? abstract "Output: {len(lines)} lines"', "")
        yield from (f"    {line}" for line in fenced)


def _variants(output: Output) -> dict[str, tuple[str, bytes]]:
    """Give the figure's file for light pages and the one for dark pages."""
    files = {}
    for scheme, mime_type in {"light": "image/png", "dark": DARK}.items():
        if mime_type in output["data"]:
            content = base64.b64decode(output["data"][mime_type])
            files[scheme] = (hashlib.sha256(content).hexdigest()[:16] + ".png", content)
    return files


def _images(alt: str, urls: Mapping[str, str], output: Output) -> str:
    alt = re.sub(r"([\\`*_{}\[\]])", r"\\\1", html.escape(alt, quote=False))
    size = output.get("metadata", {}).get("image/png", {})
    attributes = " ".join([".output", "loading=lazy", *(f"{k}={v}" for k, v in size.items())])
    return " ".join(
        f"![{alt}]({url}#only-{scheme}){{ {attributes} }}" for scheme, url in urls.items()
    )
