"""Environments as readers have them: the built package and what it requires, no tool of ours."""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs_tools.kernel import TERMINAL_WIDTH

ROOT = Path(__file__).parents[1]
PACKAGE = "xplique-flax"
UV_BUILD = (sys.executable, "-m", "uv", "build", "--quiet", "--offline", "--no-build-isolation")
OPTIONS_WITH_VALUE = ("-c", "--constraint", "-r", "--requirement", "--override", "--overrides")
METADATA = ("METADATA", "WHEEL", "INSTALLER", "entry_points.txt", "top_level.txt")


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Make what is to stand at `path`, for all workers of pytest and in one go."""
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(path.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
    return path


def copy_checkout(folder: Path) -> None:
    """Copy the files that git has, or would add: no built file, no environment."""
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def build(source: Path, folder: Path, *options: str) -> None:
    """Build the sdist of `source`, and from it the wheel, with the pinned build backend."""
    command = [*UV_BUILD, "--python", sys.executable, "--out-dir", folder, *options, source]
    subprocess.run(command, check=True)


def is_install(line: str) -> bool:
    return bool(re.match(r"(python -m )?(uv )?pip install ", line))


def install(line: str, folder: Path, wheels: Path, cwd: Path) -> None:
    """Run a line of a page that installs something, as it stands, in an environment of its own.

    pip or uv resolves and installs as it does for a reader, with these differences, which spare
    hundreds of megabytes at each run: the package is found in `wheels` rather than in the registry,
    and what it and the other names require is there already, in the versions of our pins. Nothing
    else can be had.
    """
    if not folder.exists():
        create(folder)
    uv = [Requirement("uv")] if "uv pip" in line else []
    provide([*requirements(line), *uv], folder, cuda=bool(uv))
    options = {
        "PIP_QUIET": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "0",  # means that it is *not* isolated: pip's own reading
        "UV_QUIET": "1",
        "UV_OFFLINE": "1",
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": str(wheels),
        "UV_NO_BUILD_ISOLATION": "1",
    }
    run(line, folder, cwd, options)


def resolve(line: str, folder: Path, wheels: Path, cwd: Path) -> None:
    """Let an install line be resolved with what the registry has, without installing anything."""
    create(folder)
    provide([Requirement(PACKAGE), Requirement("uv")], folder, cuda=True)
    options = {"PIP_QUIET": "1", "PIP_FIND_LINKS": str(wheels), "UV_FIND_LINKS": str(wheels)}
    # uv reads some kilobytes of each package, but not pip's configuration: as in the Makefile, pip
    # comes second, which downloads the packages.
    dry = line.replace("pip install", "pip install --dry-run")
    run(f"python -m uv {dry} || {dry}", folder, cwd, options)


def create(environment: Path) -> None:
    venv.create(environment, with_pip=True)
    # The build backend is pinned too; Python 3.11 brings an older one.
    run("python -m pip uninstall --quiet --yes setuptools", environment, environment)


def run(command: str, environment: Path, cwd: Path, variables: Mapping[str, str] = {}) -> None:
    """Run a command in a shell in which this environment is active."""
    shell = ["bash", "-euc", command]
    subprocess.run(shell, cwd=cwd, env=activated(environment, variables), check=True)


def activated(environment: Path, variables: Mapping[str, str]) -> dict[str, str]:
    unwanted = ("PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    path = f"{environment}/bin:{os.environ['PATH']}"
    return kept | {"VIRTUAL_ENV": str(environment), "PATH": path, **variables}


def requirements(line: str) -> list[Requirement]:
    """Give what an install line asks for; a lone dot is the package."""
    words = shlex.split(line)
    words = words[words.index("install") + 1 :]
    names = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not word.startswith("-") and before not in OPTIONS_WITH_VALUE
    ]
    return [Requirement(PACKAGE if name == "." else name) for name in names]


def provide(required: Iterable[Requirement], environment: Path, *, cuda: bool) -> None:
    """Put what these packages require, and what is not the package itself, into an environment.

    They are links to the packages of the running environment. The lists of their files are left
    out, so that no installer can remove the files.

    On Linux Xplique asks for tensorflow[and-cuda], several GB, which the running environment does
    without. Unless `cuda` says so, TensorFlow has no such extra here either: the only thing of a
    reader's environment that is missing.
    """
    (packages,) = environment.glob("lib/python*/site-packages")
    found = closure(required)
    found.pop(PACKAGE, None)
    for name, package in found.items():
        for entry in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            source, target = Path(package.locate_file(entry)), packages / entry
            if entry.endswith(".dist-info"):
                target.mkdir(exist_ok=True)
                for file in METADATA:
                    if (source / file).exists():
                        shutil.copyfile(source / file, target / file)
            elif not target.exists():
                target.symlink_to(source)
        if name == "tensorflow" and not cuda:
            (metadata,) = packages.glob("tensorflow-*.dist-info/METADATA")
            text = metadata.read_text("utf-8")
            metadata.write_text(re.sub(r"(?m)^Requires-Dist: nvidia-.*\n", "", text), "utf-8")
    if "uv" in found and not (executable := environment / "bin" / "uv").exists():
        executable.symlink_to(Path(sys.prefix, "bin", "uv"))


def closure(required: Iterable[Requirement]) -> dict[str, Distribution]:
    """Give these packages and all that they require, except for TensorFlow's extras."""
    found: dict[str, Distribution] = {}
    seen = set()
    pending = list(required)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        extras = frozenset({"", *requirement.extras} if name != "tensorflow" else {""})
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = distribution(name)
        for needed in map(Requirement, found[name].requires or ()):
            marker = needed.marker
            if not marker or any(marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(needed)
    return found


def run_blocks(environment: Path, blocks: Iterable[str], cwd: Path) -> list[dict[str, str]]:
    """Run blocks of code, in order, in an empty interpreter; give what each of them shows."""
    done = subprocess.run(
        [environment / "bin" / "python", "-I", Path(__file__).with_name("run_as_reader.py")],
        input=json.dumps(list(blocks)),
        stdout=subprocess.PIPE,
        env=activated(
            environment,
            # Keras cuts its tables off at the width of the terminal.
            {"MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": str(TERMINAL_WIDTH)},
        ),
        cwd=cwd,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.rstrip("\n").rpartition("\n")[2])
