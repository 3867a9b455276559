import io
import sys

import pytest

from gen import progress
from gen.progress import Bar, Pace, StatusLine, duration


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Takes the place of stdout and stderr (not as a fixture: pytest sets both again before the test runs)."""
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_duration() -> None:
    assert [duration(s) for s in (3.2, 75, 3725, float("inf"))] == ["3s", "1m15s", "1h02m", "?"]


def test_plain_status_lines(capsys: pytest.CaptureFixture[str]) -> None:
    status = StatusLine(every=0.0)
    assert status.due()
    status.show("one")
    status.note("two")
    status.close()
    assert capsys.readouterr().out == "one\ntwo\n"
    StatusLine(quiet=True).note("nothing")
    assert capsys.readouterr().out == ""


def test_status_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    status = StatusLine()
    assert status.due()
    for text in ("a [red] line", "too long " * 20):
        status.show(text)
    assert not status.due()
    status.note("stays")
    written = terminal.getvalue()
    assert "a [red] line" in written  # no markup
    assert "…" in written  # cut off, not wrapped
    assert written.index("\x1b[?25l") < written.index("\x1b[?25h") < written.index("stays")  # the cursor is back


def test_plain_bar(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("work")
    for done in range(40, 101, 5):
        bar(done, 100)
        clock.now += 4
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "work: going on at 40 of 100"
    assert said[1] == "work: 55 of 100, 1.2/s, 36s left"
    assert said[-1] == "work: 100 of 100, 1.2/s, 48s"
    assert len(said) == 5
    quiet = Bar("")
    quiet(0, 1)
    quiet(1, 1)
    assert capsys.readouterr().err == ""


def test_bar_of_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    bar = Bar("work")
    for done in range(5):
        bar(done, 4)
        clock.now += 1
    written = terminal.getvalue()
    assert "work: 2 of 4, 1.0/s, 2s left" in written
    assert "━" in written
    assert written.endswith("work: 4 of 4, 1.0/s, 4s\n")
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1


def test_a_bar_that_is_dropped_gives_the_cursor_back(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    bar = Bar("work")
    for done in range(3):
        bar(done, 4)
        clock.now += 1
    del bar
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_the_time_left_is_steady(clock: Clock) -> None:
    """Neither compilation at the start nor a slow while long ago moves it."""
    pace = Pace()
    pace.mark(0)
    clock.now += 60  # compilation
    for done in range(1, 1001):
        pace.mark(done)
        clock.now += 0.1
        if done > 2:
            assert pace.left(1000) == pytest.approx((1000 - done) / 10, rel=0.01)
    clock.now += 100
    pace.mark(1001)
    for done in range(1002, 1402):
        clock.now += 0.1
        pace.mark(done)
    assert pace.speed == pytest.approx(10, rel=0.01)
    assert len(pace._points) < 100
    clock.now += 50  # pictures
    pace.pause(50)
    assert pace.left(1501) == pytest.approx(10, rel=0.02)
