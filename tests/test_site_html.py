"""The built site, file by file, without a browser."""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from tests.site_server import PAGES, ROOT, SITE, SOURCE_OF, base, file_at, local_file

pytestmark = pytest.mark.usefixtures("built_site")

every_page = pytest.mark.parametrize("name", [*PAGES, "404.html"])
HOST = "http://site"
ADDRESS_ATTRIBUTES = ("href", "src", "data", "poster")
CSS_ADDRESS = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s]+)""")
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def parse(file: Path) -> BeautifulSoup:
    return BeautifulSoup(file.read_text("utf-8"), "html.parser")


def page_file(name: str) -> Path:
    return file_at(base() + name)


def text_of(name: str) -> str:
    """Give the address of a page's Markdown, which is that of its source."""
    source = SOURCE_OF[name]
    if source.suffix == ".py":
        return f"tutorials/{source.stem}.md"
    if source.name == "CHANGELOG.md":
        return "changelog.md"
    return source.relative_to(ROOT / "docs").as_posix()


def is_broken(address: str, source: str) -> bool:
    """Tell whether an address on the page or in the file `source` leads nowhere."""
    url = urlsplit(urljoin(f"{HOST}{base()}{source}", address))
    if f"{url.scheme}://{url.netloc}" != HOST:
        return False
    file = local_file(url.path)
    if not url.path.startswith(base()) or not file.is_file():
        return True
    if not url.fragment or file.suffix != ".html":
        return False
    return not parse(file).find(id=unquote(url.fragment))


def test_pages_are_those_that_have_a_source():
    built = {file.relative_to(SITE) for file in SITE.rglob("*.html")}
    assert built == {page_file(name).relative_to(SITE) for name in [*PAGES, "404.html"]}


@every_page
def test_links_lead_somewhere(name):
    page = parse(page_file(name))
    addresses = [
        tag[attribute]
        for attribute in ADDRESS_ATTRIBUTES
        for tag in page.find_all(attrs={attribute: True})
    ]
    assert len(addresses) > 10
    assert not [address for address in addresses if is_broken(address, name)]


def test_links_of_stylesheets_lead_somewhere():
    sheets = list(SITE.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        source = sheet.relative_to(SITE).as_posix()
        addresses = CSS_ADDRESS.findall(sheet.read_text("utf-8"))
        assert not [address for address in addresses if is_broken(address, source)], source


def test_what_search_finds_is_there():
    entries = json.loads((SITE / "search/search_index.json").read_text("utf-8"))["docs"]
    assert len(entries) > len(PAGES)
    assert not [entry["location"] for entry in entries if is_broken(entry["location"], "")]


@pytest.mark.parametrize("name", ["llms.txt", *map(text_of, PAGES)])
def test_links_for_programs_lead_somewhere(name):
    text = (SITE / name).read_text("utf-8")
    assert not [address for address in MARKDOWN_LINK.findall(text) if is_broken(address, name)]


@every_page
def test_headings_skip_no_level(name):
    headings = parse(page_file(name)).find("article").find_all(re.compile("^h[1-6]$"))
    assert [heading.name for heading in headings].count("h1") == 1
    assert headings[0].name == "h1"
    assert not [
        heading.text
        for before, heading in pairwise(headings)
        if int(heading.name[1]) > int(before.name[1]) + 1
    ]


@every_page
def test_page_has_a_title_and_a_description(name):
    page = parse(page_file(name))
    assert page.title.string.strip()
    assert page.find("meta", attrs={"name": "description"})["content"].strip()


def test_titles_differ():
    titles = [parse(page_file(name)).title.string for name in PAGES]
    assert len(set(titles)) == len(titles)


@every_page
def test_images_have_an_alternative_text(name):
    images = parse(page_file(name)).find_all("img")
    assert not [image for image in images if not image.get("alt", "").strip()]


@every_page
def test_code_blocks_carry_their_language(name):
    for block in parse(page_file(name)).find_all("pre"):
        assert any(kind.startswith("language-") for kind in block.parent["class"]), block


@every_page
def test_plain_code_has_no_elements(name):
    words = parse(page_file(name)).select("code :is(.n, .o, .p, .w):not(:has(*))")
    assert not words
