"""The matrix of versions: ``make matrix``, or ``nox -s NAME`` for one environment.

Every session sets up an environment, runs the tests that apply there (or those that
follow ``--``) and puts its row into docs/matrix.json and docs/matrix.md.
"""

import datetime
import json
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import nox

nox.needs_version = '>=2024.4.15'
nox.options.default_venv_backend = 'uv|virtualenv'
nox.options.reuse_venv = 'yes'

TABLE = Path('docs/matrix.json')
TITLE = """# What was run with which versions

Written by `make matrix`, which by itself runs all tests that apply in every
environment; the column "tests" says where only some were run. A row is of the day and
the commit it names (`+`: with changes, `-`: not noted). Of the tests that are skipped
most are those of a GPU and, without kernels, those of the kernels.

"""
BUILD_TOOLS = ('pip', 'setuptools>=80,<81', 'wheel', 'ninja', 'packaging', 'psutil')
TORCH_2_4 = ('torch==2.4.*', 'numpy==1.26.*')
TORCH_2_8 = ('torch==2.8.*', 'numpy>=2')
NEWEST = ('torch', 'numpy>=2')
# Two files at a time, with a thread each.
IN_PAIRS = ('--numprocesses', '2', '--dist', 'loadfile')
TESTED_WITH = ('timm', 'onnx', 'onnxruntime', 'onnxscript', 'nbclient', 'ipykernel')


class Cell(NamedTuple):
    """An environment.

    Attributes:
        python: Its version.
        torch: Requirements, with numpy.
        mmcv: The distribution whose headers the kernels need; without it there are
            none, and no OpenMMLab.
        frameworks: Distributions of OpenMMLab; without them mmcv gives its headers
            alone.
    """

    python: str
    torch: tuple[str, ...]
    mmcv: str | None = None
    frameworks: tuple[str, ...] = ()


ONEDL_MMCV = 'onedl-mmcv==2.3.6'
ONEDL = (
    'onedl-mmengine==0.10.12',
    'onedl-mmdetection==3.5.1',
    'onedl-mmsegmentation==1.4.2',
    'onedl-mmpretrain==1.3.6',
)
ORIGINALS = (
    'mmengine==0.10.7',
    'mmdet==3.3.0',
    'mmsegmentation==1.2.2',
    'mmpretrain==1.2.0',
    *('ftfy', 'regex'),  # which mmsegmentation imports and does not ask for
)
CELLS = {
    'torch-2.4': Cell('3.10', TORCH_2_4),
    'torch-2.8': Cell('3.12', TORCH_2_8),
    'torch-newest': Cell('3.13', NEWEST),
    'kernels-2.4': Cell('3.10', TORCH_2_4, ONEDL_MMCV),
    'kernels-2.8': Cell('3.12', TORCH_2_8, ONEDL_MMCV),
    'kernels-newest': Cell('3.13', NEWEST, ONEDL_MMCV),
    'onedl-2.11': Cell(
        '3.11', ('torch==2.11.*', 'torchvision==0.26.*', 'numpy>=2'), ONEDL_MMCV, ONEDL
    ),
    'onedl-2.8': Cell('3.12', (*TORCH_2_8, 'torchvision==0.23.*'), ONEDL_MMCV, ONEDL),
    'onedl-newest': Cell('3.13', (*NEWEST, 'torchvision'), ONEDL_MMCV, ONEDL),
    'originals-2.4': Cell(
        '3.10', (*TORCH_2_4, 'torchvision==0.19.*'), 'mmcv==2.1.0', ORIGINALS
    ),
    'originals-2.11': Cell(
        '3.11',
        ('torch==2.11.*', 'torchvision==0.26.*', 'numpy==1.26.*'),
        'mmcv==2.1.0',
        ORIGINALS,
    ),
}
# What a row says of its environment.
PROBE = """
import json, platform
from importlib import metadata
import mmdgt.ops.extension as extension, numpy, torch
names = ('mmengine', 'mmcv', 'mmdet', 'mmdetection', 'mmsegmentation', 'mmpretrain')
names = [prefix + name for prefix in ('', 'onedl-') for name in names]
there = {x.metadata['Name']: x.version for x in metadata.distributions()}
print(json.dumps({
    'python': platform.python_version(),
    'machine': platform.machine(),
    'torch': torch.__version__,
    'numpy': numpy.__version__,
    'openmmlab': {name: there[name] for name in names if name in there},
    'kernels': extension.devices(),
}))
"""


