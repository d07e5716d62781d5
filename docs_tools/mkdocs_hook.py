"""Glue between MkDocs and the page executor: see `hooks` in mkdocs.yml."""

import html
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from urllib.parse import urljoin

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from mkdocs.utils.meta import get_data
from mkdocs_jupyter.plugin import NotebookFile

TOOLS = Path(__file__).parent
sys.path.insert(0, str(TOOLS.parent))  # MkDocs loads this file as a module that has no package

from docs_tools.benchmark import with_benchmark  # noqa: E402
from docs_tools.blocks import PageError  # noqa: E402
from docs_tools.docstrings import (  # noqa: E402
    ExecuteExamples,
    files_with_blocks,
    shows_docstrings,
    with_docstrings,
)
from docs_tools.execute import Executed  # noqa: E402
from docs_tools.llms import PageText, llms_files  # noqa: E402
from docs_tools.notebook import to_notebook  # noqa: E402
from docs_tools.percent import to_markdown  # noqa: E402
from docs_tools.session import Document, Session  # noqa: E402

FIGURES = "assets/figures/"
CHANGELOG = "CHANGELOG.md"
TUTORIALS, EXAMPLES = "tutorials/", "examples/"
VERSIONS = ("xplique-flax", "xplique", "jax", "flax", "tensorflow", "keras")
HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
PYTHON_ON_PAGE = re.compile(r'<div class="[^"]*\blanguage-(?:python|py|ipython)')
SIGNATURE = ("language-python doc-signature", "language-signature doc-signature")
"""Signatures look like Python blocks, and are no code to be copied and run."""
MATHS = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">'
    r"(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>",
    re.DOTALL,
)

# Names, spaces, operators and punctuation need no look of their own. Their elements are most of
# those of a long page, and Material has a browser compute the styles of all several times.
PLAIN_CODE = re.compile(r'<span class="[nopw]">([^<]*)</span>')

log = logging.getLogger("mkdocs.hooks.execute")
serving = False
session: Session
executed_pages: dict[str, Executed] = {}
pages: list[Page] = []


def on_startup(*, command: str, dirty: bool) -> None:
    global serving
    serving = command == "serve"


def on_config(config: MkDocsConfig) -> None:
    global session
    if not config.repo_url:
        config.edit_uri = None
    root = Path(config.config_file_path).parent
    session = Session(root, log.info, files_with_blocks(root))
    executed_pages.clear()
    ExecuteExamples.session, ExecuteExamples.blocks = session, 0
    ExecuteExamples.shown = staticmethod(_shown)


