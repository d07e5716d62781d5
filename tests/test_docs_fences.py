"""Every fence of the documentation is run, parsed, or listed here with a reason."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml

from docs_tools.blocks import find_blocks
from docs_tools.docstrings import docstrings_with_blocks
from docs_tools.percent import to_markdown
from tests.clean_environment import (
    PACKAGE,
    ROOT,
    activated,
    copy_checkout,
    install,
    is_install,
    resolve,
    run,
)
from tests.fences import Fence, all_fences, fences_in, markdown_pages, tutorials

FENCES = all_fences()

# What nothing runs or parses: page, language, first line. Whatever is not listed has to be run.
LISTED = {
    ("docs/contributing.md", "markdown", "```python"): "how a block is written",
    ("docs/contributing.md", "markdown", '```python alt="A line that rises from 0 to 3."'): (
        "how a block that shows a figure is written"
    ),
    ("docs/contributing.md", "markdown", '```python output="markdown"'): (
        "how a block that prints Markdown is written"
    ),
    ("docs/contributing.md", "markdown", '```python raises="ZeroDivisionError"'): (
        "how a block that fails on purpose is written; the same block is run below it"
    ),
}

# Commands of bash fences that are not run.
NOT_RUN = {
    "make test": "it is what runs this test",
}

# Install lines that are resolved with what the registry has, but not carried out.
RESOLVED = {
    'pip install xplique-flax "jax[cuda12]"': "several GB for a GPU that the tests do not have",
}

PARSERS = {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}
EXECUTED = ("python", "bash", *PARSERS)
SECONDS_TO_START = 900
"""For a server that first has to execute the pages; seconds, if their outputs are kept."""


def python_fences(text: str, page: str) -> int:
    return sum(fence.language == "python" for fence in fences_in(text, page))


@pytest.mark.parametrize("page", markdown_pages())
def test_executor_finds_every_python_fence_of_a_page(page):
    text = markdown_pages()[page]
    assert len(find_blocks(text, page)) == python_fences(text, page)


@pytest.mark.parametrize("page", tutorials())
def test_executor_finds_every_cell_of_a_tutorial(page):
    script = tutorials()[page]
    cells = re.findall(r"^# ?%%(?! \[markdown\]$)", script, re.MULTILINE)
    fences = [fence for fence in FENCES if (fence.page, fence.language) == (page, "python")]
    assert len(find_blocks(to_markdown(script, page), page)) == len(cells) + len(fences)


def test_executor_finds_every_python_fence_of_the_docstrings():
    fences = [f for f in FENCES if f.page.startswith("xplique_flax") and f.language == "python"]
    documents = docstrings_with_blocks(ROOT)
    found = [block for doc in documents for block in find_blocks(doc.markdown, doc.name)]
    assert len(found) == len(fences) > 0


def test_nothing_looks_like_a_prompt():
    """What is typed into an interpreter or a terminal stands in a fence that is run."""
    texts = markdown_pages() | tutorials()
    texts |= {str(path): path.read_text("utf-8") for path in ROOT.glob("xplique_flax/*.py")}
    for name, text in texts.items():
        assert not re.findall(r"^[ \t#>]*(?:>>> |\$ |In \[\d).*", text, re.MULTILINE), name


def test_every_other_fence_is_listed():
    others = Counter(
        (fence.page, fence.language, fence.first_line)
        for fence in FENCES
        if fence.language not in EXECUTED
    )
    assert others == Counter(LISTED.keys())


def test_configuration_can_be_parsed():
    for fence in FENCES:
        if fence.language in PARSERS:
            assert PARSERS[fence.language](fence.code), fence


def commands(fence: Fence) -> list[str]:
    """Give the commands of a fence, without comments; a line that ends in `\\` goes on."""
    lines = re.sub(r"\\\n\s*", "", fence.code).split("\n")
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


BASH = [fence for fence in FENCES if fence.language == "bash"]


def test_commands_that_are_treated_otherwise_are_on_a_page():
    assert {*NOT_RUN, *RESOLVED} <= {command for fence in BASH for command in commands(fence)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fence", BASH, ids=str)
def test_commands_run(fence, built_site, distributions, tmp_path):
    """Run the commands of a fence, in order: of a clone in a copy of it, others in no folder."""
    environment, folder, checkout = (tmp_path / name for name in ("new", "empty", "checkout"))
    folder.mkdir()
    if PACKAGE not in fence.code:
        folder = checkout
        copy_checkout(checkout)
        run("git init --quiet && git add --all", Path(sys.prefix), checkout)
        # Another environment of ours would take minutes. For `make` this one is up to date.
        (checkout / ".venv").symlink_to(sys.prefix)
        for name in ("requirements-cpu.txt", "pyproject.toml"):
            os.utime(checkout / name, (0, 0))
    for command in commands(fence):
        if command in NOT_RUN:
            continue
        if command in RESOLVED:
            resolve(command, environment, distributions, folder)
        elif is_install(command):
            install(command, environment, distributions, folder)
        elif "serve" in shlex.split(command):
            serve(command)
        else:
            assert ".venv/bin/pip" not in command, "this would change the borrowed environment"
            run(command, environment if environment.exists() else Path(sys.prefix), folder)


def serve(command: str) -> None:
    """Start a server on a free port, ask it for the home page, and stop it.

    It runs in the checkout, where the outputs of the pages are kept, and changes no file of it.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    if "mkdocs" in command:
        command += f" --dev-addr {address}"
    command = re.sub(r"\bADDRESS=\S+", f"ADDRESS={address}", command)
    server = subprocess.Popen(
        ["bash", "-euc", command],
        cwd=ROOT,
        env=activated(Path(sys.prefix), {"ADDRESS": address}),
        start_new_session=True,
    )
    try:
        assert "FlaxWrapper" in fetch(f"http://{address}/", server)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def fetch(url: str, server: subprocess.Popen) -> str:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            with urlopen(url) as response:
                return response.read().decode()
        except URLError:
            time.sleep(0.5)
    raise TimeoutError(url)
