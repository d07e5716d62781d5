"""What several test modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clean_environment, site_server


@pytest.fixture(scope="session")
def built_site() -> None:
    """Have the documentation built."""
    site_server.build_if_stale()


@pytest.fixture(scope="session")
def site_address(built_site) -> Iterator[str]:
    """Serve the documentation."""
    with site_server.serve() as address:
        yield address


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> Path:
    """Build the sdist and, from it, the wheel: once for all workers."""

    def make(folder: Path) -> None:
        source = tmp_path_factory.mktemp("checkout")
        clean_environment.copy_checkout(source)
        clean_environment.build(source, folder)

    return clean_environment.once(shared_by_workers(tmp_path_factory) / "distributions", make)


@pytest.fixture(scope="session")
def reader(tmp_path_factory, distributions) -> Path:
    """Make the environment that the install line of the README gives to a reader."""

    def make(folder: Path) -> None:
        line = "pip install xplique-flax optax"
        assert f"\n{line}\n" in (clean_environment.ROOT / "README.md").read_text("utf-8")
        clean_environment.install(line, folder, distributions, distributions)

    return clean_environment.once(shared_by_workers(tmp_path_factory) / "reader", make)


def shared_by_workers(tmp_path_factory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what the tests have measured."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
