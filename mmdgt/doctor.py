"""Say what is installed and what is wrong with it: ``mmdgt doctor``.

The exit status is 1 where something has to be fixed. Nothing but the standard
library is imported before it is looked at, so that no broken package keeps this
from speaking.
"""

import argparse
import importlib
import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .frameworks import CONTINUATION, FRAMEWORKS, OPENMMLAB
from .version import __version__

# The release series, the first and the last, that the tests run with (docs/matrix.md).
TESTED = {
    'torch': '2.4 to 2.15',
    'onedl-mmengine': '0.10',
    'onedl-mmcv': '2.3',
    'mmengine': '0.10',
    'mmcv': '2.1',
}
for framework in FRAMEWORKS.values():
    TESTED |= framework.tested
INSTALL = (
    'install torch and its build tools, then'
    ' "pip install --no-build-isolation onedl-mmcv", then what mmdgt is to serve: "pip'
    ' install onedl-mmsegmentation", onedl-mmdetection or onedl-mmpretrain'
)
FAILURE = Path(__file__).parent / '_ext_failure.txt'  # which setup.py writes
FAILURE_LINES = 8  # that are shown
# Compilers of C++20 for mmcv, which sets C++17 at the end of its flags, where the last
# one counts; nvcc appends what a variable says.
CPP20_WRAPPER = (
    r"""printf '#!/bin/sh\nexec c++ "$@" -std=c++20\n' > c++20 && chmod +x c++20"""
)
CPP20 = 'CXX=$PWD/c++20 NVCC_APPEND_FLAGS=-std=c++20'
LIBRARIES = (
    'install the libraries that OpenCV loads; on Debian or Ubuntu run: apt-get install'
    ' libgl1 libglib2.0-0'
)
# What an import error says, and what fixes it.
IMPORT_FIXES = {
    'pkg_resources': 'run: pip install "setuptools<81"',
    # As mmdet 3.3 and mmsegmentation 1.2 assert.
    'MMCV==2.2': 'run: pip install --no-build-isolation "mmcv<2.2"',
    # Of OpenCV, which links them, where Debian is as small as in a container.
    'libGL.so.1: cannot open': LIBRARIES,
    'libgthread-2.0.so.0: cannot open': LIBRARIES,
    'torchvision::nms': (
        'torch and torchvision are of different builds; install both in one command,'
        ' from one index: pip install --force-reinstall torch torchvision'
    ),
}


class Finding(NamedTuple):
    """What is wrong: its cause, its fix and whether it has to be fixed."""

    cause: str
    fix: str
    fails: bool = True


def diagnose() -> Iterator[Finding]:
    """Look for all that is known to go wrong, what causes the rest first."""
    installed = distributions()
    yield from check_forks(installed)
    yield from check_versions(installed)
    if error := import_error('torch'):
        yield Finding(
            f'torch does not import: {error}',
            'install it as https://pytorch.org says, then run this again',
        )
        return
    yield from check_openmmlab(installed)
    if error := import_error('mmdgt.ops'):
        yield Finding(
            f'mmdgt.ops does not import: {error}',
            'it needs torch 2.4 or later; run: pip install "torch>=2.4"',
        )
        return
    yield from check_extension()


def distributions() -> dict[str, list[str]]:
    """The distributions that carry each of OpenMMLab's import names."""
    carried = metadata.packages_distributions()
    return {name: sorted(set(carried.get(name, ()))) for name in OPENMMLAB}


def check_forks(installed: dict[str, list[str]]) -> Iterator[Finding]:
    """The originals and their continuation write into the same folders."""
    everything = sorted({name for names in installed.values() for name in names})
    continued = [name for name in everything if name.startswith(CONTINUATION)]
    original = [name for name in everything if name not in continued]
    if continued and original:
        yield Finding(
            f'both forks of OpenMMLab are installed, {", ".join(original)} beside'
            f' {", ".join(continued)}; they carry the same import names and overwrite'
            " each other's files",
            f'run: pip uninstall -y {" ".join(everything)}; then {INSTALL}',
        )


def check_versions(installed: dict[str, list[str]]) -> Iterator[Finding]:
    """Other versions may work as well, so they are warned of only."""
    for name in ('torch', *itertools.chain.from_iterable(installed.values())):
        version, series = version_of(name), TESTED.get(name)
        if not version or not series:
            continue
        first, _, last = series.partition(' to ')
        last = last or first
        if not _series(first) <= _series(version) <= _series(last):
            yield Finding(
                f'{name} {version} is none of the versions mmdgt is made for, {series}',
                f'if something goes wrong, run: pip install "{name}=={last}.*"',
                fails=False,
            )


