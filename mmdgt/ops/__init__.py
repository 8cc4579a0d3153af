"""DG-Attention as functions of tensors."""

from .functional import (
    assign_queries,
    dynamic_group_attention,
    group_attention,
    select_keys,
    use_backend,
)

__all__ = [
    'assign_queries',
    'dynamic_group_attention',
    'group_attention',
    'select_keys',
    'use_backend',
]
