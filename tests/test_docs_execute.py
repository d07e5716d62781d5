"""The executor of the documentation's pages, without MkDocs."""

import re
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs_tools import cache as cache_module
from docs_tools import kernel
from docs_tools.blocks import PageError, find_blocks
from docs_tools.cache import Cache, state_of
from docs_tools.execute import Executed, execute
from docs_tools.weave import weave

PLOT = "import matplotlib.pyplot as plt\nplt.plot([0, 1])\nplt.show()"


def python(code: str, options: str = "", indent: str = "") -> str:
    lines = [f"```python{options}", *code.split("\n"), "```"]
    return "\n".join(indent + line for line in lines)


def failure(markdown: str, **arguments) -> PageError:
    with pytest.raises(PageError) as caught:
        execute(markdown, "page.md", progress=lambda _: None, **arguments)
    return caught.value


def runs(markdown: str, cache: Cache | None = None) -> tuple[int, str]:
    """Give how many blocks were really run, and the page."""
    said: list[str] = []
    page = execute(markdown, "page.md", cache=cache, progress=said.append)
    return sum("running" in line for line in said), page.markdown


@pytest.fixture(scope="module")
def page() -> Executed:
    """Execute a page that has a bit of everything."""
    return execute(
        "\n".join(
            [
                "Start.",
                python("x = 20\nprint('hello')\nx + 1"),
                "Middle.",
                python("x *= 2\nprint('\\x1b[31mred\\x1b[0m', x)"),
                "!!! note",
                "",
                python("if x:\n\n    print(x + 2)", indent="    "),
                "",
                "- item",
                "",
                "    ~~~py",
                "    x + 3",
                "    ~~~",
                "",
                "> " + python("x + 4").replace("\n", "\n> "),
                "",
                python("import warnings\nwarnings.warn('careful')"),
                python("print('1/2\\r2/2')\nprint('```')"),
                python(PLOT, ' alt="A [rising] line"'),
                python("int('x')", ' raises="ValueError"'),
                python("silent = 1", ' title="Silent"'),
                "End.",
            ]
        ),
        "page.md",
        figure_folder="../figures/",
        progress=lambda _: None,
    )


def shown_after(page: Executed, code: str) -> str:
    """Give the output that stands under the block that ends in this line of code."""
    after = page.markdown.split(f"{code}\n", 1)[1]
    return re.split(r"^[ >]*(?:```|~~~)$", after, maxsplit=2, flags=re.MULTILINE)[1]


def test_output_stands_under_its_block_and_blocks_share_one_process(page):
    assert shown_after(page, "x + 1") == "\n\n``` { .text .no-copy .output }\nhello\n21\n"
    assert page.markdown.index("hello") < page.markdown.index("Middle.")
    assert "\nred 40\n" in page.markdown
    assert page.markdown.startswith("Start.\n```python\nx = 20\n")
    assert page.markdown.endswith('```python title="Silent"\nsilent = 1\n```\n\nEnd.')
    assert len(page.blocks) == 10


@pytest.mark.parametrize(
    ("code", "prefix", "output"),
    [("    print(x + 2)", "    ", "42"), ("x + 3", "    ", "43"), ("x + 4", "> ", "44")],
)
def test_indented_blocks_are_found_and_their_output_is_indented(page, code, prefix, output):
    wanted = f"{prefix}``` {{ .text .no-copy .output }}\n{prefix}{output}\n"
    assert wanted in shown_after(page, code)


def test_warnings_are_shown_without_the_path_of_a_temporary_file(page):
    shown = shown_after(page, "warnings.warn('careful')")
    assert ".output .stderr }\nUserWarning: careful" in shown
    assert "ipykernel" not in page.markdown


def test_overwritten_text_is_dropped_and_backticks_are_fenced(page):
    assert "```` { .text .no-copy .output }\n2/2\n```\n````" in page.markdown


def test_figure_has_a_name_by_content_alternative_text_and_a_dark_twin(page):
    shown = shown_after(page, "plt.show()")
    for (name, content), scheme in zip(page.figures.items(), ("light", "dark"), strict=True):
        assert content.startswith(b"\x89PNG")
        assert re.search(
            rf"!\[A \\\[rising\\\] line\]\(\.\./figures/{name}#only-{scheme}\)"
            r"\{ \.output loading=lazy width=\d+ height=\d+ \}",
            shown,
        )


