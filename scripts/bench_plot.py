"""The picture of a benchmark: every figure as a ratio, ours beside the others, drawn by gnuplot."""

import os
import tempfile

from scripts.bench_figures import RUN, US, Figure, amount, briefly, name_and_unit, plain
from scripts.bench_rivals import get
from scripts.bench_setting import CannotError, run

STYLES = {
    "git": (4, 1.0, "#000000"),
    "squashfuse": (8, 1.1, "#8a6d00"),
    "bindfs": (10, 1.1, "#a0447f"),
    "fuse-overlayfs": (12, 1.2, "#007a5a"),
    "restic": (2, 0.9, "#777777"),
    "ours, otherwise": (6, 1.1, "#0072b2"),
    RUN: (5, 1.0, "#d55e00"),
    US: (7, 1.3, "#0072b2"),
}
"""Shape, size and colour of each side, in the order of drawing: ours on top."""
OTHERWISE = "ours, otherwise"
"""A side of ours that stands in its row beside the first: a session, one snapshot."""
TITLES = {
    OTHERWISE: "AmalgamFS, see the table",
    "git": "git, others in the table",
}
"""What the legend says, where it is not the side's own name."""
ROW = 19
"""Height of a row in pixels."""

SCRIPT = """
set terminal svg size 1080,{height} font 'DejaVu Sans,Helvetica,sans-serif,11' background '#ffffff'
set output '{output}'
set label {title} at screen 0.5,{head} center font ',14'
set lmargin at screen 0.36
set rmargin at screen 0.87
set tmargin at screen {top}
set bmargin at screen {bottom}
set logscale x
set xrange [{low}:{high}]
set yrange [{last}:-0.7]
set xtics nomirror textcolor '#000000' ({xtics})
set xlabel 'times as long, or as much, as what the row is compared with; further left is better'
set border 1 lc '#888888'
set ytics scale 0 textcolor '#000000' ({names})
set y2tics scale 0 textcolor '#000000' ({values})
set y2range [{last}:-0.7]
set grid x lc '#dddddd' lt 1 lw 0.6
unset key
set arrow from 1,graph 0 to 1,graph 1 nohead lc '#444444' lw 1.2 back
{legend}
{decoration}
{data}
plot {plots}
"""


def draw(facts: dict[str, str], figures: list[Figure], output: str) -> None:
    """Draws figures as an SVG. Raises CannotError without gnuplot."""
    get({"gnuplot": "gnuplot-nox"})
    with tempfile.TemporaryDirectory() as scratch:
        drawn = os.path.join(scratch, "drawn.svg")
        path = os.path.join(scratch, "script")
        with open(path, "w", encoding="utf-8") as file:
            file.write(script(facts, figures, drawn))
        run("gnuplot", path)
        with open(drawn, encoding="utf-8") as file:
            picture = file.read()
    with open(output, "w", encoding="utf-8") as file:
        file.write(picture)


def compared(figure: Figure, disk: str) -> tuple[float, str] | None:
    """Returns the amount that is 1 in the row of a figure, and what to call it.

    That is the disk's, else that of whom a promise names, others rather than ours, else that of
    the best of the others, else what is promised.
    """
    if "disk" in figure.samples:
        return figure.median("disk"), disk
    targets = figure.targets()
    named = [side for target in targets for side in target.sides if side in figure.samples]
    others = [side for side in named or figure.samples if not is_ours(side)] or named
    if others:
        best = min(others, key=figure.median)
        return figure.median(best), best
    if targets:
        bound = figure.bound(targets[0])
        return bound, amount([bound], name_and_unit(figure.measure)[1])
    return None


def is_ours(side: str) -> bool:
    """Tells whether a side is one of ours."""
    return side == RUN or side.startswith(US)


def style_of(side: str, first: str) -> str:
    """Returns the key in STYLES of a side."""
    if side == first:
        return US
    if side.startswith(US):
        return OTHERWISE
    return next((name for name in STYLES if side == name), "git")


