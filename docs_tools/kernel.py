"""Run the blocks of a page, in order, in one fresh Python process."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from docs_tools.blocks import Block, PageError

Output = dict[str, Any]
"""One output of a block, in the form that nbformat gives it."""

SECONDS_PER_BLOCK = 900
TERMINAL_WIDTH = 100
DARK_FIGURES = Path(__file__).with_name("dark_figures.py")
# Many pages compile the same functions, such as the training of the same network.
KEEP_WHAT_IS_COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Read while another page writes it, an entry is compiled again. A page need not say so.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache",
}
# The kernel replaces `input` anew for each block. TensorFlow remembers the addresses of built-in
# functions when it is imported, and takes what comes to lie at a freed one for a built-in function:
# now and then a method failed with "'TfMethodTarget' object has no attribute ...".
KEEP_INPUT = "setattr(get_ipython().kernel, 'raw_input', get_ipython().kernel.raw_input)"
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class _ThisPython(KernelSpecManager):
    """Start kernels with the running interpreter, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        options = [
            "--InlineBackend.figure_formats={'retina'}",
            # What C++ code logs goes to the terminal; Python's warnings stay on the page.
            "--IPKernelApp.capture_fd_output=False",
            f"--IPKernelApp.exec_lines=exec(open({str(DARK_FIGURES)!r}).read(), {{}})",
            f"--IPKernelApp.exec_lines={KEEP_INPUT}",
            # TensorFlow leaves so many objects that looking for garbage takes a tenth of the time.
            "--IPKernelApp.exec_lines=__import__('gc').set_threshold(100_000, 50, 100)",
        ]
        command = make_ipkernel_cmd(extra_arguments=options)
        return KernelSpec(argv=command, language="python", display_name=kernel_name)


def run_blocks(
    blocks: Sequence[Block],
    page: str,
    first_line: int = 1,
    progress: Callable[[str], object] = print,
) -> list[list[Output]]:
    """Give the outputs of each block, or raise `PageError` for the first one that fails."""
    notebook = new_notebook()
    with TemporaryDirectory() as folder:
        manager = AsyncKernelManager(
            kernel_spec_manager=_ThisPython(),
            transport="ipc",
            connection_file=f"{folder}/kernel.json",
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=SECONDS_PER_BLOCK,
            shutdown_kernel="immediate",  # Python takes seconds to clear TensorFlow away
        )
        # An empty IPython folder keeps the user's own configuration out of the kernel, and tables
        # are as wide in every terminal that the site is built from.
        environment = os.environ | KEEP_WHAT_IS_COMPILED
        environment |= {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "IPYTHONDIR": folder,
            "COLUMNS": str(TERMINAL_WIDTH),
        }
        with client.setup_kernel(env=environment, cwd=folder, cleanup_kc=True):
            for index, block in enumerate(blocks):
                line = block.first + first_line
                progress(f"{page}: running block {index + 1} of {len(blocks)} (line {line})")
                # Blank lines before the code give it the line numbers of the Markdown file. IPython
                # would strip them if nothing stood before them.
                cell = new_code_cell("#" + "\n" * line + block.code)
                notebook.cells.append(cell)
                error = None
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as raised:
                    error = raised
                except CellTimeoutError:
                    message = f"this block ran for more than {SECONDS_PER_BLOCK} seconds"
                    raise PageError(page, line, message) from None
                except DeadKernelError:
                    raise PageError(page, line, "Python died in this block") from None
                _check_error(error, cell.outputs, block, page, line)
    return [cell.outputs for cell in notebook.cells]


def _check_error(
    error: CellExecutionError | None,
    outputs: Sequence[Output],
    block: Block,
    page: str,
    line: int,
) -> None:
    expected = block.options.get("raises")
    if error is None:
        if expected:
            raise PageError(page, line, f"expected {expected}, but this block raised nothing")
        return
    shown = [output for output in outputs if output["output_type"] == "error"]
    if error.ename == expected and shown:
        return
    # An exception that IPython fails to format comes with neither an output nor a traceback.
    traceback = COLOURS.sub("", "\n".join(shown[0]["traceback"] if shown else [error.evalue]))
    in_this_block = re.findall(r"Cell In\[\d+\], line (\d+)", traceback)
    in_this_block = [
        int(n) for n in in_this_block if line < int(n) < line + block.last - block.first
    ]
    wanted = f", but {expected} is expected" if expected else ""
    if error.ename == expected:
        wanted = ", as expected, but it cannot be shown"
    traceback = re.sub(r"Cell In\[\d+\]", page, traceback)
    raise PageError(
        page,
        in_this_block[-1] if in_this_block else line,
        f"this block raised {error.ename}{wanted}\n\n{traceback}",
    )
