"""The figures of README and model index are those of the files that they name."""

import csv
import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / 'README.md').read_text()
BENCHMARKS = REPOSITORY / 'docs/benchmarks'
MEASUREMENTS = REPOSITORY / 'docs/measurements'


def load(path):
    return json.loads(path.read_text())


def table(first_cells, page=README):
    """The rows of the table of a page whose header begins like this."""
    lines = iter(page.splitlines())
    for line in lines:
        if line.startswith(first_cells):
            break
    else:
        pytest.fail(f'no table {first_cells!r}')
    next(lines)  # below the header
    rows = []
    for line in lines:
        if not line.startswith('|'):
            return rows
        rows.append([cell.strip() for cell in line.strip('|').split('|')])


def only(rows, **wanted):
    """The one row of a file with these entries."""
    found = [row for row in rows if wanted.items() <= row.items()]
    assert len(found) == 1, wanted
    return found[0]


def rounded(text, value):
    """Whether a number in the README is a measured value to the digits it has."""
    places = len(text.partition('.')[2])
    return abs(float(text) - value) <= 0.5000001 * 10**-places


def claim(text):
    """Asserts a sentence of the README, wherever its lines break."""
    assert text in ' '.join(README.split()), text


def test_operators_on_the_gpu():
    stages = [
        row
        for run in load(BENCHMARKS / 'h200.json')['stages']
        for row in run['results']
    ]
    page = (REPOSITORY / 'docs/cuda.md').read_text()
    rows = table('| | B, H, L, K | forward | backward |', page)
    assert len(rows) == 6
    for _, shape, forward, backward, dense in rows:
        sizes = dict(zip('BHLK', map(int, shape.split(', ')), strict=True))
        us = only(stages, draw='random', dtype='bfloat16', **sizes)['us']
        fastest = min(
            time for name, time in us.items() if re.fullmatch('dense .* forward', name)
        )
        assert rounded(forward, us['forward']), shape
        assert rounded(backward, us['backward']), shape
        assert rounded(dense, fastest), shape
    page = ' '.join(page.split())
    few, more = (
        min(
            time
            for row in stages
            if row['L'] == tokens and row['draw'] == 'random'
            for name, time in row['us'].items()
            if re.fullmatch('dense .* backward', name)
        )
        for tokens in (196, 1024)
    )
    assert f'equal backward ({few:.0f} µs)' in page
    assert f'both ways ({more:.0f} µs backward)' in page


def test_operators_on_the_cpu():
    rows = table('| L, K, data type | forward | backward |')
    assert len(rows) == 5
    for case, *printed in rows:
        tokens, keys, dtype = case.split(', ')
        file = 'cpu_64000.json' if tokens == '64000' else 'cpu.json'
        results = load(BENCHMARKS / file)['results']
        columns = (
            ('fused', 'forward'),
            ('fused', 'backward'),
            ('dense_flash', 'forward'),
            ('group_loop', 'forward'),
            ('eager', 'forward'),
        )
        for (rival, which), cell in zip(columns, printed, strict=True):
            wanted = dict(
                L=int(tokens), K=int(keys), dtype=dtype, draw='random', B=1, H=2
            )
            wanted |= {'rival': rival, 'pass': which}
            if not cell:
                assert not [row for row in results if wanted.items() <= row.items()]
                continue
            ms = only(results, **wanted)['us'] / 1e3
            assert rounded(cell, ms), (case, rival, which)


def test_plain_pytorch_takes_longer():
    """All draws, types and passes of both machines."""
    ratios = []
    for folder in MACHINES.values():
        rows = load(BENCHMARKS / f'{folder}cpu.json')['results']
        for plain in (row for row in rows if row['rival'] == 'eager'):
            case = ('L', 'dtype', 'draw', 'pass')
            fused = only(rows, rival='fused', **{key: plain[key] for key in case})
            ratios.append(plain['us'] / fused['us'])
    said = f'takes {min(ratios):.0f} to {max(ratios):.0f} times as long'
    for place in ('docs/installing.md', 'mmdgt/ops/backend.py'):
        assert said in (REPOSITORY / place).read_text(), said


