"""Write the model index and the sizes in the README from the configs.

    python tools/index_models.py

Every config of a model for real data becomes an entry of configs/metafile.yml, and the
README's table of sizes gets the counts of today beside the paper's. Parameters are
rounded to 10,000, FLOPs to a million; one multiply-add counts once, norms do not.
"""

import re
from pathlib import Path

import yaml
from mmengine.config import Config
from train_variants import on_meta

from mmdgt.commands import run_command
from mmdgt.files import write_text
from mmdgt.openmmlab.engine.flops import count_flops

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / 'configs'
README = REPOSITORY / 'README.md'
INDEX = CONFIGS / 'metafile.yml'
# Height and width that the paper counts at.
SIZES = {'mmpretrain': (224, 224), 'mmseg': (512, 2048), 'mmdet': (800, 1280)}
DATA_SETS = {
    'ImageNet': 'ImageNet-1k',
    'ADE20KDataset': 'ADE20K',
    'CityscapesDataset': 'Cityscapes',
    'PascalVOCDataset': 'PASCAL VOC 2012',
    'CocoDataset': 'COCO',
}
# What the README calls a config, with the digits of the paper's tables.
PUBLISHED = {
    f'{title}-{size.upper()}': (config.format(size), *digits)
    for title, config, *digits in (
        ('DGT', 'dgt_{}_in1k', 2, 2),
        ('UperNet DGT', 'upernet_dgt_{}_ade20k', 1, 0),
        ('Mask R-CNN DGT', 'mask_rcnn_dgt_{}_1x_coco', 1, 0),
    )
    for size in 'tsb'
}


def count(cfg: Config) -> dict[str, int]:
    """Parameters and FLOPs of a config's model.

    Mask2Former has no FLOPs: its deformable attention needs values, not shapes alone.
    """
    model = on_meta(cfg)
    params = sum(p.numel() for p in model.parameters())
    counts = {'Parameters': round(params, -4)}
    heads = (cfg.model, cfg.model.get('decode_head', {}))
    if not any(part.type.startswith('Mask2Former') for part in heads if part):
        flops = count_flops(model, *SIZES[cfg.default_scope])
        counts['FLOPs'] = round(int(sum(flops.values())), -6)
    return counts


def entry(name: str, cfg: Config) -> dict:
    """A model in the form of OpenMMLab's index."""
    about = {
        'Training Data': DATA_SETS[cfg.test_dataloader.dataset.type],
        'Batch Size': cfg.auto_scale_lr.base_batch_size,
    }
    return {
        'Name': name,
        'In Collection': 'DGT',
        'Config': f'configs/{name}.py',
        'Metadata': about | count(cfg),
    }


def with_models(index: str, models: list[dict]) -> str:
    """The index with these models in place of its own."""
    head, _ = index.split('Models:\n')
    listed = yaml.safe_dump(models, sort_keys=False, indent=2)
    return f'{head}Models:\n' + re.sub('^', '  ', listed.rstrip(), flags=re.M) + '\n'


def with_sizes(readme: str, models: list[dict]) -> str:
    """The README with the counts of these models beside the paper's."""
    counts = {model['Name']: model['Metadata'] for model in models}
    for title, (name, digits, digits_of_flops) in PUBLISHED.items():
        params = f'{counts[name]["Parameters"] / 1e6:.{digits}f}'
        flops = f'{counts[name]["FLOPs"] / 1e9:.{digits_of_flops}f}'
        row = rf'^(\| {title} \| \d+x.+?\|.+?\|).+?(\|.+?\|).+?\|$'
        readme, found = re.subn(row, rf'\1 {params} \2 {flops} |', readme, flags=re.M)
        if found != 1:
            raise ValueError(f'expected a row of sizes "{title}" in the README')
    return readme


def main() -> None:
    """Count all models, print a line for each and write both files."""
    models = []
    for path in sorted(CONFIGS.glob('*.py')):
        if 'demo' not in path.stem:
            models.append(entry(path.stem, Config.fromfile(path)))
            print(path.stem, *models[-1]['Metadata'].values(), sep='  ', flush=True)
    write_text(INDEX, with_models(INDEX.read_text(), models))
    write_text(README, with_sizes(README.read_text(), models))


if __name__ == '__main__':
    run_command(main)
