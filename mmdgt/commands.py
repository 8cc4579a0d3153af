"""How a command ends: by a message if the user can do something about it."""

import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


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
    except (ValueError, OSError, ImportError) as error:
        ours = [e for e in _causes(error) if _is_raised_in(e, rooms)]
        if not ours:
            raise
        sys.exit(f'{Path(sys.argv[0]).name}: {ours[0]}')


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it: frameworks raise what they got anew."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_raised_in(error: BaseException, rooms: set[Path]) -> bool:
    """Whether a ``raise`` in files below the folders made an error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not (frames[-1].line or '').startswith('raise '):
        return False
    return not rooms.isdisjoint(Path(frames[-1].filename).resolve().parents)
