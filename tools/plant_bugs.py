"""Plants bugs in a copy of the CUDA kernels and shows that the emulation finds them.

Every bug is built into the emulation (docs/cuda.md) on its own and has to fail a few
tests of tests/test_ops_cuda.py in one of the emulation's modes; the kernels as they
are have to pass the same. Writes what caught each and fails where one goes unseen.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import add_out, find_out, machine, save

REPOSITORY = Path(__file__).resolve().parents[1]

# What a mode adds to the environment of the tests; the sanitizer comes first.
LATE = ('', {'MMDGT_EMULATE_COPIES': 'late'})
EARLY = ('', {'MMDGT_EMULATE_COPIES': 'early', 'MMDGT_EMULATE_SHUFFLE': '1'})
ADDRESS = ('address,undefined', {'ASAN_OPTIONS': 'detect_leaks=0'})
THREAD = (
    'thread',
    {'TSAN_OPTIONS': 'halt_on_error=1:ignore_noninstrumented_modules=1'},
)
LIBRARIES = {
    '': (),
    'address,undefined': ('libasan.so', 'libstdc++.so'),
    'thread': ('libtsan.so',),
}


@dataclasses.dataclass
class Bug:
    """A change of one place in a kernel, and who is to find it."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # as pytest's -k
    mode: tuple[str, dict[str, str]]


STAGES = 'test_attention and 2500-32-7-392-random and dtype2'
SORTED = 'test_attention and 1000-32-48-98-random and dtype2'
BUGS = (
    Bug(
        'a barrier is gone',
        'group_attention_backward.cu',
        """      __syncthreads();

      // dQ,""",
        """      // dQ,""",
        STAGES,
        EARLY,
    ),
    Bug(
        'a wait is off by one',
        'group_attention.cu',
        'ptx::wait_for_copies<1>();',
        'ptx::wait_for_copies<2>();',
        STAGES,
        LATE,
    ),
    Bug(
        'a __syncwarp is missing',
        'sort_queries.cu',
        """      __syncwarp();
      if (g[i] >= 0 && rank == 0)""",
        """      if (g[i] >= 0 && rank == 0)""",
        SORTED,
        EARLY,
    ),
    Bug(
        'an index is out of bounds',
        'assign_queries.cu',
        'if (token < end && nearest.owns_token()) {',
        'if (token <= end && nearest.owns_token()) {',
        'test_assignment_has_float32_accuracy and dtype2',
        ADDRESS,
    ),
    Bug(
        'a race in shared memory',
        'sort_queries.cu',
        'atomicAdd(&size[g], 1);',
        'size[g] += 1;',
        SORTED,
        THREAD,
    ),
    Bug(
        'a wrong layout of mma',
        'masked_attention_backward.cu',
        'const int column = from + row + 8 * n + 2 * (lane % 4);',
        'const int column = from + row + 8 * n + 2 * (lane / 8);',
        'test_attention and 196-32-48-98-random and dtype2',
        LATE,
    ),
)


def build(folder: Path, sanitizer: str) -> None:
    """Compile the emulation in a copy of the sources."""
    target = f'build/{sanitizer or "plain"}'
    command = [sys.executable, 'setup.py', '-q', 'build_ext']
    subprocess.run(
        [*command, '--build-lib', target, '--build-temp', target],
        cwd=folder,
        env={**os.environ, 'MMDGT_EMULATE': '1', 'MMDGT_SANITIZE': sanitizer},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def failure(folder: Path, tests: str, mode: tuple[str, dict[str, str]]) -> str:
    """What the tests with the emulation in that folder fail with, '' if they pass."""
    sanitizer, environment = mode
    libraries = [
        subprocess.check_output(['gcc', f'-print-file-name={name}'], text=True).strip()
        for name in LIBRARIES[sanitizer]
    ]
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider']
    result = subprocess.run(
        [*command, '--capture=sys', 'tests/test_ops_cuda.py', '-k', tests],
        cwd=REPOSITORY,
        env={
            **os.environ,
            **environment,
            'OMP_NUM_THREADS': '1',
            'LD_PRELOAD': ' '.join(libraries),
            'MMDGT_EMULATED': str(folder / 'build' / (sanitizer or 'plain')),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode == 5:
        raise RuntimeError(f'no test is called {tests!r}')
    if result.returncode == 0:
        return ''
    lines = result.stdout.splitlines()
    told = [
        x for x in lines if re.match('SUMMARY: |.*emulation: |.*runtime error|E ', x)
    ]
    return (told or lines)[0].strip()


def check_place(bug: Bug) -> None:
    """Raise unless the kernel has what the bug changes, once."""
    found = (REPOSITORY / 'csrc' / 'cuda' / bug.file).read_text().count(bug.old)
    if found != 1:
        raise ValueError(
            f'{bug.file} should have once what "{bug.name}" changes, {bug.old!r}, and'
            f' has it {found} times; name another place'
        )


def plant(bug: Bug, folder: Path) -> str:
    """What the bug is caught by, '' if it goes unseen."""
    kernel = folder / 'csrc' / 'cuda' / bug.file
    source = kernel.read_text()
    build(folder, bug.mode[0])
    if told := failure(folder, bug.tests, bug.mode):
        raise RuntimeError(f'{bug.tests} fails without "{bug.name}": {told}')
    kernel.write_text(source.replace(bug.old, bug.new))
    build(folder, bug.mode[0])
    told = failure(folder, bug.tests, bug.mode)
    kernel.write_text(source)
    return told


def main() -> None:
    """Plant all bugs, or those whose names contain a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', default='', help='a part of the names of bugs')
    add_out(parser, REPOSITORY / 'docs/cuda/planted_bugs.json', 'what caught them')
    args = parser.parse_args()
    out = find_out(parser, args)
    bugs = [bug for bug in BUGS if args.only in bug.name]
    for bug in bugs:  # before the first is compiled
        check_place(bug)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(REPOSITORY / 'csrc', folder / 'csrc')
        for file in ('setup.py', 'pyproject.toml', 'README.md', 'mmdgt/version.py'):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / file, folder / file)
        for bug in bugs:
            sanitizer, environment = bug.mode
            rows.append(
                {
                    'bug': bug.name,
                    'kernel': bug.file,
                    'sanitizer': sanitizer or None,
                    'copies': environment.get('MMDGT_EMULATE_COPIES', 'late'),
                    'tests': bug.tests,
                    'caught_by': plant(bug, folder).replace(f'{folder}/', '') or None,
                }
            )
            print(f'{bug.name}: {rows[-1]["caught_by"] or "UNSEEN"}', flush=True)
    save(out, machine('cpu'), bugs=rows)
    sys.exit(not all(row['caught_by'] for row in rows))


if __name__ == '__main__':
    main()