def test_time_grows_with_the_tokens():
    results = load(BENCHMARKS / 'cpu_lengths.json')['results']
    wanted = dict(rival='fused', dtype='float32')
    short, long = (only(results, L=L, **wanted)['us'] for L in (4096, 262144))
    claim(f'[{long / short:.0f} times from 4096 to 262144 tokens]')


# A row of the tables of the network: its file and what it is in there.
NETWORK = {
    'one image of 224x224': ('', {'size': '224x224', 'pass': 'forward'}),
    'one image of 512x2048': ('', {'size': '512x2048', 'pass': 'forward'}),
    'training step, four of 224x224': ('_train_224', {'pass': 'train'}),
    'training step, one of 512x512': ('_train', {'pass': 'train'}),
}
ON_THE_PAGE = NETWORK | {
    'the same with K = 392': ('_train_224', {'pass': 'train'}),
    'four of 224x224, bfloat16': ('_bf16', {'pass': 'forward'}),
    'training step, the same': ('_bf16', {'pass': 'train'}),
}
MODELS = ('dgt_t', 'swin_t', 'timm_swin_t', 'convnext_t')
MACHINES = {'EPYC': '', 'Xeon': 'xeon/'}  # their folders


def measured(case, file):
    """The rows of DGT-T and its rivals in a file of the network."""
    content = load(BENCHMARKS / file)
    assert ('Xeon' if 'xeon' in file else 'EPYC') in content['machine']['cpu']
    assert content['machine']['instructions'] == 'AVX' + (
        '2' if 'avx2' in file else '512'
    )
    ours = MODELS[0] + '_k392' * case.endswith('392')
    wanted = ON_THE_PAGE[case][1] | dict(task='backbone', mode='eager')
    return [only(content['results'], model=m, **wanted) for m in (ours, *MODELS[1:])]


def verdict_on(ours, rival):
    """Where the quartiles overlap two models are equal."""
    low, high = ours['ms_quartiles']
    first, last = rival['ms_quartiles']
    if low <= last and first <= high:
        return 'equal'
    return 'ahead' if ours['ms'] < rival['ms'] else 'behind'


def check_cell(cell, ours, rival, memory=False):
    """Time, peak memory if there is one, and whether it is equal to that of DGT."""
    pattern = r'([\d.]+)( \((\d+)\))?(?:, (equal))?'
    ms, has_memory, peak, equal = re.fullmatch(pattern, cell).groups()
    assert rounded(ms, rival['ms']), cell
    assert (verdict_on(ours, rival) == 'equal' and rival is not ours) == bool(equal), (
        cell
    )
    assert bool(has_memory) == memory
    if memory:
        assert int(peak) == round(rival['peak_bytes'] / 2**20), cell


def test_the_network_in_the_readme():
    rows = table('| | DGT-T | Swin-T, mmpretrain |')
    assert [
        name.removesuffix(', K = 98').removesuffix(', K = 392') for name, *_ in rows
    ] == [*NETWORK]
    faster = []
    for case, (_, *cells) in zip(NETWORK, rows, strict=True):
        found = measured(case, f'model_cpu{NETWORK[case][0]}.json')
        for model, cell, row in zip(MODELS, cells, found, strict=True):
            check_cell(cell, found[0], row, memory=True)
            if verdict_on(found[0], row) == 'behind':
                faster.append((model, case))
    assert not faster
    claim('None of the three is faster in these rows.')