def quoted(text: str) -> str:
    """Writes a text for gnuplot, between double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("_", "\\\\_") + '"'


def script(facts: dict[str, str], figures: list[Figure], output: str) -> str:
    """Returns what gnuplot is told."""
    disk = facts.get("disk", "disk")
    points: dict[str, list[tuple[float, int]]] = {name: [] for name in STYLES}
    names, values, decoration = [], [], []
    group, row, lowest, highest = "", -1, 0.5, 2.0
    for figure in figures:
        base = compared(figure, disk)
        if base is None:
            continue
        if figure.group != group:
            row += 1
            group = figure.group
            names.append(f"{quoted('{/:Bold ' + group + '}')} {row}")
        row += 1
        one, called = base[0] or 1e-9, base[1]
        label = name_and_unit(figure.measure)[0]
        names.append(f"{quoted(f'{label}  {{/*0.85 ({briefly(called)} = 1)}}')} {row}")
        said = []
        telling = list(figure.samples)[-1] if called == figure.first else figure.first
        for side in figure.samples:
            ratio = figure.median(side) / one
            lowest, highest = min(lowest, ratio), max(highest, ratio)
            if side != "disk":
                points[style_of(side, figure.first)].append((ratio, row))
            if side in {telling, RUN}:
                said.append(plain(ratio))
        values.append(f"{quoted('  ' + '   run '.join(said))} {row}")
        bounds: dict[str, float] = {}
        for target in figure.targets():
            bound = figure.bound(target) / one
            bounds[target.who] = min(bound, bounds.get(target.who, bound))
        for who, bound in bounds.items():
            lowest, highest = min(lowest, bound), max(highest, bound)
            decoration.append(
                f"set arrow from {bound:.5g},{row - 0.42:g} to {bound:.5g},{row + 0.42:g} "
                f"nohead lc '{STYLES[style_of(who or figure.first, figure.first)][2]}' lw 2.2 front"
            )
        if row % 2:
            decoration.append(
                f"set object rectangle from graph 0,first {row - 0.5:g} to graph 1,first "
                f"{row + 0.5:g} fc '#f4f4f4' fs solid noborder behind"
            )
    if row < 0:
        raise CannotError("no figures to draw")
    height = ROW * (row + 2) + 170
    ticks = [
        base * 10**power for power in range(-5, 5) for base in (1, 2, 5) if base == 1 or power >= -1
    ]
    data, plots, legend = [], [], []
    used = [name for name, places in points.items() if places]
    for at, name in enumerate(used):
        shape, size, colour = STYLES[name]
        look = f"pt {shape} ps {size * 0.6:g} lw 1.4 lc '{colour}'"
        lines = "\n".join(f"{ratio:.6g} {y}" for ratio, y in points[name])
        data.append(f"$side{at} << END\n{lines}\nEND")
        plots.append(f"$side{at} using 1:2 with points {look} notitle")
        left, down = 0.05 + at // 2 * 0.19, 48 + at % 2 * 20
        legend.append(
            f"set label {quoted(TITLES.get(name, name))} at screen {left:g},{1 - down / height:g} "
            f"left point {look} offset 0.8,-0.3"
        )
    left, down = 0.05 + len(used) // 2 * 0.19, 48 + len(used) % 2 * 20
    level = 1 - down / height
    legend.append(
        f"set arrow from screen {left},{level - 7 / height:g} to screen {left},"
        f"{level + 7 / height:g} nohead lc '{STYLES[US][2]}' lw 2.2\n"
        f"set label 'what is promised' at screen {left + 0.012:g},{level:g} left"
    )
    return SCRIPT.format(
        output=output, height=height, legend="\n".join(legend), decoration="\n".join(decoration),
        data="\n".join(data),
        title=quoted(f"AmalgamFS beside {disk} and others"), head=1 - 22 / height,
        top=1 - 95 / height, bottom=60 / height,
        low=lowest / 1.25, high=highest * 1.25, last=f"{row + 0.7:g}",
        xtics=", ".join(f"'{tick:g}' {tick:g}" for tick in ticks),
        names=", ".join(names), values=", ".join(values),
        plots=", \\\n    ".join(plots),
    )  # fmt: skip
