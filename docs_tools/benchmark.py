"""What `make bench` measured, as the tables and the figure of a page."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results.json")
OURS, MODEL = "xplique_flax", "in model calls"
BY_JAX = ("JAX in place", "pure JAX")
NAMES = {
    "cnn": "Small convolutional network",
    "resnet": "ResNet-50",
    "mlp": "Perceptron on a table",
    "vit": "Small vision transformer",
}
GROUPS = {
    "Gradients": "Saliency GradientInput IntegratedGradients SmoothGrad SquareGrad VarGrad",
    "Perturbations": "Occlusion Rise SobolAttributionMethod HsicAttributionMethod Lime KernelShap",
    "Metrics": "Deletion Insertion MuFidelity",
    "Inner layers": "GradCAM GradCAMPP FEM GuidedBackprop DeconvNet",
}
INKS = {"light": "black", "dark": "#dcdee5"}
ALT = (
    "Bars for each network and each group of methods: the time of xplique_flax, divided by that of "
    "each other tool, as a geometric mean. The tables below give the ratios for each method."
)
_FIRST_CALL = "{seconds:.2f}&nbsp;s<br>{MB:.0f}&nbsp;MB<br>{later MB:.0f}&nbsp;MB"
_DIRECTIVE = re.compile(r"^<!-- benchmark: (\w+) -->$", re.MULTILINE)

Row = Mapping[str, float]
Rows = Mapping[str, Row]


def with_benchmark(markdown: str, root: Path, folder: str) -> tuple[str, dict[str, bytes]]:
    """Put the tables and the figure where the page names them; give the figure's files too."""
    if not _DIRECTIVE.search(markdown):
        return markdown, {}
    results = json.loads((root / RESULTS).read_text("utf-8"))
    figures: dict[str, bytes] = {}

    def replaced(match: re.Match[str]) -> str:
        if match[1] == "machine":
            return _machine(results["machine"])
        if match[1] == "tables":
            return "\n\n".join(
                f"### {NAMES[name]}\n\n{_table(rows)}" for name, rows in results["networks"].items()
            )
        if match[1] == "first_calls":
            return "\n\n".join(
                f"{NAMES[name]}:\n\n{_first_calls(rows)}" for name, rows in results["alone"].items()
            )
        if match[1] == "growth":
            return "\n\n".join(
                f"{what}:\n\n{_growth(rows)}" for what, rows in results["growth"].items()
            )
        if match[1] == "figure":
            for page, ink in INKS.items():
                figures[f"benchmark-{page}.png"] = _drawn(results["networks"], ink)
            return " ".join(f"![{ALT}]({folder}benchmark-{page}.png#only-{page})" for page in INKS)
        raise ValueError(f"There is no benchmark {match[1]!r}")

    return _DIRECTIVE.sub(replaced, markdown), figures


def _machine(machine: Mapping[str, str]) -> str:
    return "\n".join(
        ["| What | Value |", "| :-- | :-- |", *(f"| {k} | {v} |" for k, v in machine.items())]
    )


def _others(rows: Rows) -> list[str]:
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return [name for name in names if name not in (OURS, MODEL, *BY_JAX)]


def _table(rows: Rows) -> str:
    others = _others(rows)
    head = ["Method", "ms", *others, *BY_JAX]
    lines = [_line(head), _line([":--", *["--:"] * (len(head) - 1)])]
    for method, row in rows.items():
        ratios = [row[OURS] / row[name] if name in row else None for name in others]
        ratios += [row[MODEL] / row[name] if name in row else None for name in BY_JAX]
        shown = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(_line([method, _milliseconds(row[OURS]), *shown]))
    return "\n".join(lines)


def _first_calls(rows: Mapping[str, Mapping[str, Row]]) -> str:
    tools = list(next(iter(rows.values())))
    lines = [_line(["Method", *tools]), _line([":--", *["--:"] * len(tools)])]
    for method, row in rows.items():
        found = [row[tool] for tool in tools]
        cells = [_FIRST_CALL.format(**each) for each in found]
        lines.append(_line([method, *cells]))
    return "\n".join(lines)


def _growth(rows: Rows) -> str:
    tools = list(next(iter(rows.values())))
    lines = [_line(["Size", *tools]), _line(["--:"] * (len(tools) + 1))]
    for size, row in rows.items():
        lines.append(_line([size, *(_milliseconds(row[tool]) for tool in tools)]))
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1}f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _means(rows: Rows) -> Iterator[tuple[str, str, float]]:
    """Give the geometric mean of the ratios for each group of methods and each tool."""
    for group, methods in GROUPS.items():
        for tool in _others(rows):
            ratios = [
                rows[method][OURS] / rows[method][tool]
                for method in methods.split()
                if tool in rows.get(method, ())
            ]
            if ratios:
                yield group, tool, math.exp(sum(map(math.log, ratios)) / len(ratios))


def _drawn(networks: Mapping[str, Rows], ink: str) -> bytes:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(names, ink) | {"legend.framealpha": 0}
    file = io.BytesIO()
    with matplotlib.rc_context(style):
        _figure(networks, ink).savefig(file, format="png", dpi=160, transparent=True)
    return file.getvalue()


def _figure(networks: Mapping[str, Rows], ink: str) -> Figure:
    tools = list(dict.fromkeys(tool for rows in networks.values() for tool in _others(rows)))
    figure = Figure(figsize=(9, 2.3 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for axis, (name, rows) in zip(axes, networks.items(), strict=True):
        means = list(_means(rows))
        for index, tool in enumerate(tools):
            found = {group: mean for group, other, mean in means if other == tool}
            places = [
                list(GROUPS).index(group) + (index - len(tools) / 2) * 0.16 for group in found
            ]
            # A bar is a distance from 1: shorter than 1 downwards, longer upwards.
            heights = [mean - 1 for mean in found.values()]
            axis.bar(places, heights, 0.14, bottom=1, label=tool, align="edge")
        axis.axhline(1, color=ink, linewidth=0.8)
        axis.set_xticks(range(len(GROUPS)), list(GROUPS))
        axis.set_yscale("log", base=2)
        axis.set_yticks([0.0625, 0.125, 0.25, 0.5, 1, 2], ["1/16", "1/8", "1/4", "1/2", "1", "2"])
        axis.set_ylim(0.045, 2.5)
        axis.set_xlim(-0.6, len(GROUPS) - 0.4)
        axis.set_title(NAMES[name], loc="left")
        axis.set_ylabel("ratio of times")
    axes[0].legend(ncols=len(tools), fontsize="small", loc="upper right")
    return figure