def test_who_is_faster_with_avx2_and_in_bfloat16():
    one, large, step, large_step = NETWORK
    faster = {
        case: [
            model
            for model, row in zip(MODELS[1:], others, strict=True)
            if verdict_on(ours, row) == 'behind'
        ]
        for case in NETWORK
        for ours, *others in [measured(case, f'model_cpu{NETWORK[case][0]}_avx2.json')]
    }
    every, swins = [*MODELS[1:]], [*MODELS[1:3]]
    assert faster == {one: every, large: [], step: every, large_step: swins}
    claim(
        'Limited to AVX2 all three are, with one image of 224x224 and in the step at'
        ' 224x224, and both Swin-T in the step at 512x512; in bfloat16 both Swin-T are'
        ' in a training step at 224x224'
    )
    ours, *others = measured('training step, the same', 'model_cpu_bf16.json')
    assert [verdict_on(ours, row) for row in others[:2]] == ['behind'] * 2


def test_the_fused_path_of_training():
    page = ' '.join((REPOSITORY / 'docs/model_speed.md').read_text().split())
    peaks = []
    for file in ('train_224', 'train'):
        results = load(BENCHMARKS / f'model_cpu_{file}.json')['results']
        fused, plain = (only(results, model=f'dgt_t{x}') for x in ('', '_plain'))
        assert verdict_on(fused, plain) == 'equal'
        peaks += [round(row['peak_bytes'] / 2**20) for row in (fused, plain)]
        if file == 'train_224':
            kept = only(results, model='dgt_t_plain_cp')
            more = 100 * (kept['ms'] / fused['ms'] - 1)
            told = f'{kept["peak_bytes"] / 2**20:.0f} MiB and {more:.0f} % more time'
            assert told in page
    assert (
        '{} against {} MiB at 224x224, {} against {} at 512x512'.format(*peaks) in page
    )
    peaks = [
        round(row['peak_bytes'] / 2**20)
        for model in ('dgt_t', 'swin_t')
        for file in ('upernet', 'mask_rcnn')
        for row in load(BENCHMARKS / f'model_cpu_{file}_train.json')['results']
        if row['model'] == model
    ]
    told = 'takes {} and {} MiB, with Swin-T {} and {}'.format(*peaks)
    assert told in page


def test_few_tokens():
    page = (REPOSITORY / 'docs/model_speed.md').read_text()
    rows = table('| | forward | dense | with backward | dense |', page)
    assert len(rows) == 4
    for name, *cells in rows:
        machine, _, instructions = name.partition(', ')
        file = f'{MACHINES[machine]}cpu_few{"_avx2" * bool(instructions)}.json'
        results = load(BENCHMARKS / file)['results']
        for which, *pair in zip(
            ('forward', 'both'), cells[::2], cells[1::2], strict=True
        ):
            wanted = {'draw': 'random', 'pass': which}
            ours, dense = (only(results, rival=x, **wanted) for x in ('fused', 'dense'))
            assert rounded(pair[0], ours['us']) and rounded(
                pair[1].removesuffix(', equal'), dense['us']
            )
            low, high = ours['us_quartiles']
            first, last = dense['us_quartiles']
            equal = low <= last and first <= high
            assert equal == pair[1].endswith('equal'), (name, which)


@pytest.mark.parametrize('machine', MACHINES)
def test_the_page_of_the_network(machine):
    page = (REPOSITORY / 'docs/model_speed.md').read_text()
    case, cases = None, set()
    for name, *cells, file in table(
        f'| {machine} | DGT-T | Swin-T, mmpretrain |', page
    ):
        case = case if name == 'AVX2' else name
        cases.add(case)
        instructions = '_avx2' * (name == 'AVX2')
        assert file == f'`model_cpu{ON_THE_PAGE[case][0]}{instructions}.json`'
        found = measured(case, MACHINES[machine] + file.strip('`'))
        cells[0], _, deployed = cells[0].partition(', deployed ')
        if deployed:
            results = load(BENCHMARKS / MACHINES[machine] / file.strip('`'))['results']
            wanted = ON_THE_PAGE[case][1] | {'mode': 'deploy'}
            assert rounded(deployed, only(results, model='dgt_t', **wanted)['ms'])
        for cell, row in zip(cells, found, strict=True):
            check_cell(cell, found[0], row)
    assert cases == ON_THE_PAGE.keys()