def test_dark_figure_has_light_ink_on_no_ground_and_the_same_data(page):
    light, dark = (np.array(Image.open(BytesIO(png))) for png in page.figures.values())
    assert light.shape == dark.shape
    assert (light[0, 0] == 255).all()
    assert dark[0, 0, 3] == 0  # transparent
    black = (light[..., :3] == 0).all(-1)
    assert black.sum() > 1000
    assert (dark[black][:, :3] > 200).all()
    blue = (light[..., :3] == (31, 119, 180)).all(-1)
    assert blue.sum() > 1000
    assert (dark[blue][:, :3] == (31, 119, 180)).all()


def test_legend_is_legible_on_a_dark_page():
    code = PLOT.replace("[0, 1])", "[0, 1], label='long label')\nplt.legend()")
    figures = execute(python(code, ' alt="A"'), "page.md", progress=lambda _: None).figures
    dark = np.array(Image.open(BytesIO(list(figures.values())[1])))
    white = (dark[..., :3] == 255).all(-1) & (dark[..., 3] > 0)
    assert not white.any()  # the ink is less bright than that


def test_expected_error_is_shown_and_marked(page):
    assert "``` { .python .raises-ValueError }\nint('x')\n```" in page.markdown
    shown = shown_after(page, "int('x')")
    assert ".output .error }\nValueError: invalid literal for int() with base 10: 'x'" in shown


def test_long_output_is_folded():
    printed = python("print(*range(40), sep='\\n')")
    folded = execute(printed, "page.md", progress=lambda _: None).markdown
    assert (
        '??? abstract "Output: 40 lines"\n\n    ``` { .text .no-copy .output }\n    0\n' in folded
    )


def test_printed_markdown_can_be_a_table_of_the_page():
    printed = python("print('| a |\\n| - |\\n| 1 |')", ' output="markdown"')
    page = execute(printed, "page.md", progress=lambda _: None).markdown
    assert page.endswith("```\n\n| a |\n| - |\n| 1 |\n")


def test_each_page_has_a_process_of_its_own():
    assert "NameError" in failure(python("x")).message


@pytest.mark.parametrize(
    ("figures", "options", "message"),
    [
        (["a"], "", "describe it"),
        (["a"], ' alt=" "', "describe it"),
        ([], ' alt="Nothing"', "shows no figure"),
        (["a", "b"], ' alt="Two"', "more than one figure"),
    ],
)
def test_figure_and_alternative_text_go_together(figures, options, message):
    (block,) = find_blocks(python("plot()", options), "page.md")
    outputs = [
        {"output_type": "display_data", "data": {"image/png": b64encode(name.encode())}}
        for name in figures
    ]
    with pytest.raises(PageError, match=f"^page.md:2: .*{message}"):
        weave(outputs, block, "", "page.md", 2)


def test_failing_block_names_page_and_line():
    markdown = "\n".join(["Text", python("1"), python("def f():\n    return 1 / 0"), python("f()")])
    error = failure(markdown, first_line=11)
    assert str(error).startswith("page.md:20: this block raised ZeroDivisionError")
    assert "page.md, line 17, in f" in error.message
    assert "Cell In" not in error.message


def test_failing_line_of_an_indented_block_is_named():
    block = python("\n\na = 1\nb", indent="    ")
    assert failure(f"Text\n\n{block}").line == 7


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\nos._exit(1)", "Python died in this block"),
        ("import time\ntime.sleep(60)", "ran for more than 2 seconds"),
    ],
)
def test_block_that_never_ends_or_kills_its_process_is_named(monkeypatch, code, message):
    monkeypatch.setattr(kernel, "SECONDS_PER_BLOCK", 2)
    error = failure(f"Text\n{python('1')}\n{python(code)}")
    assert error.line == 5
    assert message in error.message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1", "expected ValueError, but this block raised nothing"),
        ("{}[1]", "raised KeyError, but ValueError is expected"),
    ],
)
def test_block_must_raise_what_it_promises(code, message):
    error = failure("\n" + python(code, ' raises="ValueError"'))
    assert message in error.message
    assert error.line in (2, 3)


@pytest.mark.parametrize("options", ["", ' raises="ZeroDivisionError"'])
def test_exception_that_cannot_be_formatted_is_no_success(options):
    spoil = """from IPython.core.ultratb import AutoFormattedTB
AutoFormattedTB.structured_traceback = lambda *args, **kwargs: 1 / 0"""
    error = failure(f"{python(spoil)}\n{python('1 / 0', options)}")
    assert error.line == 5
    assert "this block raised ZeroDivisionError" in error.message


