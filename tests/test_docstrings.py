"""The public docstrings have examples; the build of the documentation executes them."""

from pathlib import Path

import pytest

from docs_tools.docstrings import docstrings_with_blocks
from docs_tools.execute import execute

EXAMPLES = docstrings_with_blocks(Path(__file__).parents[1])


def test_the_class_and_its_own_method_have_examples():
    names = " ".join(document.name for document in EXAMPLES)
    for name in ("xplique_flax.wrapper.FlaxWrapper)", "xplique_flax.wrapper.FlaxWrapper.truncate)"):
        assert name in names


@pytest.mark.parametrize("document", EXAMPLES, ids=lambda document: document.name)
def test_what_an_example_checks_holds(document):
    page = execute(document.markdown, document.name, first_line=document.first_line)
    printed = "".join(output["text"] for outputs in page.outputs for output in outputs)
    assert "True" in printed
    assert "False" not in printed
