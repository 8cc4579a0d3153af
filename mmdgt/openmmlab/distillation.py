"""A backbone learns the features of another network, on pictures without labels."""

from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate


@MODELS.register_module()
class FeatureDistiller(BaseModel):
    """Trains a backbone towards the features of a frozen teacher.

    Every feature map of the backbone, resized to the teacher's and projected to its
    channels by a 1x1 convolution, is to point where the teacher's points:

        loss_i = 1 - mean over positions of cos(project_i(student_i), teacher_i)

    The checkpoint holds the backbone under ``backbone.``, where ``init_cfg`` of a
    model for any task finds it.

    Args:
        backbone (dict): The student; returns a map per map of the teacher.
        teacher (dict): A backbone with the weights that it is to teach, such as
            ``dict(type='mmpretrain.TIMMBackbone', model_name='resnet50',
            features_only=True, pretrained=True, out_indices=(1, 2, 3, 4))``.
        data_preprocessor (dict): Of the pictures, for both networks.

    Raises:
        ValueError: If the two return different numbers of maps.
    """

    def __init__(self, backbone: dict, teacher: dict, data_preprocessor: dict) -> None:
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.teacher = MODELS.build(teacher).requires_grad_(False)
        channels = [
            [feature.shape[1] for feature in _look(network)]
            for network in (self.backbone, self.teacher)
        ]
        if len(channels[0]) != len(channels[1]):
            raise ValueError(
                f'expected as many maps of the backbone as of the teacher, got'
                f' {len(channels[0])} and {len(channels[1])}: set out_indices of both'
            )
        self.projections = nn.ModuleList(
            nn.Conv2d(ours, theirs, 1) for ours, theirs in zip(*channels, strict=True)
        )

    def train(self, mode: bool = True) -> 'FeatureDistiller':
        """Leave the teacher in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, inputs: Tensor, data_samples: Any = None, mode: str = 'loss'
    ) -> dict[str, Tensor] | tuple[Tensor, ...]:
        """The losses by map, or in any other mode than 'loss' the student's maps.

        Args:
            inputs (Tensor): Pictures, (B, 3, H, W).
            data_samples: Ignored; nothing needs a label.
            mode (str): 'loss' or 'tensor'.
        """
        features = self.backbone(inputs)
        if mode != 'loss':
            return features
        with torch.no_grad():
            targets = self.teacher(inputs)
        losses = {}
        for i, (project, feature, target) in enumerate(
            zip(self.projections, features, targets, strict=True)
        ):
            size = target.shape[2:]
            feature = interpolate(feature, size, mode='bilinear', align_corners=False)
            losses[f'loss_{i}'] = 1 - cosine_similarity(project(feature), target).mean()
        return losses


@torch.no_grad()
def _look(network: nn.Module) -> tuple[Tensor, ...]:
    """The maps of a small picture, (1, C, h, w) each."""
    training = network.training
    network.eval()  # returns nothing in some backbones
    features = network(torch.zeros(1, 3, 64, 64))
    network.train(training)
    return features
