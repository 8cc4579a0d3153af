"""How commands end: a message where it helps, a traceback where it does not."""

import subprocess
import sys
import textwrap

import pytest

START = """
import sys
from mmdgt.commands import run_command

def check(x):
    if x == 'bad':
        raise ValueError(
            f'expected good, got {x}'
        )
    if x == 'number':
        int(x)
    if x == 'type':
        raise TypeError('of ours, and a defect')
    if x == 'library':
        json.loads('{')

def main():
    if sys.argv[1] == 'again':
        try:
            check('bad')
        except ValueError as error:
            exec('raise ValueError(f"built: {error}") from error')
    check(sys.argv[1])
"""


@pytest.fixture
def end(tmp_path):
    """Run a command: its exit status and what it says."""
    file = tmp_path / 'command.py'
    file.write_text(
        'import json\n' + textwrap.dedent(START) + 'run_command(main)\nprint("end")\n'
    )

    def call(argument):
        done = subprocess.run(
            [sys.executable, file, argument], capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.mark.parametrize('argument', ['bad', 'again'])
def test_a_check_of_ours_is_told_without_a_traceback(end, argument):
    """Also where a framework raised its message anew, as when it builds a model."""
    assert end(argument) == (1, '', 'command.py: expected good, got bad\n')


@pytest.mark.parametrize('argument', ['number', 'type', 'library'])
def test_what_nobody_expected_keeps_its_traceback(end, argument):
    status, _, told = end(argument)
    assert status == 1 and 'Traceback' in told


def test_a_command_that_works(end):
    assert end('good') == (0, 'end\n', '')
