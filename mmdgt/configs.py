"""The configs that come with the package, for those that build on them."""

import argparse
from pathlib import Path

FOLDER = Path(__file__).parent / '.mim' / 'configs'  # where mim looks for them


def config_path(name: str) -> str:
    """Find a config of the package.

    mmengine resolves ``'mmdet::...'`` for the frameworks it knows by name, so another
    package's configs are named by their path. In a config of your own, without an
    import ahead of it, in any of the frameworks::

        _base_ = __import__('mmdgt').config_path('upernet_dgt_t_ade20k')

    Args:
        name (str): As in the model zoo, with or without ``.py``.

    Returns:
        str: The path of its file.

    Raises:
        FileNotFoundError: If there is none of that name.
    """
    file = FOLDER / (name.removesuffix('.py') + '.py')
    if not file.is_file():
        raise FileNotFoundError(
            f'there is no config {name} here or in mmdgt, which has'
            f' {", ".join(config_names())}'
        )
    return str(file)


def config_names() -> list[str]:
    """The names of the model zoo."""
    return sorted(file.stem for file in FOLDER.glob('*.py'))


def find_config(name: str) -> str:
    """The type of command-line arguments that name a config: a file, or of the package.

    Raises:
        argparse.ArgumentTypeError: If it is neither.
    """
    try:
        return name if Path(name).is_file() else config_path(name)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    """Print the path of a config, or the names of all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument('config', nargs='?', type=find_config)
    config = parser.parse_args().config
    print(config or '\n'.join(config_names()))
