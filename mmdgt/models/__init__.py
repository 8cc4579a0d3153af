"""The network in plain PyTorch: DGT and its layers."""

from .attention import DynamicGroupAttention, GlobalAttention
from .centroids import update_centroids
from .dgt import DGT

__all__ = ['DGT', 'DynamicGroupAttention', 'GlobalAttention', 'update_centroids']
