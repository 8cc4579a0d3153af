"""Label maps that would be read as something else than they are."""

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from PIL import Image

WIDE = ('I', 'I;16', 'I;16B', 'F')  # PIL's names of more than 8 bits


@TRANSFORMS.register_module()
class CheckLabelMap(BaseTransform):
    """Refuses a label map by its name, right behind ``LoadAnnotations``.

    If it has another size than its picture, colours instead of labels, or 16 bits,
    of which mmsegmentation keeps the lower 8.
    """

    def transform(self, results: dict) -> dict:
        """Look at ``gt_seg_map``, (H, W), as it was loaded.

        Raises:
            ValueError: If it is no label map of the picture.
        """
        if 'gt_seg_map' not in results:  # in inference
            return results
        labels, file = results['gt_seg_map'], results['seg_map_path']
        if labels.ndim != 2:
            raise ValueError(
                f'{file} has {labels.shape[-1]} channels, expected one with the number'
                f' of a class for every pixel: turn its colours into numbers'
            )
        if labels.shape != tuple(results['ori_shape']):
            raise ValueError(
                f'{file} has the size {labels.shape}, its picture'
                f' {results["img_path"]} {tuple(results["ori_shape"])} (height, width);'
                f' a picture that its EXIF data turn comes turned'
            )
        with Image.open(file) as header:
            if header.mode in WIDE and (most := np.asarray(header).max()) > 255:
                raise ValueError(
                    f'{file} has 16 bits with values up to {most}, expected labels up'
                    f' to 255'
                )
        return results