def _series(version: str) -> tuple[int, ...]:
    """'2.11.0+cu130' as (2, 11)."""
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def check_openmmlab(installed: dict[str, list[str]]) -> Iterator[Finding]:
    """Whether OpenMMLab is there and imports, to the first part that does not."""
    there = [name for name in OPENMMLAB if importlib.util.find_spec(name)]
    frameworks = [name for name in FRAMEWORKS if name in there]
    for needed in (['mmengine'], ['mmcv'], FRAMEWORKS):
        if not set(needed) & set(there):
            # The network itself needs nothing of it.
            cause = f'{" or ".join(needed)} is not installed'
            yield Finding(cause, INSTALL, fails=bool(there))
            return
    deep = [f'{name}.models' for name in (*frameworks, 'mmdgt')]
    # A framework refuses an mmcv when it is imported, so before its operators, which
    # take long to build, are asked for.
    modules = ('mmengine', 'mmcv', *frameworks, 'mmcv._ext', *deep, 'mmdgt.openmmlab')
    for module in modules:
        if error := import_error(module):
            if module == 'mmcv._ext':
                finding = without_mmcv_operators(error, installed['mmcv'], frameworks)
            else:
                finding = Finding(f'{module} does not import: {error}', fix_of(error))
            yield finding
            if finding.fails:
                return


def fix_of(error: str) -> str:
    """What to do about an import error, given in one line."""
    for text, fix in IMPORT_FIXES.items():
        if text in error:
            return fix
    if missing := re.search(r"No module named '([^'.]+)'", error):
        return f'install what provides {missing[1]}; try: pip install {missing[1]}'
    return 'install versions that fit each other, of all that this names'


def without_mmcv_operators(
    error: str, carriers: list[str], frameworks: list[str]
) -> Finding:
    """The finding if mmcv._ext, which few frameworks need, does not import."""
    missing = error.startswith('ModuleNotFoundError')
    state = (
        'is missing, so mmcv was built without torch in sight'
        if missing
        else f'does not load, most likely for it was built for another torch: {error}'
    )
    lost = [name for name in frameworks if FRAMEWORKS[name].needs_operators]
    mmcv = carriers[0] if carriers else f'{CONTINUATION}mmcv'
    version = version_of(mmcv)
    uninstall, wrapper, variable, standard = '', '', '', ''
    if mmcv.endswith('-lite'):  # which never has any
        uninstall = f'pip uninstall -y {mmcv} && '
        mmcv = mmcv.removesuffix('-lite')
    if torch_wants_cpp20():
        wrapper, variable = f'{CPP20_WRAPPER} && ', f'{CPP20} '
        standard = "; mmcv is built as C++17, and this torch's headers want C++20"
    return Finding(
        f'mmcv._ext, the operators of mmcv (NMS, RoIAlign), {state}; '
        f'{" and ".join(lost) + " needs" if lost else "only detection needs"} it'
        f'{standard}',
        f'run: {uninstall}{wrapper}pip install ninja psutil packaging wheel'
        f' "setuptools<81" && {variable}pip install'
        ' --no-build-isolation --no-deps --force-reinstall --no-cache-dir'
        f' {mmcv}{f"=={version}" if version else ""}',
        fails=bool(lost) or not missing,
    )


def torch_wants_cpp20() -> bool:
    """Whether torch's headers refuse C++17, as they do from torch 2.14 on."""
    torch = importlib.util.find_spec('torch')
    if torch is None or torch.origin is None:
        return False
    header = Path(torch.origin).parent / 'include/ATen/ATen.h'
    return header.is_file() and '__cplusplus < 202002L' in header.read_text()


def check_extension() -> Iterator[Finding]:
    """Whether mmdgt's own kernels are there, for this torch and this GPU."""
    import torch

    from .ops import extension

    _, problem = extension.load()
    gpu = torch.cuda.is_available()
    wanted = gpu or os.getenv('FORCE_CUDA', '0') == '1'  # as setup.py sees it
    if wanted and 'cuda' not in extension.devices():
        problem = problem or 'the extension mmdgt._ext was built without CUDA kernels'
        yield from check_toolkit()
    elif gpu and not problem:
        problem = kernel_error()
    if problem:
        yield from check_compiler()
    if problem and FAILURE.is_file():
        lines = FAILURE.read_text().splitlines()[-FAILURE_LINES:]
        problem = '\n    '.join([f'{problem}; its build failed:', *lines])
    if problem:
        arch = '{}.{}'.format(*torch.cuda.get_device_capability()) if gpu else None
        environment = f' and TORCH_CUDA_ARCH_LIST={arch} in the environment'
        yield Finding(problem, extension.HOW_TO_BUILD + environment * gpu)


