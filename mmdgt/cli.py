"""The command ``mmdgt``: what ``tools/`` does, without a clone."""

import argparse
import importlib
import sys
from pathlib import Path

from .commands import run_command
from .frameworks import OPENMMLAB
from .version import __version__

TOOLS = Path(__file__).parent / '.mim' / 'tools'  # where mim looks for them
# What each runs, a module of tools/ or of the package, and what it does.
COMMANDS = {
    'train': ('train', 'train a segmentor, detector or classifier'),
    'test': ('test', 'evaluate a checkpoint'),
    'infer': ('infer', 'predict for pictures or a video and draw what was found'),
    'page': ('demo_page', 'the same as a page in the browser'),
    'groups': ('show_groups', 'draw the groups of DG-Attention over a picture'),
    'export': ('export_onnx', 'write a model as ONNX'),
    'compare': ('train_variants', 'train variants of a config over seeds'),
    'sweep-keys': ('sweep_keys', 'evaluate a checkpoint with several K'),
    'benchmark': ('benchmark_model', 'time networks'),
    'benchmark-op': ('benchmark_op', 'time the operators'),
    'demo-data': ('make_demo_data', 'draw a small data set'),
    'transplant': ('mmdgt.transplant', 'start from the weights of a Swin V2'),
    'config': ('mmdgt.configs', 'print the path of a config, or the names of all'),
    'doctor': ('mmdgt.doctor', 'say what is wrong with the installation'),
}
BROUGHT = (*OPENMMLAB, 'cv2')  # what comes with OpenMMLab


def main() -> int | None:
    """Run the command that the arguments name, return the exit status."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog='mmdgt',
        usage='mmdgt COMMAND ... (mmdgt COMMAND --help has its arguments)',
        epilog='\n'.join(
            f'  {name:{width}}  {what}' for name, (_, what) in COMMANDS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=__version__)
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND')
    parser.add_argument('arguments', nargs='...', help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.argv = [f'mmdgt {args.command}', *args.arguments]
    sys.path.insert(0, str(TOOLS))  # as for python tools/train.py
    try:
        return run_command(importlib.import_module(COMMANDS[args.command][0]).main)
    except ModuleNotFoundError as error:
        if error.name not in BROUGHT:
            raise
        parser.error(
            f'{args.command} needs {error.name}, which is not installed: pip install'
            ' "mmdgt[seg]" (or det, cls); mmdgt doctor says more'
        )