LARGER = {  # file, size of the model, of the images
    'S, one image of 224x224': ('larger', 's', '224x224'),
    'S, one image of 512x2048': ('larger', 's', '512x2048'),
    'S, training step, one of 224x224': ('larger_train', 's', '224x224'),
    'B, one image of 224x224': ('larger', 'b', '224x224'),
    'B, one image of 512x2048': ('larger', 'b', '512x2048'),
    'B, training step, one of 224x224': ('larger_train', 'b', '224x224'),
    'T, 16 images of 224x224': ('batch16', 't', '224x224'),
    'T, training step of UperNet, two of 512x512': ('upernet_train', 't', '512x512'),
    'T, training step of Mask R-CNN, one of 800x1280': (
        'mask_rcnn_train',
        't',
        '800x1280',
    ),
}


@pytest.mark.parametrize('machine', MACHINES)
def test_larger_and_whole_models(machine):
    page = (REPOSITORY / 'docs/model_speed.md').read_text()
    rows = table(f'| {machine} | DGT | Swin, mmpretrain |', page)
    assert [name for name, *_ in rows] == list(LARGER)
    for name, *cells in rows:
        file, kind, size = LARGER[name]
        file = f'{MACHINES[machine]}model_cpu_{file}.json'
        results = load(BENCHMARKS / file)['results']
        which = 'train' if 'train' in file else 'forward'
        wanted = {'size': size, 'mode': 'eager', 'pass': which}
        ours = only(results, model=f'dgt_{kind}', **wanted)
        for model, cell in zip(('dgt', 'swin', 'timm_swin'), cells, strict=True):
            if cell:
                row = only(results, model=f'{model}_{kind}', **wanted)
                check_cell(cell, ours, row)


def test_sizes():
    """Against the paper's in tests/test_dgt.py and test_configs.py; here the index."""
    yaml = pytest.importorskip('yaml')
    index = yaml.safe_load((REPOSITORY / 'configs/metafile.yml').read_text())['Models']
    index = {model['Name']: model['Metadata'] for model in index}
    names = {
        'DGT': 'dgt_{}_in1k',
        'UperNet DGT': 'upernet_dgt_{}_ade20k',
        'Mask R-CNN DGT': 'mask_rcnn_dgt_{}_1x_coco',
    }
    rows = table('| model | input | parameters, paper | here |')
    assert len(rows) == 9
    for model, _, _, params, _, flops in rows:
        kind, size = model.rsplit('-', 1)
        metadata = index[names[kind].format(size.lower())]
        assert rounded(params, metadata['Parameters'] / 1e6), model
        assert rounded(flops, metadata['FLOPs'] / 1e9), model


def test_counted_backbones():
    """The same model has the same figures in both tables."""
    with (REPOSITORY / 'docs/backbones/backbones.csv').open() as file:
        counted = {
            (row['table'].split(':')[0], row['backbone']): row
            for row in csv.DictReader(file)
        }
    tables = {'UperNet DGT': 'Table 3', 'Mask R-CNN DGT': 'Table 4(a)'}
    for model, _, _, params, _, flops in table('| model | input | parameters, paper |'):
        kind, size = model.rsplit('-', 1)
        if kind in tables:
            row = counted[tables[kind], f'DGT-{size}']
            assert (row['params (M), here'], row['FLOPs (G), here']) == (params, flops)


def test_timed_backbones():
    results = load(REPOSITORY / 'docs/backbones/backbones.json')['results']
    row = {(r['table'].split(':')[0], r['backbone']): r for r in results}
    page = ' '.join((REPOSITORY / 'docs/model_speed.md').read_text().split())
    verdicts = []
    for name in ('Table 3', 'Table 4(a)'):
        for size in 'TSB':
            ours, theirs = row[name, f'DGT-{size}'], row[name, f'Swin-{size}']
            verdicts.append(verdict_on(ours, theirs))
            if verdicts[-1] == 'behind':
                assert f'({ours["ms"]:.0f} and {theirs["ms"]:.0f}' in page
    assert verdicts == ['behind', 'behind', 'equal', 'equal', 'ahead', 'ahead']