@event_priority(100)  # before mkdocs-jupyter makes pages of the scripts
def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Make the scripts in `examples/`, and the changelog, files of the site."""
    for script in sorted((session.root / EXAMPLES).glob("*.py")):
        files.append(File.generated(config, TUTORIALS + script.name, abs_src_path=str(script)))
    changelog = session.root / CHANGELOG
    if changelog.exists():
        files.append(File.generated(config, CHANGELOG.lower(), abs_src_path=str(changelog)))


@event_priority(-100)  # when every page is known
def on_nav(nav: Navigation, *, config: MkDocsConfig, files: Files) -> None:
    """Execute what has to be executed, several pages at a time."""
    global pages
    pages = nav.pages
    for file in files:
        if isinstance(file, NotebookFile):  # which forgets where a generated file comes from
            file.abs_src_path = file.file.abs_src_path
    session.prepare(_documents(files))


def _documents(files: Files) -> Iterator[Document]:
    for file in files.documentation_pages():
        try:
            yield _document(file.src_uri, get_data(file.content_string)[0], file.content_string)
        except PageError as error:
            log.debug(error)  # it is raised again, and reported, when the page is rendered
    yield _readme()
    yield from session.docstrings


def _document(src_uri: str, markdown: str, source: str) -> Document:
    if src_uri.endswith(".py"):
        name = src_uri.replace(TUTORIALS, EXAMPLES, 1)
        return Document(name, to_markdown(source, name))
    front_matter = source.count("\n") - markdown.count("\n")
    return Document(f"docs/{src_uri}", markdown, 1 + front_matter)


def _readme() -> Document:
    return Document("README.md", (session.root / "README.md").read_text("utf-8"))


@event_priority(-100)  # after mkdocs-jupyter has taken charge of the page
def on_pre_page(page: Page, *, config: MkDocsConfig, files: Files) -> None:
    if page.file.src_uri.endswith(".py"):
        # Notebooks know no admonitions, tabs, checked links: the site's own Markdown renders them.
        vars(page).pop("render", None)
        if page.edit_url:
            name = page.file.src_uri.removeprefix(TUTORIALS)
            page.edit_url = re.sub(r"docs/tutorials/.*", EXAMPLES + name, page.edit_url)
    elif page.file.src_uri == CHANGELOG.lower() and config.repo_url and config.edit_uri:
        folder = f"{config.repo_url.rstrip('/')}/{config.edit_uri}"
        page.edit_url = urljoin(folder, f"../{CHANGELOG}")


@event_priority(100)  # before anything else changes the text, so that line numbers are right
def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    src_uri = page.file.src_uri
    folder = get_relative_url(FIGURES, str(Path(src_uri).parent) + "/")
    try:
        document = _document(src_uri, markdown, page.file.content_string)
        executed = session.execute(document, folder)
    except PageError as error:
        executed = _shown(error)
    text, drawn = with_benchmark(executed.markdown, session.root, folder)
    executed = replace(executed, markdown=text, figures={**executed.figures, **drawn})
    executed_pages[src_uri] = executed
    for figure, content in executed.figures.items():
        _add_file(FIGURES + figure, content, config, files)
    if not src_uri.endswith(".py") or not executed.blocks:
        return executed.markdown
    notebook = to_notebook(document.markdown, executed, (page.canonical_url or "").rstrip("/"))
    path = src_uri.removesuffix(".py") + "/" + Path(src_uri).stem + ".ipynb"
    _add_file(path, notebook, config, files)
    return executed.markdown


def _add_file(path: str, content: str | bytes, config: MkDocsConfig, files: Files) -> None:
    if path not in files.src_uris:
        included = InclusionLevel.INCLUDED
        files.append(File.generated(config, path, content=content, inclusion=included))


@event_priority(-100)  # when mkdocstrings has rendered the reference
def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    executed = executed_pages[page.file.src_uri]
    expected = len(executed.blocks)
    if shows_docstrings(executed.markdown):
        expected += ExecuteExamples.blocks
    content = content.replace(*SIGNATURE)
    shown = len(PYTHON_ON_PAGE.findall(HTML_COMMENT.sub("", content)))
    if shown != expected:
        # No Python block may reach a page by a way that the executor does not see.
        _fail(f"{page.file.src_uri} shows {shown} Python blocks, but {expected} were executed")
    content = PLAIN_CODE.sub(r"\1", MATHS.sub(_mathml, content))
    if page.file.src_uri.endswith(".py"):
        content = content.replace("</h1>", "</h1>\n" + _downloads(Path(page.file.src_uri).stem), 1)
    return content + _versions() if expected else content


def _mathml(match: re.Match[str]) -> str:
    display = "inline" if match["tag"] == "span" else "block"
    return convert(html.unescape(match["inline"] or match["block"]), display=display)


def _downloads(name: str) -> str:
    return (
        f'<p class="downloads">Download: <a href="{name}.py" download>script</a>, '
        f'<a href="{name}.ipynb" download>executed notebook</a></p>\n'
    )


def _versions() -> str:
    names = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return f'\n<p class="versions">Executed with Python {python_version()}, {names}.</p>\n'


def on_env(env: object, *, config: MkDocsConfig, files: Files) -> None:
    """Report a failing block of the README; its text stays as it is."""
    try:
        session.execute(_readme())
    except PageError as error:
        _fail(str(error))


def on_post_build(*, config: MkDocsConfig) -> None:
    texts = []
    for page in pages:
        text = with_docstrings(executed_pages[page.file.src_uri].markdown, session)
        texts.append(PageText(page.title or "", page.file.src_uri, text))
    for name, text in llms_files(config.site_name, config.site_description or "", texts).items():
        path = Path(config.site_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def _shown(error: PageError) -> Executed:
    """Stop the build, or give the page that a server shows until the error is mended."""
    _fail(str(error))
    message = str(error).replace("\n", "\n    ")
    return Executed(f"!!! failure\n\n    ~~~~ text\n    {message}\n    ~~~~\n")


def _fail(message: str) -> None:
    # A server must live on: it shows the error, and the page again once the error is mended.
    if not serving:
        raise PluginError(message)
    log.error(message)
