"""Run the blocks of one page: `python -m docs_tools docs/faq.md --to folder`."""

import argparse
import sys
from pathlib import Path

from docs_tools.blocks import PageError
from docs_tools.execute import execute
from docs_tools.percent import to_markdown
from docs_tools.session import cache_of

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs_tools", description=__doc__)
    parser.add_argument("page", type=Path, help="a Markdown page, or a tutorial's script")
    parser.add_argument("--to", type=Path, help="write page.md and its figures into this folder")
    parser.add_argument("--cache", action="store_true", help="reuse and keep outputs as a build")
    arguments = parser.parse_args()

    text = arguments.page.read_text("utf-8")
    cache = cache_of(ROOT) if arguments.cache else None
    try:
        if arguments.page.suffix == ".py":
            text = to_markdown(text, str(arguments.page))
        executed = execute(text, str(arguments.page), cache=cache)
    except PageError as error:
        sys.exit(str(error))
    if arguments.to:
        arguments.to.mkdir(parents=True, exist_ok=True)
        for name, content in {"page.md": executed.markdown.encode(), **executed.figures}.items():
            (arguments.to / name).write_bytes(content)


if __name__ == "__main__":
    main()