def test_the_demo():
    scores = load(MEASUREMENTS / 'demo.json')
    single, several = (scores[f'mIoU, {how}-scale'] for how in ('single', 'multi'))
    claim(f'the training took {scores["training, minutes"]} minutes on two cores of an')
    claim(
        f'mIoU of {single} on the 60 validation scenes, {several} multi-scale,'
        f' and in the worst block {scores["live groups of the worst block, %"]} % of'
    )
    scores = load(MEASUREMENTS / 'demo_classification.json')
    claim(f'({scores["top-1, single-scale"]} % top-1, six classes,')
    scores = load(MEASUREMENTS / 'demo_detection.json')
    box, mask = (scores[f'{kind} AP50, single-scale'] for kind in ('box', 'mask'))
    claim(f'box AP50 {box}, mask AP50 {mask}')
    box, mask = (scores[f'{kind} AP50, multi-scale'] for kind in ('box', 'mask'))
    claim(f'multi-scale {box} and {mask}')


def test_the_page_of_the_demo():
    page = (REPOSITORY / 'docs/demo.md').read_text()
    rows = table('| | single-scale | multi-scale |', page)
    assert len(rows) == 6
    for what, single, several, file in rows:
        scores, metric = load(MEASUREMENTS / file.strip('`')), what.split(', ')[1]
        assert float(single) == scores[f'{metric}, single-scale']
        assert float(several) == scores[f'{metric}, multi-scale']
    live = load(MEASUREMENTS / 'demo.json')['live groups of the worst block, %']
    assert f'in the worst block {live} % of the groups' in page


def test_the_groups_of_a_scene():
    scene = load(MEASUREMENTS / 'groups_of_a_scene.json')
    sizes = scene['group_sizes']
    assert sizes.count(0) == scene['empty_groups'] and sum(sizes) == scene['tokens']
    claim(f'{scene["empty_groups"]} of the {scene["groups"]} groups are empty')


def test_groups_in_training():
    rows = load(REPOSITORY / 'docs/comparisons/groups_demo.json')['results']
    page = (REPOSITORY / 'docs/groups.md').read_text()
    printed = table('| eq. 4 | empty groups | live, worst layer |', page)
    for (form, empty, live, largest, score), row in zip(printed, rows, strict=True):
        assert row['variant'] == f'{form}_{empty.split()[0]}'
        assert rounded(live.removesuffix(' %'), 100 * row['logged']['live_groups'])
        assert rounded(largest.removesuffix(' %'), 100 * row['logged']['largest_group'])
        assert score == f'{row["mean"]} ± {row["spread"]}'
    assert {row['learning_rate'] for row in rows} == {1e-3}
    keep, _, mirrored, _ = (100 * (1 - x['logged']['live_groups']) for x in rows)
    assert f'{keep:.0f} % of the groups of some layer' in page
    assert f'{mirrored:.0f} % with the mirrored form' in page
    means = [row['mean'] for row in rows]
    within = f'means within {max(means) - min(means) + 0.05:.1f} points'
    assert within in page and max(x['spread'] for x in rows) > max(means) - min(means)


def test_the_ablations():
    results = load(REPOSITORY / 'docs/ablations/dgt_ablation_demo.json')['results']
    means = [row['mean'] for row in results]
    spreads = [row['spread'] for row in results]
    page = ' '.join((REPOSITORY / 'docs/ablations.md').read_text().split())
    assert (
        f'the means lie within {max(means) - min(means):.1f} points, the spreads over'
        f' three seeds between {min(spreads):.1f} and {max(spreads):.1f}.'
    ) in page


# Configs of the paper's recipes: their data set for the loader, the pictures they see.
RECIPES = {
    'dgt_t_in1k': ('in1k', 300 * 1_281_167),
    'upernet_dgt_t_ade20k': ('ade20k', 160_000 * 16),
    'mask_rcnn_dgt_t_1x_coco': ('coco', 12 * 117_266),
}


