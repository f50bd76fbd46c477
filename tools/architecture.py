"""docs/architecture.svg: the pipeline, the packages and what they import, drawn from dvc.yaml and the code.

python -m tools.architecture

Where a box stands is said here. What is in it, and the arrows between boxes, are read from the code.
"""

import ast
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ruamel.yaml import YAML

PICTURE = Path("docs/architecture.svg")
FOLDERS = ("gpt2", "stages", "space", "benchmarks", "tools")
# From top to bottom, the left and the right edge of each box. An arrow may only point down.
PROGRAMS: tuple[dict[str, tuple[int, int]], ...] = (
    {"tools/": (276, 464), "benchmarks/": (480, 820)},
    {"stages/": (0, 440), "space/": (456, 590), "python -m gpt2": (606, 766)},
)
LIBRARY: tuple[dict[str, tuple[int, int]], ...] = (
    {"gpt2/hub/": (416, 516)},
    {"gpt2/distributed/": (0, 166), "gpt2/evaluation/": (182, 520), "gpt2/planning/": (664, 820)},
    {"gpt2/training/": (0, 340), "gpt2/inference/": (470, 770)},
    {"gpt2/kernels/": (540, 770)},
    {"gpt2/optimizers/": (0, 150), "gpt2/data/": (166, 408), "gpt2/model/": (424, 770)},
    {"gpt2/": (0, 820)},
)
# Each stage, what it makes from what, where that is, the left and the right edge of its box, and its line.
PIPELINE = (
    ("", "", "text", "file or URL", 0, 100, 0),
    ("fetch", "text", "corpus", "data/corpus.txt", 152, 276, 0),
    ("tokenize", "corpus", "tokens", "data/tokens/", 356, 456, 0),
    ("train", "tokens", "model", "models/", 510, 582, 0),
    ("evaluate", "model", "report", "reports/evaluate/", 684, 820, 0),
    ("export-to-space", "model", "Space", "dist/space/", 684, 820, 1),
)
WIDTH, MARGIN, PADDING = 820, 32, 16
PIPELINE_TOP, PIPELINE_LINE = 32, 66
CHANNEL = 44
"""Height between two rows, for the arrows."""
CLEARANCE = 14
"""Least distance of an arrow from the ends of a box, and from boxes that it passes."""
CHARACTER_PX = 7.25
STYLE = """
text {font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1d2939}
.heading {font-size: 15px; font-weight: 600; fill: #475467}
.note {font-size: 12.5px; fill: #475467}
.name {font-size: 14px; font-weight: 600}
.modules {font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; fill: #344054}
.stage {font-size: 13px; font-weight: 600; fill: #9a3412; text-anchor: middle}
.middle {text-anchor: middle}
.band {fill: #f2f4f7}
.program {fill: #e0e7ff; stroke: #6172f3}
.library {fill: #d5f5f0; stroke: #15938a}
.thing {fill: #fff4e5; stroke: #dc6803}
.arrow {fill: none; stroke: #475467; stroke-width: 1.5; marker-end: url(#head)}
"""


@dataclass(frozen=True)
class Box:
    """A rectangle. row: its number, from the top."""

    row: int
    left: int
    right: int
    top: int
    bottom: int


def package_of(path: Path) -> str | None:
    """The box that a module belongs to. None for gpt2/__init__.py, which imports nothing before a name is used."""
    if path.as_posix() == "gpt2/__init__.py":
        return None
    if path.as_posix() == "gpt2/__main__.py":
        return "python -m gpt2"
    if path.parts[0] == "gpt2":
        return f"{Path(*path.parent.parts[:2]).as_posix()}/"
    return f"{path.parts[0]}/"


def modules() -> dict[str, list[Path]]:
    """The modules of each box."""
    found: dict[str, list[Path]] = {}
    for folder in FOLDERS:
        for path in sorted(Path(folder).rglob("*.py")):
            if (package := package_of(path)) is not None:
                found.setdefault(package, []).append(path)
    return found


