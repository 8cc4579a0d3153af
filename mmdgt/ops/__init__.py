"""DG-Attention as functions of tensors."""

from .backend import use_backend
from .functional import (
    assign_and_sum,
    assign_queries,
    group_attention,
    select_keys,
)

__all__ = [
    'assign_and_sum',
    'assign_queries',
    'group_attention',
    'select_keys',
    'use_backend',
]
