"""The hook that has MkDocs execute its pages."""

import logging
import re
import shutil
from pathlib import Path
from platform import python_version

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

HOOK = Path(__file__).parents[1] / "docs_tools" / "mkdocs_hook.py"
PLOT = """```python alt="A line"
import matplotlib.pyplot as plt
plt.plot([0, 1])
plt.show()
```
"""


class Site:
    """A small project with a home page, a page in a folder and a README."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("xplique_flax/__init__.py", "")
        self.write("README.md", "```python\n'readme'\n```\n")
        self.write("docs/index.md", "# Home\n\n[Page](guide/page.md)\n")
        self.write("docs/guide/page.md", "# Page\n")
        self.write(
            "mkdocs.yml",
            f"site_name: Test\nstrict: true\nhooks: ['{HOOK}']\n"
            "plugins:\n"
            "  - mkdocs-jupyter: {include: [examples/*.py], include_source: true, cache: false}\n"
            "markdown_extensions:\n"
            "  - admonition\n  - attr_list\n  - pymdownx.superfences\n"
            "  - pymdownx.arithmatex: {generic: true}\n"
            "  - pymdownx.snippets: {restrict_base_path: false}\n"
            "  - pymdownx.highlight: {pygments_lang_class: true}\n",
        )

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def with_mkdocstrings(self) -> None:
        plugin = (
            "plugins:\n  - mkdocstrings: {handlers: {python: {options: "
            "{show_source: false, extensions: [docs_tools.docstrings.ExecuteExamples]}}}}\n"
        )
        configuration = (self.folder / "mkdocs.yml").read_text("utf-8")
        self.write("mkdocs.yml", configuration.replace("plugins:\n", plugin))

    def build(self, command: str = "build") -> str:
        """Build as `mkdocs build --strict` or `mkdocs serve --no-strict`; give the inner page."""
        config = load_config(str(self.folder / "mkdocs.yml"), strict=command == "build")
        config.plugins.on_startup(command=command, dirty=False)
        build(config)
        return (self.folder / "site" / "guide" / "page" / "index.html").read_text("utf-8")


@pytest.fixture
def site(tmp_path, caplog) -> Site:
    caplog.set_level(logging.INFO)
    return Site(tmp_path)


def test_outputs_and_figures_are_part_of_the_site(site, caplog):
    site.write("docs/guide/page.md", f"# Page\n\n{PLOT}\n```python\n40 + 2\n```\n")
    page = site.build()
    figures = list((site.folder / "site" / "assets" / "figures").iterdir())
    assert len(figures) == 2
    for figure in figures:
        assert re.search(
            f'<img alt="A line" class="output"[^>]*src="../../assets/figures/{figure.name}#only-',
            page,
        )
    assert 'class="language-text no-copy output highlight"' in page
    assert "README.md: running block 1 of 1 (line 1)" in caplog.text
    assert f"Executed with Python {python_version()}, xplique-flax " in page


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("docs/guide/page.md", "---\ntitle: Page\n---\n\nText\n\n```python\n1\n1 / 0\n```\n", 9),
        ("README.md", "```python\n1 / 0\n```\n", 2),
    ],
)
def test_failing_block_stops_the_build(site, caplog, name, text, line):
    site.write(name, text)
    with pytest.raises(SystemExit):
        site.build()
    assert f"{name}:{line}: this block raised ZeroDivisionError" in caplog.text


def test_server_shows_the_error_until_it_is_mended(site):
    site.write("docs/guide/page.md", "# Page\n\n```python\nprint(1 / 0)\n```\n")
    assert "docs/guide/page.md:4: this block raised ZeroDivisionError" in site.build("serve")
    site.write("docs/guide/page.md", "# Page\n\n```python\nprint(1 / 8)\n```\n")
    assert "0.125" in site.build("serve")


TUTORIAL = """# %% [markdown]
# # Tutorial
#
# To [the page](../guide/page.md#page), and $x^2$.
#
# !!! note "Mind"
#
#     A note.
#
# After.

# %%
a = 40


def f():
    return a + 2


# %% alt="A line"
import matplotlib.pyplot as plt

