"""Run blocks of code as a reader's interpreter does; needs nothing but Python.

`python -I run_as_reader.py` reads a JSON list of blocks from standard input. The last line that it
writes is the list of what each of them printed, and of the exception that ended it.
"""

import ast
import contextlib
import io
import json
import sys
import traceback
import types


def run(code: str, namespace: dict) -> dict[str, str]:
    *statements, last = ast.parse(code).body
    parts = [compile(ast.Module(statements, []), "<block>", "exec")]
    # The interpreter shows the value of an expression.
    if isinstance(last, ast.Expr):
        parts.append(compile(ast.Interactive([last]), "<block>", "single"))
    else:
        parts.append(compile(ast.Module([last], []), "<block>", "exec"))
    error = ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            for part in parts:
                exec(part, namespace)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()
    return {"printed": printed.getvalue(), "error": error}


if __name__ == "__main__":
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    results = [run(block, main.__dict__) for block in json.load(sys.stdin)]
    print(f"\n{json.dumps(results)}")
