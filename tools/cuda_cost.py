"""What the CUDA kernels cost on paper: no GPU is needed, and no time is claimed.

Compiles csrc/cuda and reads registers, spills and shared memory from ptxas, and the
loops from the disassembly: instructions by pipe, bytes moved, and loads that are
waited for at once. It ranks variants of a kernel; ``--base REVISION`` puts those of
another revision beside them.

Needs nvcc (CUDA_HOME or on the path) and cuobjdump, which the toolkit and Triton's
package carry.
"""

import argparse
import dataclasses
import glob
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import add_out, find_out

from mmdgt.commands import run_command
from mmdgt.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
AT_ONCE = 12  # instructions between a load and its use that hide next to nothing


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of one multiprocessor share."""

    threads: int
    blocks: int
    shared: int  # bytes, of which every block needs 1 KB more than it asks for
    registers: int = 65536

    def blocks_of(self, threads: int, registers: int, shared: int) -> int:
        """How many such blocks run at once."""
        warps = -(-threads // 32)
        of_warp = -(-32 * registers // 256) * 256
        return min(
            self.blocks,
            self.threads // (32 * warps),
            self.registers // (of_warp * warps),
            self.shared // (-(-shared // 128) * 128 + 1024),
        )


ARCHITECTURES = {
    'sm_80': Multiprocessor(threads=2048, blocks=32, shared=164 << 10),
    'sm_90': Multiprocessor(threads=2048, blocks=32, shared=228 << 10),
    'sm_120': Multiprocessor(threads=1536, blocks=24, shared=100 << 10),
}

# Sizes for the shared memory that launches add.
GROUPS, TOKENS = 48, 196


def backward_shared(row_bytes: int, size: int) -> int:
    """What BackwardBlock (group_attention_backward.cu) asks for."""
    warps = 2 if row_bytes > 256 else 4
    keys = 16 * warps * (2 if row_bytes == 64 else 1)
    queries = 64 if row_bytes == 64 else 32 if row_bytes == 128 or size == 2 else 16
    rows = 5 * queries + keys * (1 if row_bytes <= 128 else 2)
    scores = max(keys * queries * size, keys * row_bytes if row_bytes <= 128 else 0)
    return rows * row_bytes + scores + 12 * queries


def launched_shared(kernel: str) -> int:
    """Bytes of dynamic shared memory that a launch gives to a kernel."""
    name, *arguments = re.findall(r'\w+', kernel)
    size = 4 if 'float' in arguments else 2
    dim, *sizes = [int(argument) for argument in arguments if argument.isdigit()] or [0]
    terms = {'bfloat16': 3, 'half': 2}.get(arguments[0] if arguments else '', 1)
    operands = dim // 16 * terms * 32 * 8 * size  # of 16 centroids
    rows = -(-TOKENS // 16) * 16
    masks = 32 * GROUPS  # bytes, of up to 256 tokens
    formulas = {
        'assign_kernel': lambda: GROUPS // 16 * operands,
        'collect_kernel': lambda: GROUPS // 16 * operands,
        'sum_kernel': lambda: 8 * GROUPS * 128 + GROUPS * 4,
        'sample_kernel': lambda: operands + sizes[1] * (sizes[0] + 8) * 4,
        'select_few_kernel': lambda: operands + 16 * (sizes[0] + 8) * 4,
        'place_kernel': lambda: 8 * GROUPS * 4,
        'attend_kernel': lambda: (
            4 * sizes[1] * dim * size + 2 * 16 * sizes[0] * (dim * size + 4)
        ),
        'attend_backward_kernel': lambda: backward_shared(dim * size, size),
        'masked_kernel': lambda: 2 * rows * 32 * size + masks,
        'masked_backward_kernel': lambda: (
            3 * rows * 32 * size + -(-TOKENS // 32) * 32 * 64 * size + rows * 32
        ),
        'choose_and_attend_kernel': lambda: (
            rows * 32 * size
            + GROUPS * (rows + 8) * 4
            + GROUPS // 16 * 2 * terms * 32 * 8 * size
            + masks
            + -(-rows // 32) * 640
        ),
    }
    return formulas.get(name, int)()


# Opcodes by the pipe that executes them; what is not named is 'other'.
PIPES = {
    'mma': r'HMMA|HGMMA|IMMA|MMA',
    'special': r'MUFU|F2F\b|F2I|I2F\b|POPC|FLO',
    'math': r'FADD|FMUL|FFMA|FMNMX|FSETP|FSET|FSEL|FCHK|H[A-Z]+2|F2FP|I2FP|FRND',
    'integer': r'IMAD|IADD|IABS|ISETP|ICMP|IMNMX|LEA|LOP|SHF|SEL|VIADD|VIMNMX|PRMT|MOV'
    r'|VIADDMNMX|VABSDIFF|PLOP|R2P|P2R|CS2R|BMSK|SGXT|BREV|LOP32I|CREDUX',
    'uniform': r'U[A-Z]|R2U|REDUX|S2U|LDC|ULDC|VOTE',
    'shuffle': r'SHFL|MATCH',
    'shared': r'LDS|STS|ATOMS',
    'global': r'LDG|STG|RED\b|ATOMG|ATOM\b|LD\b|ST\b',
    'local': r'LDL|STL',
    'barrier': r'BAR|DEPBAR|LDGDEPBAR|SYNCS|WARPSYNC|MEMBAR|FENCE',
    'branch': r'BRA|BRX|BSSY|BSYNC|CALL|RET|EXIT|BREAK|YIELD|NOP|BMOV|ENDCOLLECTIVE',
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    text: str
    sets: int | None  # the scoreboard that its result releases
    awaits: int  # one bit per scoreboard that it waits for

    @property
    def opcode(self) -> str:
        """Without its predicate and operands."""
        return re.sub(r'^@!?U?P\w+\s+', '', self.text).split()[0]

    @property
    def pipe(self) -> str:
        """The key of PIPES."""
        for pipe in ('mma', 'special', 'local', 'shared', 'global', 'barrier'):
            if re.match(PIPES[pipe], self.opcode):
                return pipe
        return next(
            (p for p, ops in PIPES.items() if re.match(ops, self.opcode)), 'other'
        )

    @property
    def moved(self) -> tuple[str, int]:
        """Where a lane reads or writes how many bytes."""
        name, *parts = self.opcode.split('.')
        space = {
            'LDG': 'global',
            'STG': 'global',
            'LDGSTS': 'global',
            'LDS': 'shared',
            'STS': 'shared',
            'LDSM': 'shared',
            'STSM': 'shared',
            'LDL': 'local',
            'STL': 'local',
        }.get(name)
        if space is None:
            return 'none', 0
        if name in ('LDSM', 'STSM'):
            return space, 4 * int(parts[-1]) if parts[-1].isdigit() else 4
        bits = [int(p.strip('US')) for p in parts if p.strip('US').isdigit()]
        return space, (bits[-1] if bits else 32) // 8


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Disassembly of ``cuobjdump -sass`` by function, names as they are mangled."""
    functions = {}
    for part in re.split(r'\n\s*Function : ', text)[1:]:
        name, body = part.split('\n', 1)
        lines = re.findall(
            # Behind & and ? sm_120 has notes of the assembler's.
            r'/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*(?:[&?][^;]*)?;'
            r'\s+/\* 0x[0-9a-f]+ \*/\s+'
            r'/\* 0x([0-9a-f]+) \*/',
            body,
        )
        functions[name.strip()] = [
            # Volta and later: 4 bits of stall, 1 yield, 3 the scoreboard set when
            # written, 3 when read, 6 those awaited.
            Instruction(
                int(address, 16),
                instruction,
                scoreboard if (scoreboard := int(word, 16) >> 46 & 7) < 6 else None,
                int(word, 16) >> 52 & 63,
            )
            for address, instruction, word in lines
        ]
    return functions


