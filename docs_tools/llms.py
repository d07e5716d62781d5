"""The site as Markdown, for programs that read it: see https://llmstxt.org."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_DARK_FIGURE = re.compile(r" !\[[^\n]*?\]\(\S+#only-dark\)\{[^}\n]*\}")
_ATTRIBUTES = re.compile(
    r"(#only-light\)|^(?:`{3,}|~{3,}))[ \t]*\{ \.?(\w*)[^}\n]*\}", re.MULTILINE
)

_LINK = re.compile(r"\]\([^)\s:]+\)")
_SCRIPT = re.compile(r"\.py(?=[#)]|$)")


@dataclass(frozen=True)
class PageText:
    """A page's title, its source among the pages, and its Markdown with all outputs."""

    title: str
    source: str
    markdown: str

    @property
    def file(self) -> str:
        """Where its text is on the site, so that the links between sources hold there too."""
        return _SCRIPT.sub(".md", self.source)

    @property
    def text(self) -> str:
        """The Markdown without what only the site's style understands."""

        def plain(match: re.Match[str]) -> str:
            return ")" if match[1].endswith(")") else match[1] + match[2]

        text = _ATTRIBUTES.sub(plain, _DARK_FIGURE.sub("", self.markdown))
        return _LINK.sub(lambda match: _SCRIPT.sub(".md", match[0]), text).strip() + "\n"


def llms_files(name: str, description: str, pages: Sequence[PageText]) -> dict[str, str]:
    """Give the files by name: each page, `llms.txt` that lists them, and all pages in one."""
    listed = "".join(f"- [{page.title}]({page.file})\n" for page in pages)
    head = f"# {name}\n\n> {description}\n\n"
    return {
        **{page.file: page.text for page in pages},
        "llms.txt": f"{head}All code on these pages is executed when they are built.\n\n{listed}",
        "llms-full.txt": "\n".join(page.text for page in pages),
    }
