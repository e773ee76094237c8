from io import StringIO

from rich.table import Table

from prlhf_lightning.utils.terminal import LAYOUT, plain_console, printable


def test_what_would_steer_a_terminal_is_shown_and_not_sent():
    assert printable("\x1b[2Jann\n") == r"\u001b[2Jann\n"


def test_what_is_plain_or_may_stay_is_left_as_it_is():
    assert printable("né 🙂\n\t\x07", keep="\n\t") == "né 🙂\n\t\\u0007"


def test_spaces_of_all_scripts_and_joined_letters_are_kept():
    assert printable("l\u00a0un\u3000👩\u200d🚀\u202e", LAYOUT) == "l\u00a0un\u3000👩\u200d🚀\\u202e"


def test_what_people_write_is_no_markup():
    table, out = Table("[red]a", title="[/]"), StringIO()
    table.add_row("[/] :smile: [bold]")
    plain_console(file=out, width=80).print("[/]", table, "[link=x]")
    assert all(text in out.getvalue() for text in ("[/] :smile: [bold]", "[red]a", "[link=x]"))
