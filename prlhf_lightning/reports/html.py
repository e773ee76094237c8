"""Self-contained HTML pages with text, numbers, plots and tables.

Everything that is handed in is escaped. Plots are drawn by matplotlib as inline SVG that takes its colors from the
page, so that they follow light and dark mode.

    page = Page("Votes", "What is in votes.jsonl.")
    section = page.section("Votes a user")
    section.plot(lambda axes: axes.bar(x, y, color=FIRST), alt="Most users gave ten votes.", caption="Votes a user")
    section.table(["user", "votes"], [["ann", 12]], caption="The same as a table")
    page.write("votes.html")
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias
from xml.etree import ElementTree

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from prlhf_lightning.utils.io import atomic_write_bytes
from prlhf_lightning.utils.shipped import ASSETS, check_shipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Cell: TypeAlias = str | int | float
Role: TypeAlias = Literal["", "verdict", "note"]

_NAMES = ("ink", "muted", "line", "first", "second", "third", "fourth")
#: Colors to draw with. Each stands for the page's color of that name, which differs in light and dark mode.
INK, MUTED, LINE, FIRST, SECOND, THIRD, FOURTH = (f"#00000{number}" for number in range(1, 8))
_COLORS = {f"#00000{number}": name for number, name in enumerate(_NAMES, start=1)}

_STYLE: Any = {  # of keys whose type differs from one release of matplotlib to the next
    "svg.hashsalt": "page",  # the same content gives the same page, byte for byte
    "svg.fonttype": "none",  # text stays text: it can be found, enlarged, and read in the page's own font
    "text.parse_math": False,  # a dollar sign in somebody's text is one
    "axes.formatter.useoffset": False,
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.color": FIRST,
    "patch.facecolor": FIRST,
}
_TEMPLATE = ASSETS / "page.html.jinja"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NUMBER = re.compile(r"[-+]?[\d.,]+ ?%?|-")
_PHONE, _HALF_SCREEN = 42, 62  # characters of a table that fit
_LONG_CELL = 24  # a longer text is broken into lines
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Text:
    kind: ClassVar[str] = "text"
    text: str
    role: Role = ""


@dataclass(frozen=True)
class _Facts:
    kind: ClassVar[str] = "facts"
    facts: Mapping[str, Cell]


@dataclass(frozen=True)
class _Plot:
    kind: ClassVar[str] = "plot"
    svg: Markup
    caption: str


@dataclass(frozen=True)
class _Table:
    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str

    def is_number(self, column: int) -> bool:
        """Return whether a column, but for the first, holds numbers, written out or not: they end at the right."""
        values = [row[column] for row in self.rows]
        return column > 0 and all(not isinstance(value, str) or _NUMBER.fullmatch(value) for value in values)

    @property
    def width(self) -> Literal["", "wide", "wide full"]:
        """How much room it takes: "" fits on a phone, "wide" on half of a wide screen, "wide full" on all of it."""
        words = [max(map(len, name.split()), default=0) for name in self.columns]
        cells = [max((len(_cell(row[column])) for row in self.rows), default=0) for column in range(len(words))]
        total = sum(min(_LONG_CELL, max(both)) + 2 for both in zip(words, cells, strict=True))
        return "" if total <= _PHONE else "wide" if total <= _HALF_SCREEN else "wide full"


@dataclass(frozen=True)
class _Quotes:
    kind: ClassVar[str] = "quotes"
    title: str
    prompt: str
    quotes: Sequence[tuple[str, str]]


@dataclass
class Section:
    """A section of a page, filled from top to bottom. On a wide screen, plots and small tables are side by side.

    Attributes:
        title: Its heading.
        number: Its place in the page, from 1.
    """

    title: str
    number: int
    blocks: list[_Text | _Facts | _Plot | _Table | _Quotes] = field(default_factory=list)

    def text(self, text: str, role: Role = "") -> None:
        """Add a paragraph; a `verdict` is emphasized, a `note` is muted."""
        self.blocks.append(_Text(text, role))

    def facts(self, facts: Mapping[str, Cell]) -> None:
        """Add a few large numbers, each with a label."""
        self.blocks.append(_Facts(facts))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> None:
        """Add a table; integers get thousands separators, floats three decimals, strings are left as they are.

        Raises:
            ValueError: A row has more or fewer cells than there are columns.
        """
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"table {caption!r}: each row needs {len(columns)} cells, one a column.")
        self.blocks.append(_Table(columns, rows, caption))

    def quotes(self, title: str, prompt: str, quotes: Sequence[tuple[str, str]]) -> None:
        """Add texts side by side; their line breaks and their direction of writing are kept.

        Args:
            title: What they are.
            prompt: The text that all of them answer.
            quotes: Who wrote each, or for whom, and the text.
        """
        self.blocks.append(_Quotes(title, prompt, quotes))

    def plot(self, draw: Callable[[Axes], object], alt: str, caption: str, height: float = 2.6) -> None:
        """Add a plot.

        Args:
            draw: Draws on the axes that it is given, in this module's colors. Logarithmic axes get plain numbers.
            alt: What the plot shows, for those who do not see it.
            caption: Its title.
            height: Inches, of a width of 5.
        """
        prefix = f"plot-{self.number}-{len(self.blocks) + 1}-"
        self.blocks.append(_Plot(_inline(_drawn(draw, height), alt, prefix), caption))


class Page:
    """One HTML file.

    Args:
        title: Title and first heading.
        lead: Paragraphs below it.
        footer: Last line, in small print.
    """

    def __init__(self, title: str, *lead: str, footer: str = "") -> None:
        self.title, self.lead, self.footer = title, lead, footer
        self.sections: list[Section] = []

    def section(self, title: str) -> Section:
        """Add a section and return it, to be filled."""
        self.sections.append(Section(title, len(self.sections) + 1))
        return self.sections[-1]

    def render(self) -> str:
        """Return the page."""
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["cell"] = _cell
        check_shipped(_TEMPLATE)
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        return template.render(page=self)

    def write(self, path: str | Path) -> None:
        """Write the page to a file atomically.

        Raises:
            CheckpointWriteError: The file cannot be written; what was there before is untouched.
        """
        atomic_write_bytes(Path(path), self.render().encode())


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:,.3f}"
    return value if isinstance(value, str) else f"{value:,}"


def _drawn(draw: Callable[[Axes], object], height: float) -> str:
    """Return a plot as an SVG document."""
    # Not at the top: it takes a second to import, and a command's --help, or a page without plots, needs none of it.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings(), io.StringIO() as file:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts have it
        figure = Figure(figsize=(5, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            _write_plainly(axis)
        figure.savefig(file, format="svg")
        return file.getvalue()


def _write_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: matplotlib's own labels are mathtext, which would stand as typed."""
    from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullLocator

    if isinstance(axis.get_major_formatter(), LogFormatter):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())


def _inline(svg: str, alt: str, prefix: str) -> Markup:
    """Return an SVG document as an element of a page: with the page's colors and ids that no other plot has."""
    root = ElementTree.fromstring(_NOT_IN_XML.sub("\ufffd", svg))
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == f"{{{_XLINK}}}href":
                element.set(name, value.replace("#", f"#{prefix}", 1))
            else:
                value = value.replace("url(#", f"url(#{prefix}")
                element.set(name, re.sub("#00000[1-7]", lambda found: f"var(--{_COLORS[found[0]]})", value))
    for name in ("width", "height"):
        root.attrib.pop(name, None)  # the page fits it in
    root.set("role", "img")
    root.set("aria-label", _NOT_IN_XML.sub("\ufffd", alt))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
