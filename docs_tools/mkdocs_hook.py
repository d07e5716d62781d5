"""Glue between MkDocs and the page executor: see `hooks` in mkdocs.yml."""

import logging
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

TOOLS = Path(__file__).parent
sys.path.insert(0, str(TOOLS.parent))  # MkDocs loads this file as a module that has no package

from docs_tools.blocks import PageError  # noqa: E402
from docs_tools.cache import Cache, state_of  # noqa: E402
from docs_tools.execute import Executed, execute  # noqa: E402

FIGURES = "assets/figures/"
HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
PYTHON_ON_PAGE = re.compile(r'<div class="language-(?:python|py|ipython)')

log = logging.getLogger("mkdocs.hooks.execute")
serving = False
cache: Cache
run_on: dict[str, int] = {}


def on_startup(*, command: str, dirty: bool) -> None:
    global serving
    serving = command == "serve"


def on_config(config: MkDocsConfig) -> None:
    global cache
    root = _root(config)
    cache = Cache(root / ".cache" / "docs", state_of([root / "xplique_flax", TOOLS]))


@event_priority(100)  # before anything else changes the text, so that line numbers are right
def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    front_matter = page.file.content_string.count("\n") - markdown.count("\n")
    folder = get_relative_url(FIGURES, str(Path(name).parent) + "/")
    executed = _execute(markdown, f"docs/{name}", 1 + front_matter, folder)
    run_on[name] = executed.blocks
    for figure, content in executed.figures.items():
        if FIGURES + figure not in files.src_uris:
            files.append(
                File.generated(
                    config, FIGURES + figure, content=content, inclusion=InclusionLevel.INCLUDED
                )
            )
    return executed.markdown


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Check that no Python block reached the page by a way that the executor does not see."""
    name = page.file.src_uri
    shown = len(PYTHON_ON_PAGE.findall(HTML_COMMENT.sub("", html)))
    if shown != run_on[name]:
        _fail(f"docs/{name} shows {shown} Python blocks, but {run_on[name]} were executed")


def on_env(env: object, *, config: MkDocsConfig, files: Files) -> None:
    """Run the blocks of the README too; its text stays as it is."""
    _execute((_root(config) / "README.md").read_text("utf-8"), "README.md")


def _execute(markdown: str, name: str, first_line: int = 1, figure_folder: str = "") -> Executed:
    try:
        return execute(
            markdown,
            name,
            first_line=first_line,
            figure_folder=figure_folder,
            cache=cache,
            progress=log.info,
        )
    except PageError as error:
        _fail(str(error))
        message = str(error).replace("\n", "\n    ")
        return Executed(f"!!! failure\n\n    ~~~~ text\n    {message}\n    ~~~~\n")


def _fail(message: str) -> None:
    # A server must live on: it shows the error, and the page again once the error is mended.
    if not serving:
        raise PluginError(message)
    log.error(message)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
