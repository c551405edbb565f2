"""A terminal of the tests' own: a command runs in it, and what stands on its screen is read as a person would."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

_PIECE = re.compile(r"\x1b\[(?P<number>[\d;?]*)(?P<order>[A-Za-z])|(?P<text>[\s\S])")


class Screen:
    """What stands on a terminal of so many columns after all that was written to it; wrapped as terminals do."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.cursor_shown = columns, [""], True
        self._row, self._column, self._rest = 0, 0, ""

    def write(self, text: str) -> None:
        self._rest += text
        # The beginning of an order whose end has not come waits for it.
        end = len(self._rest) if "\x1b" not in self._rest[-12:] else self._rest.rindex("\x1b")
        ready, self._rest = self._rest[:end], self._rest[end:]
        if self._rest and (found := _PIECE.match(self._rest)) and found["order"]:
            ready, self._rest = ready + self._rest, ""
        for piece in _PIECE.finditer(ready):
            self._order(piece["number"], piece["order"]) if piece["order"] else self._put(piece["text"])

    def shown(self) -> list[str]:
        """The lines that are not empty."""
        return [line.rstrip() for line in self.lines if line.strip()]

    def _order(self, number: str, order: str) -> None:
        if order == "A":
            self._row = max(0, self._row - int(number or 1))
        elif order == "K":
            assert number == "2", "the whole line"
            self.lines[self._row] = ""
        elif order in "hl":
            assert number == "?25", "the cursor"
            self.cursor_shown = order == "h"
        else:
            assert order == "m", f"an order that this screen does not know: {number}{order}"

    def _put(self, text: str) -> None:
        if text == "\r":
            self._column = 0
        elif text == "\n":
            self._down()
        else:
            if self._column == self.columns:
                self._down()
                self._column = 0
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + text + line[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")


def screens(words: list[str], columns: int, folder: Path) -> Iterator[Screen]:
    """The screen each time that the command wrote something; it must end well."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    screen, held = Screen(columns), b""
    try:
        while True:
            try:
                held += os.read(ours, 1 << 16)
            except OSError:  # nobody holds the other end any more
                break
            # A letter of several bytes may come in two parts.
            text = held.decode(errors="ignore")
            held = held[len(text.encode()) :]
            screen.write(text)
            yield screen
        assert process.wait(60) == 0, screen.shown()
    finally:
        process.kill()
        os.close(ours)
