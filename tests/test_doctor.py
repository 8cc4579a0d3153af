"""The doctor names the cause and the fix of every broken installation."""

import os
import re
import shutil
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import mmcv
import pytest
import torch
from conftest import REPOSITORY

import mmdgt
from mmdgt import doctor
from mmdgt.ops import extension

# Every test breaks a healthy installation in one place.
for _part in ('mmcv._ext', 'mmdgt._ext'):
    pytest.importorskip(_part, reason='not built', exc_type=ImportError)

NO_FILE = 'cannot open shared object file: No such file or directory'
REBUILD = '--no-build-isolation --no-deps --force-reinstall'


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['doctor'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.delenv('FORCE_CUDA', raising=False)


@pytest.fixture(name='site')
def _site(tmp_path, monkeypatch):
    """A folder in front of the path; installs distributions that are empty."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(**versions):
        for name, version in versions.items():
            name, top = name.replace('_', '-'), name.split('_')[-1]
            info = tmp_path / f'{name}-{version}.dist-info'
            info.mkdir()
            content = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
            (info / 'METADATA').write_text(content)
            (info / 'top_level.txt').write_text(top)
        return tmp_path

    return install


@pytest.fixture
def ill(capsys):
    """Run the doctor, which must fail; what it says is wrong and how to fix it."""

    def run():
        assert doctor.main() == 1
        blocks = capsys.readouterr().out.split('\n\n')
        wrong = [block for block in blocks if block.startswith('WRONG: ')]
        return [block.removeprefix('WRONG: ').split('\n  ') for block in wrong]

    return run


@pytest.fixture
def other_than_these(monkeypatch):
    """Of distributions, only those that a test puts in front are found."""
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if 'site-packages' not in p])


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch can use, and an extension with kernels for it."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: 'Fast GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    monkeypatch.setattr(extension, 'load', lambda: (True, None))
    monkeypatch.setattr(extension, 'devices', lambda: ['cpu', 'cuda'])


def test_both_forks(site, ill):
    site(mmcv='2.1.0', onedl_mmcv='2.3.6')
    (cause, fix), *_ = ill()
    assert 'both forks' in cause and 'mmcv beside' in cause and 'onedl-mmcv' in cause
    uninstall, install = fix.split('; then ')
    assert {'mmcv', 'onedl-mmcv'} <= set(uninstall.split())
    assert 'pip install --no-build-isolation onedl-mmcv' in install


def test_one_fork_alone(site, other_than_these):
    """Parts of both are as bad where no name clashes: each wants its own rest."""
    site(mmengine='0.10.7', mmcv='2.1.0')
    assert not list(doctor.check_forks(doctor.distributions()))
    site(onedl_mmdet='3.5.1')
    (finding,) = doctor.check_forks(doctor.distributions())
    assert finding.fails and 'onedl-mmdet' in finding.cause


def test_a_version_with_letters(site, other_than_these):
    site(mmengine='0.11rc1')
    (finding,) = doctor.check_versions(doctor.distributions())
    assert 'mmengine 0.11rc1 is none of the versions' in finding.cause


def test_other_versions_are_a_note(site, other_than_these):
    site(mmengine='0.10.9', mmcv='2.2.0', torch='2.11.1+cu130')
    (finding,) = doctor.check_versions(doctor.distributions())
    assert 'mmcv 2.2.0' in finding.cause and '"mmcv==2.1.*"' in finding.fix
    assert not finding.fails


@pytest.mark.parametrize(
    'version, noted', [('2.3.1', 1), ('2.4.0', 0), ('2.8.0+cpu', 0), ('3.0.0', 1)]
)
def test_every_torch_of_the_matrix_will_do(site, version, noted):
    site(torch=version)
    assert len(list(doctor.check_versions({}))) == noted


def test_mmcv_without_operators(monkeypatch, ill):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    ((cause, fix),) = ill()
    assert 'mmcv._ext' in cause and 'is missing' in cause
    carrier = metadata.packages_distributions()['mmcv'][0]
    assert fix.endswith(f'--no-cache-dir {carrier}=={metadata.version(carrier)}')


def test_detection_alone_needs_them():
    error = "ModuleNotFoundError: No module named 'mmcv._ext'"
    assert not doctor.without_mmcv_operators(error, ['mmcv'], ['mmseg']).fails
    assert doctor.without_mmcv_operators(error, ['mmcv'], ['mmdet']).fails


def test_mmcv_lite_never_has_them():
    """Nothing is won by installing it anew."""
    error = "ModuleNotFoundError: No module named 'mmcv._ext'"
    fix = doctor.without_mmcv_operators(error, ['mmcv-lite'], ['mmdet']).fix
    assert fix.startswith('run: pip uninstall -y mmcv-lite && pip install ninja')
    assert fix.endswith('--no-cache-dir mmcv')


@pytest.mark.parametrize('standard, wanted', [('201703L', False), ('202002L', True)])
def test_a_torch_that_wants_another_standard(site, monkeypatch, standard, wanted):
    """mmcv 2.3 and below say -std=c++17 last, which torch 2.14 refuses."""
    headers = site() / 'torch/include/ATen'
    headers.mkdir(parents=True)
    (site() / 'torch/__init__.py').touch()
    (headers / 'ATen.h').write_text(f'#if __cplusplus < {standard}\n#error\n#endif\n')
    monkeypatch.delitem(sys.modules, 'torch')
    assert doctor.torch_wants_cpp20() == wanted
    error = "ModuleNotFoundError: No module named 'mmcv._ext'"
    finding = doctor.without_mmcv_operators(error, ['mmcv'], ['mmdet'])
    assert ('want C++20' in finding.cause) == wanted
    compilers = 'CXX=$PWD/c++20 NVCC_APPEND_FLAGS=-std=c++20 pip install'
    assert (compilers in finding.fix) == wanted


def test_the_compiler_of_another_standard(tmp_path):
    """The last -std counts."""
    subprocess.run(doctor.CPP20_WRAPPER, shell=True, check=True, cwd=tmp_path)
    (tmp_path / 'a.cpp').write_text('static_assert(__cplusplus >= 202002L);')
    command = ['./c++20', '-std=c++17', '-c', 'a.cpp']
    subprocess.run(command, check=True, cwd=tmp_path)


@pytest.mark.parametrize('package', [mmcv, mmdgt])
def test_an_extension_that_does_not_load(tmp_path, monkeypatch, ill, package):
    (tmp_path / '_ext.so').write_bytes(b'of another world')
    monkeypatch.setattr(package, '__path__', [str(tmp_path), *package.__path__])
    monkeypatch.delitem(sys.modules, f'{package.__name__}._ext', raising=False)
    ((cause, fix),) = ill()
    assert f'{package.__name__}._ext' in cause and 'another torch' in cause
    assert REBUILD in fix


def test_own_extension_missing(monkeypatch, ill):
    monkeypatch.setitem(sys.modules, 'mmdgt._ext', None)
    assert ill() == [['the extension mmdgt._ext is not built', extension.HOW_TO_BUILD]]


def test_own_extension_whose_build_failed(tmp_path, monkeypatch, ill):
    lines = [f'kernels.cpp:{i}: error: bad' for i in range(30)]
    (tmp_path / 'failure.txt').write_text('\n'.join(lines))
    monkeypatch.setattr(doctor, 'FAILURE', tmp_path / 'failure.txt')
    monkeypatch.setitem(sys.modules, 'mmdgt._ext', None)
    ((cause, *said, fix),) = ill()
    assert cause == 'the extension mmdgt._ext is not built; its build failed:'
    assert [line.strip() for line in said] == lines[-8:]
    assert fix == extension.HOW_TO_BUILD


def test_own_extension_of_another_torch(monkeypatch, ill):
    other = SimpleNamespace(torch_version='2.4.0')
    monkeypatch.setitem(sys.modules, 'mmdgt._ext', other)
    ((cause, fix),) = ill()
    assert 'built for torch 2.4.0' in cause and torch.__version__ in cause
    assert REBUILD in fix


@pytest.mark.parametrize(
    'version',
    ['2.11.0', '2.11.0+cu130', '2.11.0a0+ecf3bae.nv26.01', '2.11.0.dev20260107+cpu'],
)
def test_own_extension_of_this_torch(monkeypatch, recwarn, version):
    """Headers name the release alone, also those of a container or a nightly."""
    own = SimpleNamespace(torch_version='2.11.0', limits={'heads': 1})
    monkeypatch.setitem(sys.modules, 'mmdgt._ext', own)
    monkeypatch.setattr(torch, '__version__', version)
    assert extension.load() == ({'heads': 1}, None)
    assert not recwarn
    own.torch_version = '2.10.0'
    with pytest.warns(UserWarning, match=r'built for torch 2\.10\.0, this is 2\.11'):
        extension.load()


def test_own_extension_of_another_gpu(gpu, monkeypatch, ill):
    def fail(*_):
        raise RuntimeError('CUDA error: no kernel image is available for execution')

    monkeypatch.setattr(torch.Tensor, 'cuda', lambda x: x)
    monkeypatch.setattr(torch.cuda, 'synchronize', fail)
    ((cause, fix),) = ill()
    assert 'built for other GPUs than this Fast GPU' in cause
    assert REBUILD in fix and 'TORCH_CUDA_ARCH_LIST=9.0' in fix


@pytest.mark.parametrize('wanted_by', ['gpu', 'FORCE_CUDA'])
def test_no_toolkit(wanted_by, request, monkeypatch, ill):
    if wanted_by == 'gpu':
        request.getfixturevalue('gpu')
    else:
        monkeypatch.setenv('FORCE_CUDA', '1')
    monkeypatch.setattr(extension, 'devices', lambda: ['cpu'])
    monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', None)
    (cause, fix), (missing, _) = ill()
    assert 'no nvcc' in cause and 'export CUDA_HOME' in fix
    assert 'without CUDA kernels' in missing


def test_an_nvcc_that_calls_another(tmp_path, gpu, monkeypatch, ill):
    nvcc = tmp_path / 'bin/nvcc'
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "#\\$ TOP=/opt/cuda/bin/.." >&2\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(extension, 'devices', lambda: ['cpu'])
    monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', str(tmp_path))
    (cause, fix), _ = ill()
    assert 'only calls the nvcc of /opt/cuda' in cause
    assert fix == 'run: export CUDA_HOME=/opt/cuda'


@pytest.mark.parametrize(
    ('module', 'error', 'fix'),
    [
        ('mmengine', "No module named 'pkg_resources'", 'pip install "setuptools<81"'),
        ('mmseg.models', "No module named 'ftfy'", 'pip install ftfy'),
        ('mmpretrain.models', 'torchvision::nms does not exist', 'torch and torchvis'),
        ('mmdet', 'MMCV==2.2.0 is used but incompatible', '"mmcv<2.2"'),
        ('mmengine', f'libGL.so.1: {NO_FILE}', 'apt-get install libgl1 libglib2.0-0'),
        ('mmcv', f'libgthread-2.0.so.0: {NO_FILE}', 'libgl1 libglib2.0-0'),
        ('mmdgt.openmmlab', "cannot import name 'analysis'", 'versions that fit'),
        ('mmdgt.ops', "no attribute 'register_fake'", 'torch>=2.4'),
    ],
)
def test_imports_that_fail(monkeypatch, ill, module, error, fix):
    original = doctor.import_error
    fail = {module: f'SomeError: {error}'}
    monkeypatch.setattr(doctor, 'import_error', lambda m: fail.get(m, original(m)))
    ((cause, advice),) = ill()
    assert f'{module} does not import' in cause and error in cause
    assert fix in advice


def test_no_operators_for_an_mmcv_that_is_refused(monkeypatch, ill):
    """They take long to build, and for nothing."""
    fail = {'mmdet': 'AssertionError: MMCV==2.2.0', 'mmcv._ext': 'ModuleNotFoundError'}
    monkeypatch.setattr(doctor, 'import_error', fail.get)
    ((cause, fix),) = ill()
    assert cause.startswith('mmdet does not import') and '"mmcv<2.2"' in fix


def test_a_healthy_installation(capsys):
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said and mmdgt.__version__ in said
    assert 'kernels for CPU' in said and 'Nothing is wrong' in said


@pytest.fixture
def environment(tmp_path):
    """An environment with the packages of this one, but for what a test takes out.

    Returns the folder of its packages, and a function that runs the doctor there: its
    exit status and what it says.
    """
    folder = tmp_path / 'site-packages'
    folder.mkdir()
    for place in (Path(path) for path in site.getsitepackages()):
        for entry in place.iterdir():
            if entry.suffix not in ('.pth', '.egg-link') and 'mmdgt' not in entry.name:
                (folder / entry.name).symlink_to(entry)
    own = folder / 'mmdgt'
    own.mkdir()
    for entry in Path(mmdgt.__file__).parent.iterdir():
        if entry.suffix == '.py' or entry.is_dir():
            (own / entry.name).symlink_to(entry)
    (extension_file,) = Path(mmdgt.__file__).parent.glob('_ext*.so')
    shutil.copy(extension_file, own)

    def run(**variables):
        done = subprocess.run(
            [sys.executable, '-S', '-m', 'mmdgt.doctor'],
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(folder), **variables},
            cwd=tmp_path,
        )
        assert 'Traceback' not in done.stderr, done.stderr
        return done.returncode, done.stdout

    return folder, run


def take_out(folder, names):
    """Remove the files of a package, which lies there as a link, by their patterns."""
    source = folder.resolve()
    folder.unlink()
    folder.mkdir()
    for entry in source.iterdir():
        if not any(entry.match(name) for name in names):
            (folder / entry.name).symlink_to(entry)


def test_really_healthy(environment):
    status, said = environment[1]()
    assert status == 0, said


def test_really_without_mmcv(environment):
    folder, run = environment
    for entry in folder.glob('*mmcv*'):
        entry.unlink()
    status, said = run()
    assert status == 1
    assert 'WRONG: mmcv is not installed\n  install torch' in said
    assert 'pip install --no-build-isolation onedl-mmcv' in said


def test_really_without_operators_of_mmcv(environment):
    """As mmcv builds where no torch is in sight."""
    folder, run = environment
    take_out(folder / 'mmcv', ['_ext*'])
    status, said = run()
    assert status == 1
    assert 'mmcv._ext, the operators of mmcv (NMS, RoIAlign), is missing' in said
    assert '--no-cache-dir onedl-mmcv==' in said


def test_really_of_another_torch(environment):
    """A symbol of torch that the extension wants and this torch does not have."""
    folder, run = environment
    (file,) = (folder / 'mmdgt').glob('_ext*.so')
    content = file.read_bytes()
    wanted = re.search(rb'\0(_ZN3c106detail14torch[^\0]+)\0', content)[1]
    file.write_bytes(content.replace(wanted, wanted[:-1] + b'0'))
    status, said = run()
    assert status == 1
    assert 'WRONG: mmdgt._ext' in said.replace('the extension ', ''), said
    assert 'undefined symbol' in said and REBUILD in said


def test_really_without_a_compiler(environment, tmp_path):
    folder, run = environment
    (file,) = (folder / 'mmdgt').glob('_ext*.so')
    file.unlink()
    status, said = run(PATH=str(tmp_path), CXX='c++')
    assert status == 1
    assert 'there is no C++ compiler c++' in said and 'build-essential' in said
    assert 'the extension mmdgt._ext is not built' in said
    assert 'no C++ compiler' not in run()[1]


@pytest.mark.parametrize('torch_works', [False, True])
def test_it_speaks_where_nothing_imports(tmp_path, torch_works):
    """In a Python of its own, where torch or mmcv is a broken file."""
    for name in ('mmcv',) if torch_works else ('torch', 'mmengine'):
        (tmp_path / f'{name}.py').write_text('raise OSError("libc10.so not found")')
    result = subprocess.run(
        [sys.executable, '-m', 'mmdgt.doctor'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{REPOSITORY}'},
    )
    assert result.returncode == 1, result.stderr
    broken = 'mmcv' if torch_works else 'torch'
    assert f'WRONG: {broken} does not import: OSError: libc10.so' in result.stdout
    assert 'python -m mmdgt.doctor' in result.stderr  # the package's own warning


def test_names_that_are_not_there(monkeypatch):
    monkeypatch.setattr(mmdgt, '_problem', OSError('libc10.so'))
    monkeypatch.delattr(mmdgt, 'DGT')
    with pytest.raises(ImportError, match=r'mmdgt.DGT .*libc10.so.*mmdgt\.doctor'):
        from mmdgt import DGT  # noqa: F401
    assert not hasattr(mmdgt, 'no_such_name')