def check_compiler() -> Iterator[Finding]:
    """Whether there is the compiler that torch would build with."""
    compiler = os.environ.get('CXX', 'c++')
    if not shutil.which(compiler.split()[0]):
        yield Finding(
            f"there is no C++ compiler {compiler} to build mmdgt's kernels with",
            'install one, such as the package g++ or build-essential, or name one in'
            ' the variable CXX',
        )


def check_toolkit() -> Iterator[Finding]:
    """Whether there is an nvcc, and whether torch finds the toolkit by it."""
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not (nvcc := Path(home, 'bin', 'nvcc')).is_file():
        yield Finding(
            "there is no nvcc to build mmdgt's CUDA kernels with",
            f'install the CUDA toolkit {torch.version.cuda or ""} and export CUDA_HOME,'
            ' its folder',
        )
        return
    command = [str(nvcc), '--dryrun', '-c', '-x', 'cu', os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r'^#\$ TOP=(.*)$', plan, re.MULTILINE)
    toolkit = Path(top[1]).resolve() if top else None
    if toolkit and toolkit != Path(home).resolve():
        yield Finding(
            f'{nvcc} only calls the nvcc of {toolkit}, so torch looks for the CUDA'
            ' toolkit in the wrong folder',
            f'run: export CUDA_HOME={toolkit}',
        )


def kernel_error() -> str | None:
    """What goes wrong when the CUDA kernels run on this GPU, None if nothing does."""
    import torch

    from .ops import assign_queries, group_attention, select_keys, use_backend

    tokens = torch.ones(1, 1, 64, 32).cuda()
    centroids = tokens[0, :, :8]
    try:
        with use_backend('fused'):
            group = assign_queries(tokens, centroids)
            index = select_keys(tokens, centroids, num_keys=16)
            group_attention(tokens, tokens, tokens, group, index)
        torch.cuda.synchronize()
    except RuntimeError as error:
        if 'no kernel image' not in str(error):
            return f'the CUDA kernels of mmdgt._ext fail: {error}'
        return (
            'the extension mmdgt._ext was built for other GPUs than this'
            f' {torch.cuda.get_device_name()}'
        )
    return None


def import_error(name: str) -> str | None:
    """What importing a module raises, in one line; None if it imports."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken package raises whatever it likes
        return ' '.join(f'{type(error).__name__}: {error}'.split())
    return None


def version_of(distribution: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def inventory() -> Iterator[tuple[str, str]]:
    """What is installed, by its name."""
    yield 'python', f'{platform.python_version()}, {sys.executable}'
    if import_error('torch') is None:
        import torch

        yield 'torch', f'{torch.__version__}, built for CUDA {torch.version.cuda}'
        for i in range(torch.cuda.device_count()):
            capability = '{}.{}'.format(*torch.cuda.get_device_capability(i))
            yield 'GPU', f'{torch.cuda.get_device_name(i)}, capability {capability}'
        if not torch.cuda.is_available():
            yield 'GPU', 'none that torch can use'
    for name, carriers in distributions().items():
        versions = (f'{carrier} {version_of(carrier)}' for carrier in carriers)
        yield name, ', '.join(versions) or 'not installed'
    yield 'mmdgt', f'{__version__}, {Path(__file__).parent}'
    if import_error('mmdgt.ops') is None:
        from .ops import extension

        kernels = ' and '.join(extension.devices()).upper()
        yield 'mmdgt._ext', f'kernels for {kernels}' if kernels else 'not loaded'


def main() -> int:
    """Print what is installed and what is found, return the exit status."""
    argparse.ArgumentParser(
        prog='mmdgt doctor', description=__doc__.partition(':')[0]
    ).parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what they say is found below
        for name, value in inventory():
            print(f'{name:12}{value}')
        findings = list(diagnose())
    for finding in findings:
        kind = 'WRONG' if finding.fails else 'NOTE'
        print(f'\n{kind}: {finding.cause}\n  {finding.fix}')
    failed = any(finding.fails for finding in findings)
    if failed:
        print('\nFix the first that is WRONG, then run this again.')
    else:
        print('\nNothing is wrong.')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
