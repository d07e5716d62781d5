"""Execute the Python blocks of a Markdown text and weave in what they show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from docs_tools.blocks import Block, find_blocks
from docs_tools.cache import Cache
from docs_tools.kernel import Output, run_blocks
from docs_tools.weave import weave


@dataclass(frozen=True)
class Executed:
    """A page's Markdown with outputs, its figures by file name, its blocks and their outputs."""

    markdown: str
    figures: dict[str, bytes] = field(default_factory=dict)
    blocks: Sequence[Block] = ()
    outputs: Sequence[Sequence[Output]] = ()


def execute(
    markdown: str,
    page: str,
    *,
    first_line: int = 1,
    figure_folder: str = "",
    cache: Cache | None = None,
    progress: Callable[[str], object] = print,
) -> Executed:
    """Run every Python block of `markdown`, in order, in one fresh process.

    Parameters
    ----------
    markdown
        The text of the page.
    page
        Its name, for progress and error messages.
    first_line
        Number of the text's first line in the file that it comes from.
    figure_folder
        Relative address, ending in a slash, of the folder that will hold the figures.
    cache
        Where outputs are kept; without it everything is run.
    progress
        Called with a line of text before each step.

    Returns
    -------
    Executed
        The page with its outputs.

    Raises
    ------
    PageError
        With the page and the line, if a block fails or cannot be run.
    """
    blocks = find_blocks(markdown, page, first_line)
    if not blocks:
        return Executed(markdown)
    results = cache.load(blocks) if cache else None
    if results is None:
        results = run_blocks(blocks, page, first_line, progress)
        if cache:
            cache.store(blocks, results)

    lines = markdown.split("\n")
    figures: dict[str, bytes] = {}
    # From the last block to the first, so that the indices of earlier blocks stay valid.
    for block, outputs in reversed(list(zip(blocks, results, strict=True))):
        woven, images = weave(outputs, block, figure_folder, page, block.first + first_line)
        lines[block.last + 1 : block.last + 1] = woven
        lines[block.first] = block.opening
        figures |= images
    return Executed("\n".join(lines), figures, blocks, results)