def test_scaling():
    yaml = pytest.importorskip('yaml')
    index = yaml.safe_load((REPOSITORY / 'configs/metafile.yml').read_text())['Models']
    params = {model['Name']: model['Metadata']['Parameters'] for model in index}
    page = (REPOSITORY / 'docs/scaling.md').read_text()
    rows = table('| recipe, DGT-T | pictures, M |', page)
    within, between = [], []
    for (config, (data, seen)), cells in zip(RECIPES.items(), rows, strict=True):
        (loaded,) = load(BENCHMARKS / f'loader_{data}.json')['results']
        gradients = 4 * params[config]
        measured = loaded['pictures_per_s']
        values = (seen / 1e6, seen / 1000 / 3600, gradients / 1e6, measured)
        for cell, value in zip(cells[1:], values, strict=True):
            assert rounded(cell, value), (config, cell)
        sent = 2 * 7 / 8 * gradients
        within.append(f'{1e3 * sent / 450e9:.2f}')
        between.append(f'{1e3 * sent / 12.5e9:.1f}')
        if data == 'in1k':
            assert f'pictures a second {1000 / measured:.0f} cores' in page
    page = ' '.join(page.split())
    for times in (within, between):
        assert '{}, {} and {} ms'.format(*times) in page


@pytest.mark.parametrize('machine', MACHINES)
def test_neighbours(machine):
    results = load(BENCHMARKS / f'{MACHINES[machine]}neighbours.json')['rows']
    page = (REPOSITORY / 'docs/training.md').read_text()
    for setting, *cells in table(f'| {machine} | alone |', page):
        for load_of, cell in zip(('none', 'niced', 'equal'), cells, strict=True):
            steps = [
                row['step_s']
                for row in results
                if row['load'] == load_of
                and row.get('setting', row.get('GOMP_SPINCOUNT')) == setting
                and row.get('model', 'dgt_t') == 'dgt_t'
            ]
            for printed, step in zip(cell.split(', '), steps, strict=True):
                assert rounded(printed, step), (setting, load_of)


def test_bound_threads():
    page = ' '.join((REPOSITORY / 'docs/training.md').read_text().split())
    ratios = []
    for file in ('neighbours', 'neighbours_bound'):
        results = load(BENCHMARKS / f'{file}.json')['rows']
        alone, niced, equal = (
            [
                row['step_s']
                for row in results
                if (row['setting'], row['model'], row['load']) == ('bound', 'dgt_t', x)
            ]
            for x in ('none', 'niced', 'equal')
        )
        ratios += [e / a for a, e in zip(alone, equal, strict=True)]
        assert max(n / a for a, n in zip(alone, niced, strict=True)) < 1.05
    first, second, third, fourth = (f'{ratio:.1f}' for ratio in ratios)
    assert f'{first} and {second} times here, {third} and {fourth} in two more' in page
    assert sum(ratio > 2.2 for ratio in ratios) == 1


def test_distillation():
    rows = load(REPOSITORY / 'docs/comparisons/demo_comparison.json')['results']
    page = ' '.join((REPOSITORY / 'docs/distillation.md').read_text().split())
    random, distilled = rows
    for row, title in ((random, 'from random weights'), (distilled, 'distilled')):
        assert f'{title} {row["mean"]} ± {row["spread"]}' in page
    scores = [[run['score'] for run in row['runs']] for row in rows]
    assert f'after {random["iterations"]} iterations' in page
    assert min(scores[1]) > max(scores[0])


