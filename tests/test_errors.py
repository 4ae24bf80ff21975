"""Exit codes of command-line modules."""

import os
import subprocess
import sys

import pytest

from engine.errors import FaultError, UserError, exit_code


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("x"), 2), (FaultError("x"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, capsys):
    def fail():
        raise error

    assert exit_code(fail) == code
    assert capsys.readouterr().err == ("" if code == 130 else "x\n")
    assert exit_code(lambda: 0) == 0


def test_nothing_is_told_where_nobody_reads():
    program = "from engine.errors import exit_code; import sys\n"
    program += "sys.exit(exit_code(lambda: print('x') or 0))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_fault_of_the_program_shows_where(capsys):
    assert exit_code(lambda: 1 // 0) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