def imported(path: Path) -> Iterator[Path]:
    """The modules of this repository that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in FOLDERS:
                base = Path(*name.split("."))
                yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


def imports(boxes: Mapping[str, list[Path]]) -> dict[str, set[str]]:
    """The packages that each package imports."""
    found = {}
    for package, paths in boxes.items():
        others = {package_of(other) for path in paths for other in imported(path)}
        found[package] = {other for other in others if other is not None} - {package}
    return found


def reduced(direct: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Imports without those that a package also reaches by way of another one. There must be no circles."""

    def reached(package: str) -> set[str]:
        return direct[package].union(*(reached(other) for other in direct[package]))

    return {
        package: {other for other in others if not any(other in reached(via) for via in others)}
        for package, others in direct.items()
    }


def label(package: str, paths: list[Path], width: int) -> list[str]:
    """The lines in a box: the names of its modules; packages inside it have theirs in brackets."""
    names: dict[str, list[str]] = {}
    for path in paths:
        *_, name = parts = path.relative_to(package if package.endswith("/") else "gpt2").with_suffix("").parts
        if name != "__init__":
            names.setdefault(parts[0], []).extend(parts[1:])
    fits = int((width - 24) / CHARACTER_PX)
    items = [f"{name}/({', '.join(inside)})" if inside else name for name, inside in names.items()]
    # brackets stay on one line, if it is long enough
    text = ", ".join(item.replace(" ", "\xa0") if len(item) <= fits else item for item in items)
    return textwrap.wrap(text, fits, break_long_words=False, break_on_hyphens=False)


def draw_text(x: float, y: float, kind: str, text: str) -> str:
    """A line of text; y is its baseline."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def draw_box(box: Box, kind: str, name: str, lines: list[str]) -> Iterator[str]:
    """A box with its name and the modules in it."""
    width, height = box.right - box.left, box.bottom - box.top
    yield f'<rect class="{kind}" x="{box.left}" y="{box.top}" width="{width}" height="{height}" rx="7"/>'
    if name:
        yield draw_text(box.left + 12, box.top + 22, "name", name)
    for number, line in enumerate(lines):
        yield draw_text(box.left + 12, box.top + 42 + 17 * number, "modules", line)


def free(span: tuple[float, float], between: list[Box]) -> list[tuple[float, float]]:
    """The parts of a range of x where nothing is in the way of a vertical line."""
    parts = [span]
    for box in between:
        left, right = box.left - CLEARANCE, box.right + CLEARANCE
        parts = [
            piece
            for start, end in parts
            for piece in ((start, min(end, left)), (max(start, right), end))
            if piece[0] <= piece[1]
        ]
    return parts


def route(source: Box, target: Box, boxes: list[Box]) -> str:
    """The path of an arrow: a vertical line where that is possible, else one with a bend above the target."""
    between = [box for box in boxes if source.row < box.row < target.row]
    left, right = max(source.left, target.left) + CLEARANCE, min(source.right, target.right) - CLEARANCE
    if straight := free((left, right), between) if left <= right else []:
        start, end = max(straight, key=lambda part: part[1] - part[0])
        return f"M{(start + end) / 2:g} {source.bottom}V{target.top}"
    below = free((source.left + CLEARANCE, source.right - CLEARANCE), between)
    if not below:
        raise SystemExit("an arrow has no room: give the boxes other edges in tools/architecture.py")
    to_the_right = target.left > source.left
    start = max(part[1] for part in below) if to_the_right else min(part[0] for part in below)
    end = target.left + CLEARANCE if to_the_right else target.right - CLEARANCE
    bend = max([source.bottom, *(box.bottom for box in between)])
    middle = (bend + target.top) / 2
    return f"M{start:g} {source.bottom}V{bend}C{start:g} {middle:g} {end:g} {middle - 8:g} {end:g} {target.top}"


def draw_pipeline() -> Iterator[str]:
    """The stages of dvc.yaml as arrows between what they make. Raises SystemExit if dvc.yaml has others."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    if list(stages) != [stage for stage, *_ in PIPELINE if stage]:
        raise SystemExit("dvc.yaml has other stages than tools/architecture.py draws")
    yield draw_text(0, 14, "heading", "The pipeline: dvc repro runs the stages whose inputs changed")
    boxes: dict[str, Box] = {}
    for stage, made_from, name, place, left, right, line in PIPELINE:
        top = PIPELINE_TOP + PIPELINE_LINE * line
        box = boxes[name] = Box(0, left, right, top, top + 48)
        yield from draw_box(box, "thing", "", [])
        yield draw_text((left + right) / 2, top + 20, "name middle", name)
        yield draw_text((left + right) / 2, top + 38, "modules middle", place)
        if not stage:
            continue
        outs = [out if isinstance(out, str) else next(iter(out)) for out in stages[stage]["outs"]]
        if not any(f"{out}/".startswith(place) or out == place for out in outs):
            raise SystemExit(f"dvc.yaml: {stage} does not write {place}")
        source, start = boxes[made_from], boxes[made_from].right
        if top == source.top:
            yield f'<path class="arrow" d="M{start} {top + 24}H{left}"/>'
        else:
            start = (source.left + source.right) // 2
            yield f'<path class="arrow" d="M{start} {source.bottom}V{top + 24}H{left}"/>'
        yield draw_text((start + left - 6) / 2, top + 17, "stage", stage)
    report, space = boxes["report"], boxes["Space"]  # the model card has the scores
    yield f'<path class="arrow" d="M{(report.left + report.right) / 2:g} {report.bottom}V{space.top}"/>'


