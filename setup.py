"""Builds mmdgt._ext, the compiled operators (the metadata is in pyproject.toml).

The extension needs torch and the C++ headers that mmcv ships, so build without
isolation: ``pip install --no-build-isolation .``. Where either is missing, or where the
compiler fails, the package installs without it and runs on its plain PyTorch operators;
``python -m mmdgt.doctor`` says what the compiler said.

Environment: MMDGT_WITH_OPS=0 leaves the extension out, MMDGT_WITH_OPS=1 fails where it
cannot be built; FORCE_CUDA=1 compiles the CUDA part on a machine without a GPU;
TORCH_CUDA_ARCH_LIST and MAX_JOBS as for any PyTorch extension;
MMDGT_SANITIZE=address,undefined or =thread builds with these sanitizers and
MMDGT_EMULATE=1 the CUDA kernels for the CPU in place of its own (docs/cuda.md): see the
Makefile for how to test either.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from setuptools import setup

FAILURE = '_ext_failure.txt'  # in the package; the doctor reads it


def insisted() -> bool:
    """Whether an installation without the operators is none."""
    return os.getenv('MMDGT_WITH_OPS') == '1'


def skip(reason: str) -> dict:
    """What setup() is told to install plain Python, and tells the user why."""
    if insisted():
        sys.exit(f'MMDGT_WITH_OPS is 1, but {reason}')
    print(
        f'mmdgt is installed without its compiled operators: {reason}', file=sys.stderr
    )
    return {}


def mmcv_headers() -> Path | None:
    """The folder of mmcv's C++ headers, found without importing mmcv."""
    spec = importlib.util.find_spec('mmcv')
    if spec is None or spec.origin is None:
        return None
    headers = Path(spec.origin).parent / 'ops' / 'csrc' / 'common'
    found = (headers / 'pytorch_device_registry.hpp').is_file()
    return headers if found else None


def compiler_accepts(flag: str) -> bool:
    """Whether the C++ compiler compiles and links a program with the flag."""
    compiler = os.environ.get('CXX', 'c++').split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'try.cpp')
        source.write_text('int main() { return 0; }\n')
        command = [*compiler, flag, str(source), '-o', str(source.with_suffix(''))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def with_cuda() -> bool:
    """Whether to compile the CUDA part."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.cuda.is_available() and os.getenv('FORCE_CUDA', '0') != '1':
        return False
    if CUDA_HOME is None or not Path(CUDA_HOME, 'bin', 'nvcc').is_file():
        advice = "nvcc was not found; set CUDA_HOME to the toolkit's folder"
        if insisted():
            sys.exit(f'MMDGT_WITH_OPS is 1, but {advice}')
        print(f'The CUDA operators are left out: {advice}', file=sys.stderr)
        return False
    return True


def kernels_for_cpu() -> list[str]:
    """The emulation and, as C++ files that include them, the CUDA kernels."""
    folder = Path('build', 'cuda_as_cpp')
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(glob('csrc/emulation/*.cpp') + glob('csrc/cuda/*.cpp'))
    for kernel in sorted(glob('csrc/cuda/*.cu')):
        source = folder / f'{Path(kernel).stem}.cpp'
        if not source.is_file():
            source.write_text(f'#include "{Path(kernel).relative_to("csrc")}"\n')
        sources.append(str(source))
    return sources


@contextlib.contextmanager
def copied_to(log: Path) -> Iterator[None]:
    """Write to a file as well what this process and its children print."""
    with subprocess.Popen(['tee', str(log)], stdin=subprocess.PIPE) as tee:
        sys.stdout.flush()
        sys.stderr.flush()
        before = os.dup(1), os.dup(2)
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for standard, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, standard)
                os.close(copy)
            tee.stdin.close()


@contextlib.contextmanager
def told_of_failures(extensions: list) -> Iterator[None]:
    """Have setuptools raise what goes wrong, which it only prints of optional ones.

    Behind it they are optional: one that is not there is not copied.
    """
    for extension in extensions:
        extension.optional = False
    try:
        yield
    finally:
        for extension in extensions:
            extension.optional = True


def tolerant(build_extension: type) -> type:
    """A build_ext that writes down why it failed, in the package, and goes on."""

    class TolerantBuild(build_extension):
        def build_extensions(self) -> None:
            package = Path('.' if self.inplace else self.build_lib, 'mmdgt')
            package.mkdir(parents=True, exist_ok=True)
            failure = package / FAILURE
            failure.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder, 'log.txt')
                try:
                    with copied_to(log), told_of_failures(self.extensions):
                        super().build_extensions()
                except Exception as error:
                    if insisted():
                        raise
                    said = log.read_text(errors='replace').splitlines()
                    lines = [x for x in said if 'error' in x.lower()] or said
                    failure.write_text('\n'.join([*lines[-20:], str(error), '']))
                    skip(f'building them failed ({error})')

    return TolerantBuild


def compiled_operators() -> dict:
    """The extension as setup() takes it, nothing where it cannot be built."""
    if os.getenv('MMDGT_WITH_OPS', '1') == '0':
        return skip('MMDGT_WITH_OPS is 0')
    if os.name == 'nt':
        return skip('they are written for GCC and Clang')
    if importlib.util.find_spec('torch') is None:
        return skip('torch is not installed, or --no-build-isolation is missing')
    headers = mmcv_headers()
    if headers is None:
        return skip("mmcv's C++ headers were not found; install onedl-mmcv first")

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # GCC warns of the undefined registers inside its own intrinsics.
    cxx, link, macros = ['-O3', '-g0', '-Wno-maybe-uninitialized'], [], []
    if compiler_accepts('-fopenmp'):  # without it at::parallel_for is serial
        # Not linked: the runtime is the one that torch brings. A second one would have
        # threads of its own, and may be missing where the wheel goes.
        cxx += ['-fopenmp']
    emulate = os.getenv('MMDGT_EMULATE', '0') == '1'
    if emulate:
        # As nvcc has it, types alias and a * b + c is rounded once.
        cxx += ['-fno-strict-aliasing', '-march=native', '-Wno-unknown-pragmas', '-O2']
    if sanitizers := os.getenv('MMDGT_SANITIZE'):
        sanitize = [f'-fsanitize={sanitizers}', '-fno-sanitize-recover=all']
        cxx += [*sanitize, '-O1', '-g', '-fno-omit-frame-pointer']
        link += sanitize
    sources = sorted(glob('csrc/*.cpp'))
    includes = [str(Path('csrc').resolve()), str(headers)]
    extension, flags = CppExtension, {'cxx': cxx}
    if emulate:
        sources += kernels_for_cpu()
        macros.append(('MMDGT_EMULATE', None))
    else:
        sources += sorted(glob('csrc/cpu/*.cpp'))
        if with_cuda():
            extension = CUDAExtension
            sources += sorted(glob('csrc/cuda/*.cu') + glob('csrc/cuda/*.cpp'))
            includes.append(str(headers / 'cuda'))
            macros.append(('MMDGT_WITH_CUDA', None))
            flags['nvcc'] = ['-O3']
    return {
        'ext_modules': [
            extension(
                name='mmdgt._ext',
                sources=sources,
                include_dirs=includes,
                define_macros=macros,
                extra_compile_args=flags,
                extra_link_args=link,
                optional=True,
            )
        ],
        'cmdclass': {'build_ext': tolerant(BuildExtension)},
    }


setup(**compiled_operators())