print(f())
plt.plot([0, 1])
plt.show()
"""


def test_tutorial_is_a_page_a_script_and_an_executed_notebook(site):
    site.write("examples/one.py", TUTORIAL)
    site.build()
    folder = site.folder / "site" / "tutorials" / "one"
    page = (folder / "index.html").read_text("utf-8")
    assert '<p class="admonition-title">Mind</p>' in page
    assert '<a href="../../guide/page/#page">the page</a>' in page
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in page
    assert '<a href="one.py" download>script</a>' in page
    assert '<a href="one.ipynb" download>executed notebook</a>' in page
    assert (folder / "one.py").read_text("utf-8") == TUTORIAL
    notebook = nbformat.read(folder / "one.ipynb", 4)
    text, first, second = notebook.cells
    assert text.source.endswith("To the page, and $x^2$.\n\n> **Mind**\n>\n> A note.\n\nAfter.")
    assert first.source == "a = 40\n\n\ndef f():\n    return a + 2\n"
    assert second.outputs[0].text == "42\n"
    assert set(second.outputs[1].data) == {"image/png", "text/plain"}


def test_failing_line_of_a_tutorial_is_that_of_its_script(site, caplog):
    site.write("examples/one.py", TUTORIAL.replace("a + 2", "a + b"))
    with pytest.raises(SystemExit):
        site.build()
    assert "examples/one.py:23: this block raised NameError" in caplog.text


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("x = 1\n", "examples/one.py:1: a tutorial begins with `# %%`"),
        ("# %% [markdown]\n# Text\nx\n", "examples/one.py:3: a line of a text cell begins with"),
        ("# %%\nx = 1\n# %%\n1\n", "examples/one.py:2: a blank line is missing"),
        ("# %% skip\n1\n", "examples/one.py:1: cannot read `python skip`"),
    ],
)
def test_script_that_cannot_be_read_stops_the_build(site, caplog, script, message):
    site.write("examples/one.py", script)
    with pytest.raises(SystemExit):
        site.build()
    assert message in caplog.text


def running(caplog) -> list[str]:
    """Give the documents of which blocks were run since the last time."""
    found = re.findall(r"(\S+): running block", caplog.text)
    caplog.clear()
    return sorted(set(found))


def test_only_what_changed_is_executed_again(site, caplog):
    everything = ["README.md", "docs/guide/page.md", "docs/index.md", "examples/one.py"]
    home, page = "# Home\n\n```python\n1\n```\n", "# Page\n\n```python\n2\n```\n"
    site.write("docs/index.md", home)
    site.write("docs/guide/page.md", page)
    site.write("examples/one.py", TUTORIAL)
    site.build()
    assert running(caplog) == everything

    site.write("docs/index.md", home.replace("# Home", "# Home\n\nMore prose."))
    site.build()
    assert running(caplog) == []

    site.write("docs/guide/page.md", page.replace("2", "3"))
    site.build()
    assert running(caplog) == ["docs/guide/page.md"]

    site.write("xplique_flax/__init__.py", "changed = True")
    site.build()
    assert running(caplog) == everything


def test_two_builds_give_the_same_site(site, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # MkDocs's own theme shows the time

    def contents() -> dict[str, bytes]:
        site.build()
        folder = site.folder / "site"
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    site.write("docs/guide/page.md", f"# Page\n\n{PLOT}")
    site.write("examples/one.py", TUTORIAL)
    before = contents()
    shutil.rmtree(site.folder / ".cache")
    after = contents()
    assert [name for name in before if before[name] != after.get(name)] == []
    assert {"llms.txt", "llms-full.txt", "tutorials/one/one.ipynb"} <= set(before)


def test_site_is_given_as_markdown_too(site):
    site.write("docs/guide/page.md", f"# Page\n\n{PLOT}\n```python\n'shown'\n```\n")
    site.build()
    folder = site.folder / "site"
    assert "- [Page](guide/page.md)\n" in (folder / "llms.txt").read_text("utf-8")
    page = (folder / "guide" / "page.md").read_text("utf-8")
    assert re.search(r"plt\.show\(\)\n```\n\n!\[A line\]\(\S+\.png\)\n\n", page)
    assert "```text\n'shown'\n```" in page
    assert page in (folder / "llms-full.txt").read_text("utf-8")


def test_docstrings_and_changelog_are_given_as_markdown_too(site):
    site.write(
        "xplique_flax/__init__.py",
        'class Adder:\n    """Add.\n\n    ```python\n    20 + 1\n    ```\n    """\n\n'
        "    def __init__(self, first: int = 0):\n        pass\n\n"
        '    def add(self, second: int):\n        """Do it."""\n\n'
        '    def other(self):\n        """Leave it."""\n',
    )
    site.write("CHANGELOG.md", "# Changelog\n\nAll is new.\n")
    site.write(
        "docs/guide/page.md",
        "# Page\n\n::: xplique_flax.Adder\n    options:\n      members: [add]\n",
    )
    site.with_mkdocstrings()
    site.build()
    page = (site.folder / "site" / "guide" / "page.md").read_text("utf-8")
    assert "## `Adder(first: int = 0)`\n\nAdd.\n\n```python\n20 + 1\n```" in page
    assert "21" in page
    assert "## `add(second: int)`\n\nDo it." in page
    assert "Leave it" not in page
    for name in ("changelog.md", "changelog/index.html"):
        assert "All is new." in (site.folder / "site" / name).read_text("utf-8")


def test_examples_of_docstrings_are_executed(site, caplog):
    site.write(
        "xplique_flax/__init__.py",
        'def f():\n    """Do.\n\n    ```python\n    1 / 0\n    ```\n    """\n',
    )
    site.write("docs/guide/page.md", "# Page\n\n::: xplique_flax.f\n")
    site.with_mkdocstrings()
    with pytest.raises(SystemExit):
        site.build()
    assert "xplique_flax/__init__.py:5: this block raised ZeroDivisionError" in caplog.text


def test_python_that_was_not_executed_stops_the_build(site, caplog):
    site.write("included.txt", "```python\n1 + 1\n```\n")
    site.write("docs/guide/page.md", f"# Page\n\n--8<-- '{site.folder}/included.txt'\n")
    with pytest.raises(SystemExit):
        site.build()
    assert "guide/page.md shows 1 Python blocks, but 0 were executed" in caplog.text


def test_commented_out_block_is_neither_run_nor_counted(site):
    site.write("docs/guide/page.md", "# Page\n\n<!--\n```python\n1 / 0\n```\n-->\n\nText\n")
    assert "<p>Text</p>" in site.build()


def test_no_page_asks_the_host_of_the_repository_for_its_numbers(site):
    theme = HOOK.with_name("theme")
    site.write(
        "mkdocs.yml",
        f"{(site.folder / 'mkdocs.yml').read_text('utf-8')}"
        f"repo_url: https://github.com/owner/name\n"
        f"theme: {{name: material, custom_dir: '{theme}', font: false}}\n",
    )
    page = site.build()
    assert 'href="https://github.com/owner/name" title="Go to repository"' in page
    assert 'data-md-component="source"' not in page
