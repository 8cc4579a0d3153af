"""The comparison of two checkouts' kernels, of this one with itself on a CPU."""

import json

import pytest
from conftest import REPOSITORY

from mmdgt.ops import extension

pytestmark = pytest.mark.skipif(
    'cpu' not in extension.devices(), reason='needs the compiled kernels'
)


def run(run_tool, out, *folders, **options):
    words = [word for name, value in options.items() for word in (f'--{name}', value)]
    run_tool(
        *('compare_kernels.py', *folders, '--device', 'cpu', '--sets', 'A3'),
        *('--batch', 1, '--rounds', 2, '--budget', 0, '--out', out, *words),
        check=False,
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_of_both_checkouts(run_tool, tmp_path):
    rows = run(run_tool, tmp_path / 'rows.jsonl', REPOSITORY, REPOSITORY)
    assert 'torch' in rows.pop(0)['machine']
    while 'rate' in rows[0]:
        assert rows.pop(0)['per_second'] > 0
    found = [(row['pass'], row['tree']) for row in rows]
    passes = ('inference', 'forward', 'backward', 'step')
    assert found == [(x, tree) for x in passes for tree in ('base', 'candidate')]
    for row in rows:
        assert row['us'] > 0 and row['rounds'] == 2
    assert 'mmdgt::group_attention' in rows[0]['kernels']
    assert 'mmdgt::group_attention_backward' in rows[-1]['kernels']


def test_a_checkout_that_fails_does_not_stop_the_other(run_tool, tmp_path):
    package = tmp_path / 'broken' / 'mmdgt'
    (package / 'ops').mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / 'ops' / '__init__.py').write_text('raise ImportError("broken")')
    out = tmp_path / 'rows.jsonl'
    rows = run(run_tool, out, package.parent, REPOSITORY, passes='inference')
    base, candidate = rows[-2:]
    assert 'error' in base and 'us' not in base and candidate['us'] > 0


def test_no_case_begins_after_the_time_given(run_tool, tmp_path):
    out = tmp_path / 'rows.jsonl'
    rows = run(run_tool, out, REPOSITORY, REPOSITORY, seconds=0)
    assert not any('pass' in row for row in rows)
