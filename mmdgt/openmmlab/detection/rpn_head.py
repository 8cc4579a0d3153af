"""A region proposal head for mixed precision."""

from mmdet.models import RPNHead
from mmdet.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class FloatRPNHead(RPNHead):
    """mmdetection's RPN head with predictions in float32, whatever the autocast.

    Boxes need more digits than half precision has, and mmcv's non-maximum
    suppression takes no bfloat16.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> scores (B, A, H, W) and box deltas (B, 4 A, H, W)."""
        scores, deltas = super().forward_single(x)
        return scores.float(), deltas.float()
