"""`choose_and_attend` in plain PyTorch: what its kernel for GPUs has to match."""

import torch

from mmdgt.ops import choose_and_attend, use_backend
from mmdgt.ops.library import ops


def inputs(B=2, H=2, L=70, D=16, G=5):
    tokens = (torch.randn(B, H, L, D, requires_grad=True) for _ in range(3))
    return *tokens, torch.randn(H, G, D)


def test_is_the_three_operators_one_after_the_other():
    q, k, v, centroids = inputs()
    out, lse, group, masks, sums, counts = ops.choose_and_attend(
        q, k, v, centroids, 9, 0.3, True
    )
    with use_backend('reference'):
        again, *terms = choose_and_attend(q, k, v, centroids, 9, 0.3, with_sums=True)
    torch.testing.assert_close(out, again)
    for x, y in zip((sums, counts), terms, strict=True):
        torch.testing.assert_close(x, y)
    grad = torch.randn_like(out)
    grads = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, again))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)
    assert lse.shape == group.shape == q.shape[:3]
    assert masks.shape == (2, 2, 5, 8)


def test_a_bit_for_each_key_that_a_group_sees():
    q, k, v, centroids = inputs(B=1, H=1, L=70, G=3)
    masks = ops.choose_and_attend(q, k, v, centroids, 4, 0.3, False)[3]
    index = ops.select_keys(k, centroids, 4, False)
    for g in range(3):
        words = [int(word) & 0xFFFFFFFF for word in masks[0, 0, g]]
        seen = [t for t in range(256) if words[t // 32] >> t % 32 & 1]
        assert seen == sorted(index[0, 0, g].tolist())


def test_sums_are_empty_unless_asked_for():
    q, k, v, centroids = inputs()
    _, sums, counts = choose_and_attend(q, k, v, centroids, 9)
    assert sums.numel() == counts.numel() == 0


def test_shapes_are_known_without_data():
    args = [x.detach().to('meta') for x in inputs()]
    out, lse, group, masks, sums, counts = ops.choose_and_attend(*args, 9, 0.3, True)
    assert out.shape == (2, 2, 70, 16) and lse.shape == group.shape == (2, 2, 70)
    assert masks.shape == (2, 2, 5, 8) and sums.shape == (2, 5, 16)
    assert counts.shape == (2, 5)