def test_what_jax_compiled_is_kept_and_half_of_it_is_compiled_again(monkeypatch, tmp_path):
    folder = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    monkeypatch.setattr(kernel, "KEEP_WHAT_IS_COMPILED", kernel.KEEP_WHAT_IS_COMPILED | folder)
    code = "import jax\n\nprint(jax.jit(lambda x: 3 * x)(2.0))"
    _, compiled = runs(python(code))
    kept = list(tmp_path.iterdir())
    assert kept and "6.0" in compiled
    for entry in kept:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert runs(python(code))[1] == compiled


def test_built_in_functions_are_the_same_in_each_block():
    first = "import builtins\n\nbefore = list(vars(builtins).values())"
    second = "print(all(any(old is new for new in vars(builtins).values()) for old in before))"
    assert "True" in runs(python(first) + "\n\n" + python(second))[1]


def test_tables_are_as_wide_in_every_terminal(monkeypatch):
    code = "import shutil\nprint(shutil.get_terminal_size().columns)"
    monkeypatch.setenv("COLUMNS", "33")
    assert "\n100\n" in execute(python(code), "page.md").markdown


@pytest.mark.parametrize(
    ("markdown", "line", "message"),
    [
        ("```pycon\n>>> 1\n```", 1, "cannot read `pycon`"),
        ("\n``` { .python }\n1\n```", 2, "cannot read"),
        ("```python skip\n1\n```", 1, "cannot read"),
        ('```python execute="no"\n1\n```', 1, "cannot read"),
        ('```python output="html"\n1\n```', 1, "accepted is 'markdown'"),
        ("```Python\n1\n```", 1, "cannot read"),
        ("Text\n```python\n1", 2, "never closed"),
        ("Text\n```text\n1", 2, "never closed"),
        ("    ```python\n    1\n  2\n    ```", 3, "indented less"),
        ("```python\n1\n(2\n```", 3, "SyntaxError"),
        ("```python\n%timeit 1\n```", 2, "SyntaxError"),
        ("```python\n!ls\n```", 2, "SyntaxError"),
    ],
)
def test_what_could_not_be_run_is_refused(markdown, line, message):
    error = failure(markdown)
    assert (error.page, error.line) == ("page.md", line)
    assert message in error.message


def test_only_blocks_that_a_reader_sees_as_python_are_run():
    markdown = "\n".join(
        [
            f"````markdown\n{python('no')}\n````",
            "```text\n~~~python\nno\n~~~\n```",
            f"<!-- a comment\n{python('no')}\n-->",
            f"<!-- a --> text <!-- b -->\n{python('yes')}",
            "Inline ```python``` too.",
            python("yes"),
        ]
    )
    assert [block.code for block in find_blocks(markdown, "page.md")] == ["yes", "yes"]


@pytest.fixture
def sources(tmp_path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "module.py").write_text("a = 1")
    return folder


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs"


def test_outputs_are_kept_until_code_or_sources_change(sources, outputs):
    text = f"Text\n{python('print(6 * 7)')}"
    kept = Cache(outputs, state_of([sources]))
    assert runs(text, kept)[0] == 1

    number, page = runs(text.replace("Text", "# Other\n\ntext"), kept)
    assert number == 0
    assert page.startswith("# Other\n\ntext\n```python")
    assert "\n42\n" in page

    number, page = runs(text.replace("7", "8"), kept)
    assert number == 1
    assert "\n48\n" in page

    (sources / "module.py").write_text("a = 2")
    assert runs(text, Cache(outputs, state_of([sources])))[0] == 1
    assert runs(text, Cache(outputs, state_of([sources])))[0] == 0


def test_state_follows_files_and_packages(sources, monkeypatch):
    states = {state_of([sources])}
    (sources / "new.py").write_text("")
    states.add(state_of([sources]))
    (sources / "new.py").rename(sources / "renamed.py")
    states.add(state_of([sources]))
    before = state_of([sources])
    (sources / "__pycache__").mkdir()
    (sources / "__pycache__" / "module.pyc").write_text("")
    assert state_of([sources]) == before
    cache_module._installed_packages.cache_clear()
    monkeypatch.setattr(cache_module, "distributions", list)
    states.add(state_of([sources]))
    cache_module._installed_packages.cache_clear()
    assert len(states) == 4


def test_what_a_block_promises_is_part_of_what_is_kept(outputs):
    kept = Cache(outputs, "state")
    raising = python("1 / 0", ' raises="ZeroDivisionError"')
    runs(raising, kept)
    for _ in range(2):  # nor is a failure kept
        assert "raised ZeroDivisionError" in failure(python("1 / 0"), cache=kept).message
