"""The hook that has MkDocs execute its pages."""

import logging
from pathlib import Path

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
            f"site_name: Test\nstrict: true\nplugins: []\nhooks: ['{HOOK}']\n"
            "markdown_extensions:\n"
            "  - admonition\n  - attr_list\n  - pymdownx.superfences\n"
            "  - pymdownx.snippets: {restrict_base_path: false}\n"
            "  - pymdownx.highlight: {pygments_lang_class: true}\n",
        )

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

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
    (figure,) = (site.folder / "site" / "assets" / "figures").iterdir()
    assert f'<img alt="A line" class="output" src="../../assets/figures/{figure.name}"' in page
    assert 'class="language-text no-copy output highlight"' in page
    assert "README.md: running block 1 of 1 (line 1)" in caplog.text


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


def test_python_that_was_not_executed_stops_the_build(site, caplog):
    site.write("included.txt", "```python\n1 + 1\n```\n")
    site.write("docs/guide/page.md", f"# Page\n\n--8<-- '{site.folder}/included.txt'\n")
    with pytest.raises(SystemExit):
        site.build()
    assert "docs/guide/page.md shows 1 Python blocks, but 0 were executed" in caplog.text


def test_commented_out_block_is_neither_run_nor_counted(site):
    site.write("docs/guide/page.md", "# Page\n\n<!--\n```python\n1 / 0\n```\n-->\n\nText\n")
    assert "<p>Text</p>" in site.build()
