"""The page that shows what `make bench` measured."""

import json

import pytest

from benchmarks.growth import GROWN
from benchmarks.methods import INSIDE, METRICS, methods
from benchmarks.networks import NETWORKS
from docs_tools.benchmark import GROUPS, NAMES, RESULTS, with_benchmark
from tests.clean_environment import ROOT

ROWS = {
    "Saliency": {
        "xplique_flax": 0.02,
        "native Keras": 0.01,
        "jax2tf": 0.08,
        "in model calls": 0.006,
        "JAX in place": 0.005,
        "pure JAX": 0.004,
    },
    "GradCAM": {"xplique_flax": 0.03, "native Keras": 0.06},
}


@pytest.fixture
def root(tmp_path):
    file = tmp_path / RESULTS
    file.parent.mkdir()
    found = {"seconds": 1.234, "MB": 56.7, "later MB": 4.3}
    alone = {"cnn": {"Rise": {"xplique_flax": found}}}
    growth = {"Saliency, images": {"4": {"xplique_flax": 0.0123}, "16": {"xplique_flax": 2.5432}}}
    results = {"machine": {"cores": "2"}, "networks": {"cnn": ROWS}, "alone": alone}
    results["growth"] = growth
    file.write_text(json.dumps(results), "utf-8")
    return tmp_path


def test_tables_show_ratios(root):
    markdown, figures = with_benchmark("Before\n\n<!-- benchmark: tables -->\n", root, "")
    assert figures == {}
    assert markdown.splitlines() == [
        "Before",
        "",
        "### Small convolutional network",
        "",
        "| Method | ms | native Keras | jax2tf | JAX in place | pure JAX |",
        "| :-- | --: | --: | --: | --: | --: |",
        "| Saliency | 20.0 | 2.00 | 0.25 | 1.20 | 1.50 |",
        "| GradCAM | 30.0 | 0.50 | – | – | – |",
    ]


def test_first_calls(root):
    markdown, _ = with_benchmark("<!-- benchmark: first_calls -->", root, "")
    assert markdown.splitlines() == [
        "Small convolutional network:",
        "",
        "| Method | xplique_flax |",
        "| :-- | --: |",
        "| Rise | 1.23&nbsp;s<br>57&nbsp;MB<br>4&nbsp;MB |",
    ]


def test_growth(root):
    markdown, _ = with_benchmark("<!-- benchmark: growth -->", root, "")
    assert markdown.splitlines() == [
        "Saliency, images:",
        "",
        "| Size | xplique_flax |",
        "| --: | --: |",
        "| 4 | 12.3 |",
        "| 16 | 2543 |",
    ]


def test_machine(root):
    markdown, _ = with_benchmark("<!-- benchmark: machine -->", root, "")
    assert markdown == "| What | Value |\n| :-- | :-- |\n| cores | 2 |"


def test_figure_has_a_dark_twin(root):
    markdown, figures = with_benchmark("<!-- benchmark: figure -->", root, "../figures/")
    assert len(set(figures.values())) == len(figures) == 2
    assert all(content.startswith(b"\x89PNG") for content in figures.values())
    for name in figures:
        assert f"](../figures/{name}#only-" in markdown


def test_other_pages_stay_as_they_are(tmp_path):
    assert with_benchmark("# Page\n", tmp_path, "") == ("# Page\n", {})


def test_unknown_part_is_refused(root):
    with pytest.raises(ValueError, match="no benchmark 'tabels'"):
        with_benchmark("<!-- benchmark: tabels -->", root, "")


def test_every_method_is_in_a_group():
    grouped = " ".join(GROUPS.values()).split()
    assert sorted(grouped) == sorted(methods((8, 8, 1), 8))
    assert set(GROUPS["Inner layers"].split()) == set(INSIDE)
    assert set(GROUPS["Metrics"].split()) == set(METRICS)
    assert set(NAMES) == set(NETWORKS)


def test_published_results_have_every_tool():
    results = json.loads((ROOT / RESULTS).read_text("utf-8"))
    wanted = {"xplique_flax", "native Keras", "jax2tf", "FlaxLayer", "eager", "TorchWrapper"}
    assert set(results["alone"]) <= set(results["networks"]) == set(NETWORKS)
    assert set(results["growth"]) == set(GROWN)
    for rows in results["networks"].values():
        for method, row in rows.items():
            assert method in INSIDE or wanted <= set(row)
