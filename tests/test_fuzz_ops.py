"""Random calls of the operators, and that the fuzzer sees what is wrong."""

import importlib

import pytest
import torch

from mmdgt.ops import group_attention, select_keys


@pytest.fixture
def fuzz(tools):
    before = torch.get_num_threads()
    yield importlib.import_module('fuzz_ops')
    torch.set_num_threads(before)


def test_random_calls(fuzz):
    for number in range(150):
        fuzz.run_case(number)


def wrong_scale(query, key, value, group, index, scale):
    return group_attention(query, key, value, group, index, 1.02 * scale)


def wrong_gradient(query, key, value, group, index, scale):
    if key.requires_grad:
        key.register_hook(lambda grad: grad * 1.02)
    return group_attention(query, key, value, group, index, scale)


def another_group(query, key, value, group, index, scale):
    return group_attention(query, key, value, group.roll(1, -1), index, scale)


def last_keys(key, centroids, num_keys, sorted):
    return select_keys(-key, centroids, num_keys, sorted)


@pytest.mark.parametrize(
    'name, wrong, said',
    (
        ('group_attention', wrong_scale, 'off by'),
        ('group_attention', wrong_gradient, "key's gradient"),
        ('group_attention', another_group, 'off by'),
        ('select_keys', last_keys, 'a lower key'),
    ),
)
def test_what_is_wrong_is_found(fuzz, monkeypatch, name, wrong, said):
    monkeypatch.setattr(fuzz, name, wrong)
    with pytest.raises(AssertionError, match=said):
        for number in range(30):
            fuzz.run_case(number)
