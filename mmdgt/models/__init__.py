"""The DGT backbone and its layers."""

from .attention import DynamicGroupAttention, GlobalAttention, update_centroids
from .dgt import DGT

__all__ = ['DGT', 'DynamicGroupAttention', 'GlobalAttention', 'update_centroids']
