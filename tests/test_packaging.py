"""The wheel and the sdist: what is in them, and that a clean environment can use them."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.requirements import Requirement

from docs_tools.blocks import find_blocks
from tests.clean_environment import ROOT, build, copy_checkout, run_blocks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# What a reader has no use for. That these are absent shows that the tests below prove something.
TOOLS = ("IPython", "ipykernel", "jupytext", "material", "mkdocs", "nbclient", "pytest", "tests")


@pytest.fixture
def wheel(distributions) -> Path:
    (path,) = distributions.glob("*.whl")
    assert path.name == f"xplique_flax-{PROJECT['version']}-py3-none-any.whl"
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_has_the_package_and_nothing_else(wheel):
    information = f"xplique_flax-{PROJECT['version']}.dist-info"
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "xplique_flax").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    expected |= {
        f"{information}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")
    }
    assert "xplique_flax/py.typed" in expected
    assert set(contents(wheel)) == expected


def test_sdist_has_what_builds_the_wheel(distributions):
    (path,) = distributions.glob("*.tar.gz")
    root = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "xplique_flax/py.typed"} <= names
    assert not {name for name in names if name.startswith(("docs", "examples", "site", "tests"))}


def test_checkout_gives_the_wheel_that_the_sdist_gives(wheel, tmp_path):
    copy_checkout(tmp_path / "checkout")
    build(tmp_path / "checkout", tmp_path, "--wheel")
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_metadata(wheel):
    (text,) = (data for name, data in contents(wheel).items() if name.endswith("/METADATA"))
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.name == PROJECT["name"]
    assert str(metadata.version) == PROJECT["version"]
    assert metadata.license_expression == "MIT"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text("utf-8")
    assert set(metadata.requires_dist) == set(map(Requirement, PROJECT["dependencies"]))


def test_environment_of_a_reader_has_no_tool_of_ours(reader, tmp_path):
    code = f"""
import importlib.util, xplique_flax
assert xplique_flax.__file__.startswith({str(reader)!r}), xplique_flax.__file__
found = [name for name in {TOOLS!r} if importlib.util.find_spec(name)]
assert not found, found
"""
    subprocess.run([reader / "bin/python", "-I", "-c", code], cwd=tmp_path, check=True)


def test_requirements_are_met(reader):
    subprocess.run([reader / "bin/python", "-I", "-m", "pip", "check"], check=True)


def test_quickstart_of_the_readme(reader, tmp_path):
    blocks = find_blocks((ROOT / "README.md").read_text("utf-8"), "README.md")
    results = run_blocks(reader, [block.code for block in blocks], tmp_path)
    assert not any(result["error"] for result in results)
    assert "Accuracy on held-out digits: 9" in results[0]["printed"]


@pytest.mark.parametrize(
    ("tag", "heading", "accepted"),
    [
        (f"v{PROJECT['version']}", f"## [{PROJECT['version']}] - 2000-01-01", True),
        (f"v{PROJECT['version']}", "## [Unreleased]", False),
        ("v1000", f"## [{PROJECT['version']}]", False),
    ],
)
def test_release_workflow_compares_tag_version_and_changelog(tag, heading, accepted, tmp_path):
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text("utf-8"))
    (step,) = (step for step in workflow["jobs"]["build"]["steps"] if "changelog" in str(step))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n", "utf-8")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    shell = ["bash", "-e", "-c", step["run"]]  # as GitHub does
    done = subprocess.run(shell, cwd=tmp_path, env=os.environ | {"GITHUB_REF_NAME": tag})
    assert (done.returncode == 0) == accepted
