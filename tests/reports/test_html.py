"""Pages of one file: nothing to fetch, nothing unescaped, something to read for who sees no plots."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.reports.html import FIRST, INK, Page

EVIL = """<script>alert(1)</script>" onload='x' & $x^$ \x00\x1b ]]>"""


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def evil_page():
    page = Page(EVIL, EVIL, footer=EVIL)
    for _ in range(2):
        section = page.section(EVIL)
        section.text(EVIL, "verdict")
        section.facts({EVIL: EVIL})
        section.table([EVIL, "n"], [[EVIL, 1234], ["b", 0.25]], EVIL)
        section.quotes(EVIL, EVIL, [(EVIL, EVIL)])

        def draw(axes):
            axes.plot([0, 1], [0, 1], color=FIRST, marker="o", label=EVIL)
            axes.set_xlim(0, 0.5)
            axes.set_title(EVIL, color=INK)
            axes.legend()

        section.plot(draw, alt=EVIL, caption=EVIL)
    return page.render()


@pytest.fixture(scope="module")
def evil():
    return evil_page()


def test_what_is_handed_in_is_escaped_everywhere(evil):
    reader = Reader(evil)
    assert not {"script", "img", "iframe", "link", "object"} & {tag for tag, _ in reader.tags}
    assert not [attrs for _, attrs in reader.tags if "onload" in attrs]
    assert reader.text.count("<script>alert(1)</script>") > 20


def test_nothing_is_fetched_and_no_id_stands_twice(evil):
    reader = Reader(evil)
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert all(target in reader.ids for target in re.findall(r"url\(#([^)]+)\)", evil))
    assert "@import" not in evil
    assert len(set(reader.ids)) == len(reader.ids)


def test_plots_have_a_text_and_the_colors_of_the_page(evil):
    plots = [attrs for tag, attrs in Reader(evil).tags if tag == "svg"]
    assert all(attrs["role"] == "img" and "alert(1)" in attrs["aria-label"] for attrs in plots)
    assert "var(--first)" in evil
    assert not re.search("#00000[1-7]", evil)


def test_numbers_are_written_for_people_and_stand_to_the_right():
    page = Page("t")
    page.section("s").table(["name", "n", "share", "word"], [["a", 12345, float("nan"), "x"], ["b", 1, 0.5, "y"]], "c")
    text = page.render()
    cells = re.findall(r'<td role="cell" data-column="(\w+)" (\S+)>([^<]*)</td>', text)
    assert cells[:3] == [
        ("n", 'class="number"', "12,345"),
        ("share", 'class="number"', "-"),
        ("word", 'dir="auto"', "x"),
    ]
    assert '<th role="columnheader" scope="col" class="number">share</th>' in text


@pytest.mark.parametrize("limits", [(1, 700), (23, 41), (0.02, 3), (1e-5, 1e7)])
@pytest.mark.parametrize("axis", "xy")
def test_logarithmic_axes_have_plain_numbers(limits, axis):
    page = Page("t")

    def draw(axes):
        axes.plot(limits, limits)
        axes.set(**{f"{axis}scale": "log", f"{axis}lim": limits})

    page.section("s").plot(draw, alt="", caption="")
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", page.render())
    values = [float(label.replace(",", "").replace("\N{MINUS SIGN}", "-")) for label in labels]
    assert len(values) > 6


def test_line_breaks_and_direction_of_peoples_texts_are_kept():
    text = "- one\n- two\n\n    code\n\u0634\u0643\u0631\u0627"
    page = Page("t")
    page.section("s").quotes("Prompt:", text, [("ann", text)])
    assert page.render().count(f'dir="auto">{text}<') == 2
    assert re.search(r"\.quotes > p, \.quotes dd \{ white-space: pre-wrap; \}", page.render())


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="2 cells"):
        Page("t").section("s").table(["a", "b"], [["only one"]], "c")


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PRLHFError, match=r"page\.html could not be written"):
        Page("t").write(tmp_path / "file" / "page.html")


def test_matplotlib_waits_until_something_is_drawn():
    code = "import sys, prlhf_lightning.reports.html; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