@pytest.mark.parametrize(
    'name, said',
    [
        ('camvid', "is {:.2f} points ahead of ConvNeXt-T's, the best of the others"),
        ('camvid_half', "its mean is {:.2f} points ahead of Swin-T's"),
    ],
)
def test_real_pictures(name, said):
    rows = load(REPOSITORY / f'docs/comparisons/{name}.json')['results']
    page = ' '.join((REPOSITORY / 'docs/real_pictures.md').read_text().split())
    scores = ', '.join(f'{r["title"]} {r["mean"]} ± {r["spread"]}' for r in rows)
    assert f'after {rows[0]["iterations"]} iterations: {scores}' in page
    ours, *theirs = rows
    best = max(theirs, key=lambda row: row['mean'])
    assert ours['title'] == 'DGT-T' and best['title'] in said
    assert said.format(ours['mean'] - best['mean']) in page
    assert ours['peak_bytes'] < min(row['peak_bytes'] for row in theirs)
    own, *others = (max(run['score'] for run in row['trials']) for row in rows)
    of_others = f'where {{}} have {min(others)} to {max(others)}'
    if name == 'camvid':
        assert ours['mean'] - best['mean'] < 2 * ours['spread']
        assert f'at full width {own} {of_others.format("the others")}' in page
    else:
        assert own < min(others)
        assert f'half the width {own}, the least, {of_others.format("they")}' in page
        assert ours['seconds'] > max(row['seconds'] for row in theirs)
    own = [run['score'] for run in ours['runs']]
    ahead = [
        row['title'] for row in theirs for run in row['runs'] if run['score'] > min(own)
    ]
    assert ahead == (['ConvNeXt-T'] if name == 'camvid' else [])
    if name == 'camvid':
        assert f'from {min(own)} to {max(own)}' in page
        assert ours['spread'] == max(row['spread'] for row in rows)


@pytest.mark.parametrize('name', ['camvid', 'camvid_half'])
def test_accuracy_against_k(name):
    page = ' '.join((REPOSITORY / 'docs/real_pictures.md').read_text().split())
    trained, *_ = load(REPOSITORY / f'docs/comparisons/{name}.json')['results']
    keys = load(REPOSITORY / f'docs/comparisons/{name}_keys.json')['results']
    score = {row['K']: row['score'] for row in keys}
    most, least = score[16], score['all']
    assert (least, most) == (min(score.values()), max(score.values()))
    assert score[32] == trained['runs'][0]['score']
    if name == 'camvid':
        assert f'the mIoU falls from {most} with 16 keys to {least} with all' in page
        assert f'{keys[0]["ms"]:.1f} and {keys[-1]["ms"]:.1f} ms a picture' in page
    else:
        assert f'at half the width from {most} to {least}' in page


def test_what_can_be_relied_on():
    page = ' '.join((REPOSITORY / 'docs/reliability.md').read_text().split())
    runs = load(REPOSITORY / 'docs/reliability/resume.json')['results']
    assert {run['processes'] for run in runs} == {1, 2}
    kills = [sum(run['kills'].values()) for run in runs]
    assert all(run['same_bits'] for run in runs) and min(kills) == max(kills)
    compared = sum(run['compared'] for run in runs)
    assert (
        f'{sum(kills)} such interruptions, {kills[0]} in each of {len(runs)} trainings,'
        f' in one process and in two: all {compared} runs'
    ) in page

    (calls,) = load(MEASUREMENTS / 'fuzz_cpu.json')['results']
    assert (
        f'{calls["calls"]:,} random calls in `docs/measurements/fuzz_cpu.json`,'
        f' {calls["by kernels"]:,} of them by kernels and {calls["with poison"]:,} with'
        f' rows that are not finite'
    ) in page

    (load_test,) = load(REPOSITORY / 'docs/reliability/page_load.json')['results']
    memory = load_test['memory_mib']
    for told in (
        f'{load_test["served"]} served, {load_test["refused by name"]} refused',
        f'{load_test["asked to come back later"]} asked to come back later',
        f'{load_test["lost"]} lost, {load_test["named a folder"]} answers',
        f'answers took up to {load_test["seconds_to_answer"]["p50"]:.0f} s',
        f'at most {memory["middle_third"]} MiB in the second third of the time and'
        f' {memory["last_third"]} MiB in the last',
    ):
        assert told in page, told