def parse_resources(log: str, ptx: str) -> dict[str, dict]:
    """Registers, bytes and threads of every kernel, from ptxas -v and the PTX."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        numbers = {
            'registers': r'Used (\d+) registers',
            'spill_stores': r'(\d+) bytes spill stores',
            'spill_loads': r'(\d+) bytes spill loads',
            'shared': r'(\d+) bytes smem',
        }
        found[name] = {
            key: int(match[1]) if (match := re.search(pattern, part)) else 0
            for key, pattern in numbers.items()
        }
        bounds = re.search(
            rf'\.entry {re.escape(name)}\((?:[^)]*)\)\s*\.maxntid (\d+)', ptx
        )
        found[name]['threads'] = int(bounds[1]) if bounds else 1024
    return found


def exposed_loads(instructions: list[Instruction]) -> int:
    """Loads from global memory whose result is waited for at once."""
    count = 0
    for i, load in enumerate(instructions):
        if load.opcode.startswith('LDG.') and load.sets is not None:
            soon = instructions[i + 1 : i + 1 + AT_ONCE]
            count += any(other.awaits >> load.sets & 1 for other in soon)
    return count


def successors(instructions: list[Instruction]) -> list[list[int]]:
    """For every instruction, which may come next."""
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    result = []
    for i, instruction in enumerate(instructions):
        after = [i + 1] if i + 1 < len(instructions) else []
        name = instruction.opcode.split('.')[0]
        if name in ('BRA', 'EXIT', 'RET') and not instruction.text.startswith('@'):
            after = []
        target = re.search(r'(0x[0-9a-f]+)\W*$', instruction.text)
        if name in ('BRA', 'WARPSYNC') and target and int(target[1], 16) in place:
            after.append(place[int(target[1], 16)])
        result.append(after)
    return result


def reachable(start: int, edges: list[list[int]], without: int) -> set[int]:
    """What can be reached from an instruction, not going through another one."""
    seen, open_ends = set(), [start] if start != without else []
    while open_ends:
        i = open_ends.pop()
        if i not in seen:
            seen.add(i)
            open_ends += [j for j in edges[i] if j != without]
    return seen


def loop_bodies(instructions: list[Instruction]) -> dict[int, set[int]]:
    """Natural loops: from where they begin to the instructions in them.

    Jumps back from code that stands out of line, such as that of a rare case, make
    no loop: where they lead to is reached in other ways too.
    """
    forward = successors(instructions)
    backward: list[list[int]] = [[] for _ in instructions]
    for i, after in enumerate(forward):
        for j in after:
            backward[j].append(i)
    bodies: dict[int, set[int]] = {}
    for last, after in enumerate(forward):
        for first in after:
            if first <= last and last not in reachable(0, forward, without=first):
                body = reachable(last, backward, without=first) | {first}
                bodies[first] = bodies.get(first, set()) | body
    return bodies


def loops(instructions: list[Instruction]) -> list[dict]:
    """Every loop: its address, depth, instructions by pipe, and bytes of a warp."""
    bodies = loop_bodies(instructions)
    result = []
    for first, places in sorted(bodies.items()):
        body = [instructions[i] for i in sorted(places)]
        pipes = Counter(i.pipe for i in body)
        moved: Counter[str] = Counter()
        for instruction in body:
            space, size = instruction.moved
            moved[space] += 32 * size
        result.append(
            {
                'at': instructions[first].address,
                'depth': sum(places <= other for other in bodies.values()),
                'innermost': not any(other < places for other in bodies.values()),
                'instructions': len(body),
                **{pipe: pipes[pipe] for pipe in (*PIPES, 'other') if pipes[pipe]},
                'exposed_loads': exposed_loads(body),
                'bytes': {space: moved[space] for space in moved if space != 'none'},
            }
        )
    return result


def short_names(mangled: list[str]) -> dict[str, str]:
    """Readable names: kernel and template arguments."""
    done = subprocess.run(
        ['c++filt'],
        input='\n'.join(mangled),
        capture_output=True,
        text=True,
        check=True,
    )
    short = {}
    for name, readable in zip(mangled, done.stdout.splitlines(), strict=True):
        readable = re.sub(
            r'\(anonymous namespace\)::|mmdgt::(cuda::)?|^void ', '', readable
        )
        readable = readable.replace('__nv_bfloat16', 'bfloat16').replace(
            '__half', 'half'
        )
        short[name] = re.sub(r'\(int\)|\(bool\)', '', readable).split('(')[0]
    return short


def find_program(name: str) -> str:
    """A program of the toolkit."""
    folders = (
        [Path(os.environ['CUDA_HOME'], 'bin')] if 'CUDA_HOME' in os.environ else []
    )
    triton = importlib.util.find_spec('triton')
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / 'backends' / 'nvidia' / 'bin')
    path = os.pathsep.join([*map(str, folders), os.environ.get('PATH', '')])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f'{name} was not found; set CUDA_HOME to a CUDA toolkit')
    return found


def folders_of(package: str) -> list[str]:
    """Where a package lies, without importing it; nowhere if it is not installed."""
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


def include_flags() -> list[str]:
    """Where torch's, mmcv's and the toolkit's libraries' headers lie."""
    import sysconfig

    from torch.utils.cpp_extension import include_paths

    (mmcv,) = (Path(folder, 'ops/csrc/common') for folder in folders_of('mmcv'))
    folders = [
        *include_paths(),
        str(mmcv),
        str(mmcv / 'cuda'),
        sysconfig.get_path('include'),
    ]
    for folder in folders_of('nvidia'):
        folders += glob.glob(f'{folder}/cu*/include')
    return [flag for folder in folders for flag in ('-isystem', folder)]


def compile_and_read(
    source: Path, architecture: str, flags: list[str], launched: Callable[[str], int]
) -> list[dict]:
    """The kernels of one source file, to which launches give so much shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, 'kernels.cubin')
        command = [find_program('nvcc'), '-cubin', f'-arch={architecture}', '-O3']
        command += ['-std=c++17', '-DMMDGT_WITH_CUDA', '-Xptxas', '-v', '--keep']
        command += ['--keep-dir', folder, *flags, str(source), '-o', str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f'{source} does not compile:\n{done.stderr}')
        ptx = next(Path(folder).glob('*.ptx')).read_text()
        resources = parse_resources(done.stdout + done.stderr, ptx)
        command = [find_program('cuobjdump'), '-sass', str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    functions = parse_sass(done.stdout)
    names = short_names(list(resources))
    for mangled, numbers in resources.items():
        numbers['shared'] += launched(names[mangled])
    return [
        {
            'kernel': names[mangled],
            'file': source.name,
            'architecture': architecture,
            **numbers,
            'blocks': ARCHITECTURES[architecture].blocks_of(
                numbers['threads'], numbers['registers'], numbers['shared']
            ),
            'instructions': len(functions[mangled]),
            'exposed_loads': exposed_loads(functions[mangled]),
            'loops': loops(functions[mangled]),
        }
        for mangled, numbers in resources.items()
    ]


def measure(tree: Path, pattern: str, architectures: list[str]) -> list[dict]:
    """The kernels of a checkout's files that fit the pattern, sorted by name."""
    flags = ['-I', str(tree / 'csrc'), *include_flags()]
    sources = sorted((tree / 'csrc' / 'cuda').glob(pattern))
    # What launches ask for is known to the tool that belongs to the sources.
    launched = runpy.run_path(str(tree / 'tools/cuda_cost.py'))['launched_shared']
    jobs = [(s, arch, flags, launched) for arch in architectures for s in sources]
    with ThreadPoolExecutor(
        int(os.environ.get('MAX_JOBS') or os.cpu_count() or 1)
    ) as pool:
        kernels = [
            row
            for rows in pool.map(lambda job: compile_and_read(*job), jobs)
            for row in rows
        ]
    order = list(ARCHITECTURES)
    return sorted(
        kernels, key=lambda row: (row['kernel'], order.index(row['architecture']))
    )


def git(*arguments: str) -> bytes:
    """What git prints."""
    done = subprocess.run(
        ['git', *arguments], cwd=REPOSITORY, capture_output=True, check=True
    )
    return done.stdout


def measure_revision(
    revision: str, pattern: str, architectures: list[str]
) -> list[dict]:
    """All kernels of another revision."""
    with tempfile.TemporaryDirectory() as folder:
        archive = git('archive', revision, 'csrc', 'tools/cuda_cost.py')
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter='data')
        return measure(Path(folder), pattern, architectures)


