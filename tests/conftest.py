"""What several test modules share."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import clean_environment, site_server

TESTS = Path(__file__).parent


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test that is marked `alone` while no other worker runs one."""
    if not hasattr(item.config, "workerinput"):  # the only worker, or one that a test has started
        return (yield)
    with in_turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def in_turn(alone: bool) -> Iterator[None]:
    """Lock two folders: the first keeps others from starting, the second is held while one runs."""
    starting, running = (os.open(folder, os.O_RDONLY) for folder in (TESTS, TESTS / "browser"))
    try:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield
    finally:
        os.close(starting)
        os.close(running)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what the tests have measured."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
