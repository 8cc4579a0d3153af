"""How commands end: a message where it helps, a traceback where it does not."""

import signal
import subprocess
import sys
import textwrap

import pytest

START = """
import sys
from torch.utils.data import DataLoader
from mmdgt.commands import run_command

def check(x):
    if x == 'bad':
        raise ValueError(
            f'expected good, got {x}'
        )
    if x == 'number':
        int(x)
    if x == 'type':
        raise TypeError('expected good, got bad')
    if x == 'argument':
        check()
    if x == 'key':
        raise KeyError('of ours, and a defect')
    if x == 'library':
        json.loads('{')
    if x == 'not finite':
        raise FloatingPointError('expected good, got bad')

class Checked(list):
    def __getitem__(self, index):
        check(super().__getitem__(index))

def main():
    if sys.argv[1] == 'interrupted':
        try:
            raise KeyboardInterrupt
        except:
            raise SyntaxError('failed to format the config')
    if sys.argv[1] == 'in a worker':
        list(DataLoader(Checked(sys.argv[2:]), num_workers=1))
    if sys.argv[1] == 'again':
        try:
            check(sys.argv[2])
        except Exception as error:
            exec('raise type(error)(f"built: {error}") from error')
    check(sys.argv[1])
"""


@pytest.fixture
def end(tmp_path):
    """Run a command: its exit status and what it says."""
    file = tmp_path / 'command.py'
    file.write_text(
        'import json\n' + textwrap.dedent(START) + 'run_command(main)\nprint("end")\n'
    )

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, file, *arguments], capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.mark.parametrize(
    'arguments',
    [
        'bad',
        'type',
        'again,bad',
        'again,type',
        'not finite',
        'in a worker,bad',
        'in a worker,type',
    ],
)
def test_a_check_of_ours_is_told_without_a_traceback(end, arguments):
    """Also where a framework raised its message anew, as when it builds a model."""
    told = end(*arguments.split(','))
    assert told == (1, '', 'command.py: expected good, got bad\n')


@pytest.mark.parametrize(
    'arguments',
    [
        'number',
        'argument',
        'key',
        'library',
        'again,argument',
        'in a worker,number',
        'in a worker,argument',
        'in a worker,key',
    ],
)
def test_what_nobody_expected_keeps_its_traceback(end, arguments):
    status, _, told = end(*arguments.split(','))
    assert status == 1 and 'Traceback' in told


def test_an_interruption_stays_one(end):
    """mmengine turns whatever ends the formatting of a config into a SyntaxError."""
    status, _, told = end('interrupted')
    assert status == -signal.SIGINT and 'SyntaxError' not in told


def test_a_command_that_works(end):
    assert end('good') == (0, 'end\n', '')
