"""What docs/stability.md promises: names, parameters, names and shapes of weights."""

import importlib
import inspect
import itertools
import re

import pytest
from conftest import REPOSITORY

import mmdgt
from mmdgt import cli

LITERALS = (int, float, str, tuple, dict, type(None))
PAGE = (REPOSITORY / 'docs/stability.md').read_text()
PYTHON, CONFIG, WEIGHTS = re.findall(r'^```\w+\n(.*?)^```$', PAGE, re.M | re.S)
PROMISES = re.sub(r'\n +', ' ', PYTHON + CONFIG).split('\n')
PROMISED = {line.partition('(')[0]: line for line in PROMISES if line}


def needed(name):
    """What has to be installed for a public name to be there."""
    needs = {'timm': ['timm'], 'openmmlab': ['mmengine', 'mmcv']}
    needs['detection'] = ['mmdet']
    return [need for part in name.split('.') for need in needs.get(part, ())]


def find(name):
    """The object of a dotted name, its module imported."""
    parts = name.split('.')
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f'{name} is not there')


def parameters(function):
    """Its parameters as they are written in a definition."""
    written = []
    for parameter in inspect.signature(function).parameters.values():
        stars = {parameter.VAR_POSITIONAL: '*', parameter.VAR_KEYWORD: '**'}
        text = stars.get(parameter.kind, '') + parameter.name
        by_keyword = parameter.kind is parameter.KEYWORD_ONLY
        if by_keyword and not any(entry.startswith('*') for entry in written):
            written.append('*')
        if parameter.default is not parameter.empty:
            literal = isinstance(parameter.default, LITERALS)
            text += f'={parameter.default!r}' if literal else '=...'
        written.append(text)
    return ', '.join(entry for entry in written if entry != 'self')


@pytest.mark.parametrize('name', PROMISED)
def test_what_is_promised_is_there(name):
    for need in needed(name):
        pytest.importorskip(need)
    found, promise = find(name), PROMISED[name]
    if '(' in promise:
        assert promise == f'{name}({parameters(found)})'


@pytest.mark.parametrize('module', ['mmdgt', 'mmdgt.ops', 'mmdgt.openmmlab'])
def test_all_that_is_exported_is_promised(module):
    for need in needed(module):
        pytest.importorskip(need)
    exported = importlib.import_module(module).__all__
    assert {f'{module}.{name}' for name in exported} <= PROMISED.keys()


def test_the_commands_are_promised():
    promise = re.search(r'The command `mmdgt` has (.*?)\.$', PAGE, re.M | re.S)[1]
    assert re.findall(r'`([\w-]+)`', promise) == list(cli.COMMANDS)


def test_all_that_configs_can_name_is_promised():
    """Whatever registers itself in a registry of mmengine."""
    registry = pytest.importorskip('mmengine.registry')
    pytest.importorskip('mmcv')
    names = (registry.HOOKS, registry.TRANSFORMS, registry.OPTIM_WRAPPERS)
    ours = {
        name
        for root in (*names, registry.OPTIM_WRAPPER_CONSTRUCTORS)
        for name, registered in root.module_dict.items()
        if registered.__module__.startswith('mmdgt.')
    }
    assert ours <= {name.rpartition('.')[2] for name in PROMISED}
    assert 'CentroidHook' in ours


def names(row):
    """'a.*.{b,c}' -> ['a.*.b', 'a.*.c']."""
    parts = re.split(r'\{(.*?)\}', row)
    choices = [part.split(',') if i % 2 else [part] for i, part in enumerate(parts)]
    return [''.join(choice) for choice in itertools.product(*choices)]


@pytest.mark.parametrize('post_norm', [False, True])
def test_weights_have_the_promised_names_and_shapes(post_norm):
    dims, heads, stem = (16, 32, 64, 128), (1, 2, 2, 4), 8
    arch = dict(dims=dims, depths=(1, 2, 1, 1), num_heads=heads, stem_dims=stem)
    model = mmdgt.DGT(arch | dict(post_norm=post_norm), num_groups=3)
    rows = (re.split(r'\s{2,}', row) for row in WEIGHTS.splitlines())
    promised = {name: shape for row, shape in rows for name in names(row)}
    found = set()
    for key, tensor in model.state_dict().items():
        numbers = re.findall(r'(?:^norm|^stages\.|blocks\.)(\d+)', key)
        name = re.sub(r'(^norm|^stages\.|blocks\.)\d+', r'\1*', key)
        found.add(name)
        i = int(numbers[0]) if numbers else 0
        sizes = dict(S=stem, C=dims[i], P=(stem, *dims)[i], H=heads[i], G=3)
        sizes['D'] = dims[i] // heads[i]
        assert tuple(tensor.shape) == eval(promised[name], sizes), key
    absent = set() if post_norm else {'stages.*.blocks.*.attention.logit_scale'}
    assert found == promised.keys() - absent
