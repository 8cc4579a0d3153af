"""The command that evaluates one network with several K."""

import json

import pytest

pytest.importorskip('mmseg')


@pytest.fixture
def sweep_keys(tiny_models, demo_data, call_tool, tmp_path):
    def run(*keys, options=()):
        config, checkpoint = tiny_models['mmseg']
        call_tool(
            'sweep_keys',
            *(config, checkpoint, '--num-keys', *keys, '--rounds', 1),
            *('--out', tmp_path / 'keys', '--work-dir', tmp_path / 'runs'),
            *('--cfg-options', f'data_root={demo_data}/ade20k', *options),
        )
        return json.loads((tmp_path / 'keys.json').read_text())

    return run


def test_every_k_without_training(sweep_keys, tmp_path):
    content = sweep_keys(256, 2)
    assert content['machine']['trained_with'] == 20
    rows = {row['K']: row for row in content['results']}
    assert list(rows) == [2, 256, 'all']
    assert all(0 <= row['score'] <= 100 and row['ms'] > 0 for row in rows.values())
    # A scene of 64 pixels has 256 tokens in stage 1.
    assert rows[256]['score'] == rows['all']['score']
    assert (tmp_path / 'keys.png').read_bytes().startswith(b'\x89PNG')


def test_the_config_of_a_resumed_training(sweep_keys, tmp_path, capfd):
    """The Runner leaves it in the work dir, beside other checkpoints."""
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs/iter_1.pth').write_bytes(b'damaged')
    rows = sweep_keys(2, options=['resume=auto'])['results']
    assert [row['K'] for row in rows] == [2, 'all']
    assert 'iter_1.pth' not in ''.join(capfd.readouterr())


def test_the_config_of_a_training_with_averaged_weights(sweep_keys):
    rows = sweep_keys(2, options=['default_hooks.ema.type=EMAHook'])['results']
    assert [row['K'] for row in rows] == [2, 'all']


def test_an_unknown_metric(sweep_keys):
    with pytest.raises(ValueError, match=r"--metric must be one of \['aAcc', .*'mIoU'"):
        sweep_keys(2, '--metric', 'mIOU')


def test_no_network_without_k(sweep_keys):
    with pytest.raises(ValueError, match='num_keys'):
        sweep_keys(0)
