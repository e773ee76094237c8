from prlhf_lightning.tasks.terminal import printable


def test_what_would_steer_a_terminal_is_shown_and_not_sent():
    assert printable("\x1b[2Jann\n") == r"\u001b[2Jann\n"


def test_what_is_plain_or_may_stay_is_left_as_it_is():
    assert printable("né 🙂\n\t\x07", keep="\n\t") == "né 🙂\n\t\\u0007"
