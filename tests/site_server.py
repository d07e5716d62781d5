"""The built site: its folder, its pages, and a server that does what a site's host does."""

import fcntl
import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
SOURCES = ("docs", "docs_tools", "examples", "xplique_flax")
SOURCE_FILES = ("mkdocs.yml", "CHANGELOG.md", "README.md")


def _sources() -> dict[str, Path]:
    """Give the source of each page by the page's address, which is relative to the site's."""
    docs = {path.relative_to(ROOT / "docs"): path for path in ROOT.glob("docs/**/*.md")}
    tutorials = {Path("tutorials", path.name): path for path in ROOT.glob("examples/*.py")}
    changelog = {Path("changelog.md"): ROOT / "CHANGELOG.md"}
    return {
        re.sub(r"^\./|index/$", "", f"{page.with_suffix('').as_posix()}/"): source
        for page, source in sorted((docs | tutorials | changelog).items())
    }


SOURCE_OF = _sources()
PAGES = list(SOURCE_OF)


def build_if_stale() -> None:
    """Build the site as `make build` does, unless it is newer than all that it is made of."""
    lock = ROOT / ".cache" / "site.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)  # several workers of pytest come here at once
        if _is_stale():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
            subprocess.run(command, cwd=ROOT, check=True)


def _is_stale() -> bool:
    built = SITE / "sitemap.xml"
    files = [ROOT / name for name in SOURCE_FILES]
    for folder in SOURCES:
        files += [file for file in (ROOT / folder).rglob("*") if file.is_file()]
    newest = max(file.stat().st_mtime for file in files if file.suffix != ".pyc")
    return not built.exists() or built.stat().st_mtime < newest


def base() -> str:
    """Give the path below which the site expects to be served, `/` unless `site_url` has one."""
    return re.search(r'"base": "([^"]*)"', (SITE / "404.html").read_text("utf-8"))[1]


def file_at(path: str) -> Path:
    """Give the file that is served at this path, which begins with `base()`; it may not exist."""
    return SITE / re.sub("(^|/)$", r"\1index.html", unquote(path).removeprefix(base()))


def local_file(url: str) -> Path:
    return file_at(urlsplit(url).path)


@contextmanager
def serve() -> Iterator[str]:
    """Serve the site on a free port, and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{base()}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = local_file(self.path)
        found = file.is_file()
        kind = self.guess_type(str(file if found else "404.html"))
        body = file.read_bytes() if found else (SITE / "404.html").read_bytes()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "max-age=600")
        if not kind.startswith("image/") or kind.endswith("svg+xml"):
            self.send_header("Content-Encoding", "gzip")
            body = _compressed(body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


_compressed = cache(gzip.compress)
