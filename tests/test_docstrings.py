"""The examples of the public docstrings are run."""

import doctest

import pytest

from xplique_flax import FlaxWrapper

EXAMPLES = [
    test for test in doctest.DocTestFinder().find(FlaxWrapper, "FlaxWrapper") if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example):
    assert doctest.DocTestRunner().run(example).failed == 0


def test_examples_are_found():
    assert {"FlaxWrapper", "FlaxWrapper.truncate"} <= {example.name for example in EXAMPLES}
