"""One picture through the model that a config describes, whatever the framework."""

from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor

from ...frameworks import FRAMEWORKS
from ...visualization import viewable
from ..checkpoints import load_weights, read_weights
from ..picture_files import check_picture

LOADING = ('LoadImageFromFile', 'LoadAnnotations')


def read_image(file: str | Path) -> np.ndarray:
    """Read a picture, (H, W, 3) uint8, BGR.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no picture that OpenCV can read.
    """
    check_picture(file, decode=True)
    image = cv2.imread(str(file))
    if image is None:
        raise ValueError(
            f'{file} is damaged or no picture; expected JPEG, PNG or another format'
            f' that OpenCV reads'
        )
    return image


class Predictor:
    """A model in evaluation mode, with the test pipeline of its config.

    Args:
        cfg (Config): Of a segmentor, detector or classifier.
        checkpoint (str, optional): File or URL of its weights, all of which have to
            fit. None leaves the weights random.
        device (str, optional): Defaults to a GPU where there is one.
        allow_partial (bool): Whether weights that do not fit are only warned of.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it can't be read safely or belongs to another model.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None,
        device: str | None = None,
        allow_partial: bool = False,
    ) -> None:
        init_default_scope(cfg.default_scope)
        self.framework = FRAMEWORKS[cfg.default_scope]
        self.model = build_model(cfg, checkpoint, allow_partial)
        self.model.to(device or get_device())
        dataset = cfg.test_dataloader.dataset
        self.metainfo = DATASETS.build(dict(dataset, lazy_init=True)).metainfo
        self.pipeline = Compose(
            [t for t in dataset.pipeline if t['type'].split('.')[-1] not in LOADING]
        )
        # One of its own, for those of the same name are one object; without back
        # ends, for what it draws is returned, not stored.
        own = dict(name=f'{type(self).__name__} {id(self)}', vis_backends=None)
        self.visualizer = VISUALIZERS.build({**cfg.visualizer, **own})
        self.visualizer.dataset_meta = self.metainfo

    def prepare(self, image: np.ndarray) -> dict:
        """Run the test pipeline.

        Args:
            image (ndarray): (H, W, 3) uint8, BGR.

        Returns:
            dict: ``inputs`` (3, H', W') and ``data_samples``, as a data set has them.
        """
        size = image.shape[:2]
        return self.pipeline(
            dict(img=image, img_shape=size, ori_shape=size, img_path='', img_id=0)
        )

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> BaseDataElement:
        """Predict for an image (H, W, 3), BGR; returns the framework's data sample."""
        return self.model.test_step(pseudo_collate([self.prepare(image)]))[0]

    def find(self, image: np.ndarray) -> BaseDataElement:
        """:meth:`predict`, without the scores of a segmentor where they take much."""
        if self.framework.name == 'mmseg':
            from .segmentation import scores_classes_apart, segment

            if scores_classes_apart(self.model):
                return segment(self.model, self.prepare(image))
        return self.predict(image)

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Predict and draw the prediction over the image, (H, W, 3) BGR both."""
        sample, rgb = self.find(image), mmcv.bgr2rgb(image)
        classes = self.metainfo.get('classes')
        drawn = self.framework.draw(self.visualizer, rgb, sample, classes)
        return mmcv.rgb2bgr(drawn)

    def see(self, image: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """The image as the network sees it, after resizing and cropping.

        Args:
            image (ndarray): (H, W, 3) uint8, BGR.

        Returns:
            tuple: (H', W', 3) uint8, RGB, to draw on; and (1, 3, H'', W''),
            normalised and padded, for the backbone.
        """
        item = self.prepare(image)
        inputs = self.model.data_preprocessor(pseudo_collate([item]))['inputs']
        return viewable(item['inputs']), inputs


def build_model(
    cfg: Config, checkpoint: str | None, allow_partial: bool = False
) -> BaseModel:
    """Build the model of a config for one process, in evaluation mode.

    Args:
        cfg (Config): Its default scope is the one that is set.
        checkpoint (str, optional), allow_partial (bool): As for :class:`Predictor`.
    """
    settings = dict(cfg.model)
    if 'data_preprocessor' in cfg:  # as the Runner hands it over
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = revert_sync_batchnorm(MODELS.build(settings)).eval()
    if checkpoint is not None:
        load_weights(model, checkpoint, read_weights(checkpoint), allow_partial)
    return model
