"""Progress bars show on terminals and not in files."""

import io

import pytest

from lasnn_sj.runtime.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "quiet", "shown"), [
    (Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False),
])  # fmt: skip
def test_a_bar_shows_on_a_terminal_unless_quiet(stream, quiet, shown):
    written = stream()
    assert list(progress_bar(range(3), quiet=quiet, file=written, desc="counting")) == [0, 1, 2]
    assert ("counting: 100%" in written.getvalue()) is shown
