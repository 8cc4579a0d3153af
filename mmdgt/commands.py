"""How a command ends: by a message if the user can do something about it."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

OF_CHECKS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
# In the text of a traceback: the file and line of its last frame, and the message.
IN_WORKER = re.compile(
    r'^  File "(.+)", line \d+, in .+\n    (.*)\n(?:    .*\n)*\w\S*: ((?:.+\n?)+)', re.M
)


def run_command(main: Callable[[], int | None]) -> int | None:
    """Call what a command does; of what mmdgt's own checks raise, print the message.

    Everything else keeps its traceback. The exit status of an error is 1 either way.

    Args:
        main (Callable): The command; what lies beside it counts as mmdgt's own.

    Returns:
        int | None: What the command returns, its exit status.
    """
    rooms = {Path(__file__).parent, Path(main.__code__.co_filename).resolve().parent}
    try:
        return main()
    except Exception as error:
        causes = list(_causes(error))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from None  # of which a framework made an error
        told = [said for cause in causes for said in _said_by_checks(cause, rooms)]
        if not told or not isinstance(error, OF_CHECKS):
            raise
        sys.exit(f'{Path(sys.argv[0]).name}: {told[0]}')


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it: frameworks raise what they got anew."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said_by_checks(error: BaseException, rooms: set[Path]) -> Iterator[str]:
    """What an error says, if a ``raise`` in files below the folders made it.

    Of an error in a worker of a data loader torch keeps the traceback as a text, in
    the message of another.
    """
    found = IN_WORKER.findall(str(error))[::-1]
    if frames := traceback.extract_tb(error.__traceback__):
        found = [(frames[-1].filename, frames[-1].line or '', str(error)), *found]
    for file, line, said in found:
        if line.startswith('raise ') and rooms & set(Path(file).resolve().parents):
            yield said.strip()