def run(session: nox.Session, cell: Cell) -> None:
    """Set up an environment, test in it and write down how it went."""
    commit = revision(session)
    session.install(*cell.torch, *BUILD_TOOLS, 'pytest', 'pytest-xdist')
    if cell.mmcv:
        operators = bool(cell.frameworks)
        install_mmcv(session, cell.mmcv, operators)
    if cell.frameworks:
        session.install(*cell.torch, cell.mmcv, *cell.frameworks, *TESTED_WITH)
    session.install(
        '--no-build-isolation',
        '--no-deps',
        '--force-reinstall',
        '.',
        env={'MMDGT_WITH_OPS': '1' if cell.mmcv else '0'},
    )
    report = Path(session.create_tmp(), 'report.xml').resolve()
    session.run(
        # Not python -m: the package is to be the installed one.
        *('pytest', '-q', f'--junitxml={report}', *IN_PAIRS, *session.posargs),
        env={'OMP_NUM_THREADS': '1'},
        success_codes=[0, 1],
    )
    said = session.run('python', '-I', '-W', 'ignore', '-c', PROBE, silent=True)
    about = json.loads(said.splitlines()[-1])
    row = about | outcome(report) | {'tests': ' '.join(session.posargs) or 'all'}
    row['commit'] = commit
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows[session.name] = row
    TABLE.write_text(json.dumps(rows, indent=1) + '\n')
    TABLE.with_suffix('.md').write_text(TITLE + table(rows))
    if row['failed']:
        session.error(f'{len(row["failed"])} tests failed')


def install_mmcv(session: nox.Session, mmcv: str, operators: bool) -> None:
    """Install mmcv, built against the torch that is there, once for each of these."""
    code = 'import torch; print(torch.__version__)'
    torch = session.run('python', '-c', code, silent=True).strip()
    kind = 'operators' if operators else 'headers'
    wheels = Path('build/matrix', f'{mmcv}-{session.python}-{torch}-{kind}').resolve()
    if not wheels.exists():
        part = wheels.with_name(f'.part-{wheels.name}')
        session.run(
            *('python', '-m', 'pip', 'wheel', '--no-deps', '--no-cache-dir'),
            # Isolated, it does not see torch and leaves its operators out.
            *(('--no-build-isolation',) if operators else ()),
            *('--wheel-dir', str(part), mmcv),
            env={'MMCV_WITH_OPS': str(int(operators)), **compiler(session)},
        )
        part.rename(wheels)
    session.install('--no-deps', *map(str, wheels.glob('*.whl')))


def compiler(session: nox.Session) -> dict[str, str]:
    """The variable by which mmcv is compiled as C++20 where torch wants it."""
    needed = 'doctor.CPP20_WRAPPER * doctor.torch_wants_cpp20()'
    code = f'from mmdgt import doctor; print({needed})'
    said = session.run('python', '-W', 'ignore', '-c', code, silent=True)
    if not (command := said.splitlines()[-1]):
        return {}
    folder = Path(session.create_tmp()).resolve()
    with session.chdir(folder):
        session.run('sh', '-c', command, external=True)
    return {'CXX': str(folder / 'c++20'), 'NVCC_APPEND_FLAGS': '-std=c++20'}


def revision(session: nox.Session) -> str:
    """The commit, and whether anything but these tables differed from it."""

    def git(*command: str) -> str:
        return session.run('git', *command, silent=True, external=True).strip()

    everywhere = ('--porcelain', '--untracked-files=no', '--', ':!docs')
    return git('rev-parse', '--short=9', 'HEAD') + '+' * bool(
        git('status', *everywhere)
    )


def outcome(report: Path) -> dict:
    """Count the tests of a JUnit report, and name those that failed."""
    cases = list(ElementTree.parse(report).iter('testcase'))
    failed = [
        f'{case.get("classname")}::{case.get("name")}'
        for case in cases
        if case.find('failure') is not None or case.find('error') is not None
    ]
    skipped = sum(case.find('skipped') is not None for case in cases)
    return {
        'passed': len(cases) - skipped - len(failed),
        'skipped': skipped,
        'failed': failed,
        'date': datetime.date.today().isoformat(),
    }


def table(rows: dict[str, dict]) -> str:
    """The rows in the order of the cells, as Markdown."""
    lines = [
        '| environment | Python | torch | numpy | OpenMMLab | kernels | tests |'
        ' passed | skipped | failed | date | commit |',
        '| --- ' * 12 + '|',
    ]
    for name in sorted(rows, key=list(CELLS).index):
        row = rows[name]
        openmmlab = ', '.join(' '.join(pair) for pair in row['openmmlab'].items())
        cells = (
            *(name, row['python'], row['torch'], row['numpy'], openmmlab or 'none'),
            *(', '.join(row['kernels']) or 'none', row['tests']),
            *(row['passed'], row['skipped'], len(row['failed']), row['date']),
            row['commit'],
        )
        lines.append(f'| {" | ".join(map(str, cells))} |')
    failed = {name: row['failed'] for name, row in rows.items() if row['failed']}
    lines += [
        f'\nFailed in {name}: {", ".join(found)}.' for name, found in failed.items()
    ]
    return '\n'.join(lines) + '\n'


def make_session(name: str, cell: Cell) -> None:
    """Have nox know a cell."""

    @nox.session(name=name, python=cell.python)
    def session(session: nox.Session) -> None:
        run(session, cell)


for _name, _cell in CELLS.items():
    make_session(_name, _cell)