def heaviest_loop(row: dict) -> dict:
    """Of the innermost loops the one with most products, the largest of such.

    A loop whose inner loops hold no product counts as innermost too: those are rare
    paths, such as a row that is not finite.
    """
    loops = row['loops']  # every loop stands ahead of those within it

    def counts(i: int) -> bool:
        if loops[i]['innermost'] or 'mma' not in loops[i]:
            return loops[i]['innermost']
        within = itertools.takewhile(
            lambda loop: loop['depth'] > loops[i]['depth'], loops[i + 1 :]
        )
        return not any('mma' in loop for loop in within)

    return max(
        (loop for i, loop in enumerate(loops) if counts(i)),
        key=lambda loop: (loop.get('mma', 0), loop['instructions']),
        default={},
    )


COLUMNS = (
    'kernel',
    'arch',
    'registers',
    'spilled bytes',
    'shared bytes',
    'warps/SM',
    'instructions',
    'exposed loads',
    'loop: all',
    'mma',
    'special',
    'math',
    'integer',
    'shared',
    'global',
    'other',
    'bytes shared',
    'bytes global',
)


def markdown(kernels: list[dict], about: dict) -> str:
    """A table of the kernels, each with its heaviest loop."""
    lines = [
        '# What the CUDA kernels cost on paper',
        '',
        'Written by `tools/cuda_cost.py`: '
        + ', '.join(f'{k} {v}' for k, v in about.items()),
        '',
        'Registers are those of a thread. Shared memory is what a kernel declares and,',
        f'for {GROUPS} groups and {TOKENS} tokens, a launch adds; the warps that a',
        'multiprocessor holds follow from both. An exposed load is one from global',
        f'memory that is waited for within {AT_ONCE} instructions. The loop is the',
        'innermost one with most matrix products; its instructions, with those of rare',
        'paths within it, are given by pipe, its bytes are those of a warp in a pass.',
        'Nothing here is a time.',
        '',
        '| ' + ' | '.join(COLUMNS) + ' |',
        '| ' + ' | '.join(['---'] * 2 + ['--:'] * (len(COLUMNS) - 2)) + ' |',
    ]
    for row in kernels:
        loop = heaviest_loop(row)
        named = ('mma', 'special', 'math', 'integer', 'shared', 'global')
        counts = [loop.get(pipe, 0) for pipe in named]
        warps = row['blocks'] * -(-row['threads'] // 32)
        cells = [
            f'`{row["kernel"]}`' + (f' ({row["tree"]})' if 'tree' in row else ''),
            row['architecture'],
            row['registers'],
            row['spill_stores'] + row['spill_loads'],
            row['shared'],
            warps,
            row['instructions'],
            row['exposed_loads'],
            loop.get('instructions', 0),
            *counts,
            loop.get('instructions', 0) - sum(counts),
            loop.get('bytes', {}).get('shared', 0),
            loop.get('bytes', {}).get('global', 0),
        ]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--base',
        help='a git revision to put beside the working tree, or what this tool wrote'
        ' there (.json)',
    )
    parser.add_argument(
        '--architectures',
        default=','.join(ARCHITECTURES),
        help='with commas between them',
    )
    parser.add_argument('--sources', default='*.cu', help='which files of csrc/cuda')
    parser.add_argument(
        '--table',
        default=r'^[a-z_]+$|bfloat16(, (32\b.*|[78]))?>',
        help='a pattern of the kernels in the table; the JSON has all',
    )
    add_out(parser, REPOSITORY / 'docs/cuda/cost', 'name without its end')
    args = parser.parse_args()
    out = find_out(parser, args)
    architectures = args.architectures.split(',')

    version = subprocess.run(
        [find_program('nvcc'), '--version'], capture_output=True, text=True
    )
    about = {
        'nvcc': re.findall(r', V(\S+)', version.stdout)[0],
        'commit': git('rev-parse', 'HEAD').decode().strip(),
        'clean': not git('status', '--porcelain', 'csrc', 'tools/cuda_cost.py'),
    }
    kernels = measure(REPOSITORY, args.sources, architectures)
    if args.base:
        if args.base.endswith('.json'):
            found = json.loads(Path(args.base).read_text())
            about['base'], base = found['about']['commit'], found['kernels']
        else:
            about['base'] = git('rev-parse', args.base).decode().strip()
            base = measure_revision(args.base, args.sources, architectures)
        kernels = [{**row, 'tree': 'base'} for row in base] + [
            {**row, 'tree': 'candidate'} for row in kernels
        ]
        kernels.sort(key=lambda row: (row['kernel'], row['architecture'], row['tree']))
    rows = ',\n'.join(json.dumps(row) for row in kernels)
    write_text(
        f'{out}.json',
        f'{{"about": {json.dumps(about)},\n"kernels": [\n{rows}\n]}}\n',
    )
    shown = [row for row in kernels if re.search(args.table, row['kernel'])]
    write_text(f'{out}.md', markdown(shown, about))


if __name__ == '__main__':
    run_command(main)
