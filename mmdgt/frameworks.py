"""What is known of the frameworks of OpenMMLab: one record each.

A further framework is a further record here, and configs. The standard library
alone: the doctor reads this where nothing else imports.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

CONTINUATION = 'onedl-'  # what starts the names of the maintained distributions


class Framework(NamedTuple):
    """A framework, by its name that is also the scope of its registries.

    Attributes:
        name: Of the package.
        tested: Distributions that carry it, the continuation's and the original,
            with the release series that mmdgt is made for.
        needs_operators: Whether it is lost without mmcv's compiled operators.
        scores: Metrics of its evaluators: what they are called, their factor to
            percent.
        panels: The function of :mod:`mmdgt.openmmlab.apis.pictures` that draws what
            its demo found.
        show_settings: From whether to show and a folder or None, the settings of
            ``default_hooks.visualization`` that draw predictions.
        draw: From its visualizer, an image, a data sample and the classes, the image
            with the prediction, all RGB.
        localizes: Whether its predictions have a place in the picture.
        predictions_in_folder: Whether its evaluator writes predictions, as files into
            a folder; those of the others go to one file.
        exports: Whether ``tools/export_onnx.py`` knows its models.
    """

    name: str
    tested: dict[str, str]
    needs_operators: bool
    scores: dict[str, tuple[str, float]]
    panels: str
    show_settings: Callable[[bool, str | None], dict]
    draw: Callable[[Any, Any, Any, tuple], Any]
    localizes: bool
    predictions_in_folder: bool
    exports: bool


def _draw_sample(visualizer: Any, image: Any, sample: Any, classes: tuple) -> Any:
    visualizer.add_datasample('', image, sample, draw_gt=False)
    return visualizer.get_image()


def _draw_class(visualizer: Any, image: Any, sample: Any, classes: tuple) -> Any:
    return visualizer.visualize_cls(image, sample, classes=classes, draw_gt=False)


FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework(
            name='mmpretrain',
            tested={'onedl-mmpretrain': '1.3', 'mmpretrain': '1.2'},
            needs_operators=False,
            scores={'accuracy/top1': ('top-1', 1)},
            panels='classification_panels',
            show_settings=lambda show, folder: dict(
                enable=True, show=show, out_dir=folder
            ),
            draw=_draw_class,
            localizes=False,
            predictions_in_folder=False,
            exports=True,
        ),
        Framework(
            name='mmdet',
            tested={'onedl-mmdetection': '3.5', 'mmdet': '3.3'},
            needs_operators=True,
            scores={
                f'coco/{kind}_mAP{threshold}': (f'{what} AP{threshold[1:]}', 100)
                for kind, what in (('bbox', 'box'), ('segm', 'mask'))
                for threshold in ('', '_50')
            },
            panels='detection_panels',
            show_settings=lambda show, folder: dict(
                draw=True, show=show, test_out_dir=folder
            ),
            draw=_draw_sample,
            localizes=True,
            predictions_in_folder=False,
            exports=False,
        ),
        Framework(
            name='mmseg',
            tested={'onedl-mmsegmentation': '1.4', 'mmsegmentation': '1.2'},
            needs_operators=False,
            scores={'mIoU': ('mIoU', 1)},
            panels='segmentation_panels',
            show_settings=lambda show, folder: dict(draw=True, show=show),
            draw=_draw_sample,
            localizes=True,
            predictions_in_folder=True,
            exports=True,
        ),
    )
}
OPENMMLAB = ('mmengine', 'mmcv', *FRAMEWORKS)  # the packages, what needs others last