def draw_legend(x: int, y: int) -> Iterator[str]:
    """What an arrow means."""
    yield f'<path class="arrow" d="M{x + 8} {y}V{y + 34}"/>'
    yield draw_text(x + 26, y + 13, "note", "imports; what a package also reaches")
    yield draw_text(x + 26, y + 30, "note", "by way of another one is left out")


def place(lines: Mapping[str, list[str]]) -> tuple[dict[str, Box], list[tuple[int, int]]]:
    """The box of each package, and top and bottom of the two bands behind them."""
    boxes: dict[str, Box] = {}
    bands = []
    y, row = PIPELINE_TOP + PIPELINE_LINE * (1 + max(line for *_, line in PIPELINE)) + 8, 0
    for rows, header, footer in ((PROGRAMS, 36, PADDING), (LIBRARY, PADDING, 38)):
        top = y
        y += header - CHANNEL
        for names in rows:
            y += CHANNEL
            height = 36 + 17 * max(len(lines[name]) for name in names)
            boxes |= {name: Box(row, left, right, y, y + height) for name, (left, right) in names.items()}
            y += height
            row += 1
        bands.append((top, y + footer))
        y += footer + 20
    return boxes, bands


def draw() -> str:
    """The picture. Raises SystemExit if the boxes do not fit the code."""
    found = modules()
    spans = {name: span for row in PROGRAMS + LIBRARY for name, span in row.items()}
    if spans.keys() != found.keys():
        raise SystemExit(f"give these a place in tools/architecture.py: {sorted(spans.keys() ^ found.keys())}")
    lines = {name: label(name, found[name], right - left) for name, (left, right) in spans.items()}
    boxes, bands = place(lines)
    parts = list(draw_pipeline())
    for top, bottom in bands:
        size = f'width="{WIDTH + 2 * PADDING}" height="{bottom - top}"'
        parts.append(f'<rect class="band" x="{-PADDING}" y="{top}" {size} rx="9"/>')
    parts.append(draw_text(0, bands[0][0] + 23, "heading", "Programs"))
    parts.append(draw_text(0, bands[1][1] - 14, "heading", "The library: it knows neither DVC, MLflow nor Gradio"))
    parts += draw_legend(0, boxes["tools/"].top + 10)
    direct = imports(found)
    for package, others in direct.items():
        for other in sorted(others):
            if boxes[package].row >= boxes[other].row:
                raise SystemExit(f"{package} imports {other}, which is not below it in tools/architecture.py")
    for package, others in sorted(reduced(direct).items()):
        for other in sorted(others):
            parts.append(f'<path class="arrow" d="{route(boxes[package], boxes[other], list(boxes.values()))}"/>')
    for name, box in boxes.items():
        kind = "program" if box.row < len(PROGRAMS) else "library"
        parts += draw_box(box, kind, name, lines[name])
    width, height = WIDTH + 2 * MARGIN, bands[-1][1] + 2 * (MARGIN - 8)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-MARGIN} {8 - MARGIN} {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            "<title>The stages of the pipeline, and the packages with what they import</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="#475467"/></marker></defs>',
            f'<rect x="{-MARGIN}" y="{8 - MARGIN}" width="{width}" height="{height}" rx="12" fill="#fcfcfd"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Draws the picture."""
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"{PICTURE}: drawn")


if __name__ == "__main__":
    main()
