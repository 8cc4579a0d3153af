"""The operators as PyTorch knows them: schema, kernels, shapes, gradients, FLOPs.

They exist with or without the compiled extension: the plain PyTorch reference
is registered for every device, and importing ``mmdgt._ext`` puts its own
kernels for the CPU and the GPU before it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import reference

NAMESPACE = 'mmdgt'
ops = torch.ops.mmdgt
_SCHEMAS = {
    'assign_queries': (
        '(Tensor query, Tensor centroids, bool with_sums)'
        ' -> (Tensor group, Tensor sums, Tensor counts)'
    ),
    'select_keys': (
        '(Tensor key, Tensor centroids, int num_keys, bool sorted) -> Tensor index'
    ),
    'group_attention': (
        '(Tensor query, Tensor key, Tensor value, Tensor group, Tensor index,'
        ' float scale) -> (Tensor out, Tensor logsumexp)'
    ),
    'group_attention_backward': (
        '(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor group,'
        ' Tensor index, Tensor out, Tensor logsumexp, float scale)'
        ' -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)'
    ),
    'choose_and_attend': (
        '(Tensor query, Tensor key, Tensor value, Tensor centroids, int num_keys,'
        ' float scale, bool with_sums) -> (Tensor out, Tensor logsumexp, Tensor group,'
        ' Tensor masks, Tensor sums, Tensor counts)'
    ),
    'choose_and_attend_backward': (
        '(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor group,'
        ' Tensor masks, Tensor out, Tensor logsumexp, float scale)'
        ' -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)'
    ),
}
MASK_WORDS = 8  # of 32 tokens each


def _token_major(x: Tensor) -> Tensor:
    """Store (B, H, L, D) as (B, L, H, D), so that joining the heads is free."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_token_major(x: Tensor) -> Tensor:
    B, H, L, D = x.shape
    return x.new_empty(B, L, H, D).transpose(1, 2)


def _group_attention(query, key, value, group, index, scale):
    out, logsumexp = reference.group_attention(query, key, value, group, index, scale)
    return _token_major(out), logsumexp.contiguous()


def _group_attention_backward(*args):
    return tuple(map(_token_major, reference.group_attention_backward(*args)))


def _fake_assign_queries(query, centroids, with_sums):
    group = query.new_empty(query.shape[:3], dtype=torch.int32)
    shape = centroids.shape if with_sums else (0,)
    sums = centroids.new_empty(shape, dtype=torch.float32)
    counts = centroids.new_empty(shape[:2], dtype=torch.int32)
    return group, sums, counts


def _fake_select_keys(key, centroids, num_keys, sorted):
    B, H, L, _ = key.shape
    num_keys = torch.sym_min(num_keys, L)
    return key.new_empty(B, H, centroids.shape[1], num_keys, dtype=torch.int32)


def _fake_group_attention(query, key, value, group, index, scale):
    accumulate = torch.promote_types(query.dtype, torch.float32)
    return _empty_token_major(query), query.new_empty(query.shape[:3], dtype=accumulate)


def _fake_group_attention_backward(grad_out, query, key, value, *_):
    return tuple(map(_empty_token_major, (query, key, value)))


def _fake_choose_and_attend(query, key, value, centroids, num_keys, scale, with_sums):
    group, sums, counts = _fake_assign_queries(query, centroids, with_sums)
    out, logsumexp = _fake_group_attention(query, key, value, group, None, scale)
    masks = group.new_empty(*query.shape[:2], centroids.shape[1], MASK_WORDS)
    return out, logsumexp, group, masks, sums, counts


def _save_choice_for_backward(ctx, inputs, output):
    query, key, value, _, _, ctx.scale, _ = inputs
    out, logsumexp, group, masks, *_ = output
    ctx.save_for_backward(query, key, value, group, masks, out, logsumexp)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _choose_and_attend_grads(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 7
    grads = ops.choose_and_attend_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 6
    grads = ops.group_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


def _no_second_derivative(ctx, *_):
    raise NotImplementedError(
        'the kernels of DG-Attention have no second derivative; run the forward pass'
        " within mmdgt.ops.use_backend('reference'), which autograd differentiates"
    )


# Multiplications and additions, as torch counts: two for each multiply-add of
# eq. 6. Choosing costs 2 L G C in all, L G C for the queries and L G C for the
# keys; attending costs 2 K L C.
def _choosing_flops(tokens_shape, centroids_shape, *_, **__) -> int:
    B, H, L, D = tokens_shape
    return 2 * B * H * L * centroids_shape[1] * D


def _attending_flops(query_shape, _key, _value, _group, index_shape, *_, **__) -> int:
    B, H, L, D = query_shape
    return 4 * B * H * L * index_shape[-1] * D


def _attending_backward_flops(_grad_out, *shapes, **kwargs) -> int:
    # Five products instead of two: the scores again, and those of dV, dP, dQ, dK.
    return _attending_flops(*shapes, **kwargs) // 2 * 5


def _choosing_and_attending_flops(
    query_shape, _key, _value, centroids_shape, num_keys, *_, **__
) -> int:
    index_shape = (*query_shape[:2], centroids_shape[1], min(num_keys, query_shape[2]))
    return 2 * _choosing_flops(query_shape, centroids_shape) + _attending_flops(
        query_shape, None, None, None, index_shape
    )


def _few_backward_flops(_grad_out, query_shape, *_, **__) -> int:
    # Masked products are dense: every query by every token.
    B, H, L, D = query_shape
    return 4 * B * H * L * L * D // 2 * 5


FLOP_FORMULAS: dict[str, Callable] = {
    'assign_queries': _choosing_flops,
    'select_keys': _choosing_flops,
    'group_attention': _attending_flops,
    'group_attention_backward': _attending_backward_flops,
    'choose_and_attend': _choosing_and_attending_flops,
    'choose_and_attend_backward': _few_backward_flops,
}
_KERNELS = {
    'assign_queries': reference.assign_queries,
    'select_keys': reference.select_keys,
    'group_attention': _group_attention,
    'group_attention_backward': _group_attention_backward,
}
_FAKES: dict[str, Callable] = {
    'assign_queries': _fake_assign_queries,
    'select_keys': _fake_select_keys,
    'group_attention': _fake_group_attention,
    'group_attention_backward': _fake_group_attention_backward,
    'choose_and_attend': _fake_choose_and_attend,
    'choose_and_attend_backward': _fake_group_attention_backward,
}

_library = torch.library.Library(NAMESPACE, 'DEF')
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    if _name in _KERNELS:
        _library.impl(_name, _KERNELS[_name], 'CompositeExplicitAutograd')
    torch.library.register_fake(f'{NAMESPACE}::{_name}', _FAKES[_name], lib=_library)
    _packet = getattr(ops, _name)
    _formula = register_flop_formula(_packet)(FLOP_FORMULAS[_name])
    # torch 2.4 registers it for the packet's overloads and looks for the packet.
    flop_registry.setdefault(_packet, _formula)
torch.library.register_autograd(
    f'{NAMESPACE}::group_attention',
    _backward,
    setup_context=_save_for_backward,
    lib=_library,
)
torch.library.register_autograd(
    f'{NAMESPACE}::choose_and_attend',
    _choose_and_attend_grads,
    setup_context=_save_choice_for_backward,
    lib=_library,
)
for _name in ('group_attention_backward', 'choose_and_attend_backward'):
    torch.library.register_autograd(
        f'{NAMESPACE}::{_name}', _no_second_derivative, lib=_library
    )
