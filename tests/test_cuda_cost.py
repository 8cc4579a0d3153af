"""The cost model's reading of disassembly, on a few literal lines."""

import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / 'tools'))

import cuda_cost

# Line i: address, instruction, scoreboard it sets (7: none), scoreboards it awaits.
LINES = [
    (0x00, 'LDC R1, c[0x0][0x28]', 7, 0),
    (0x10, 'LDG.E.128.CONSTANT R4, desc[UR4][R2.64]', 2, 0),
    (0x20, 'IMAD.WIDE R6, R6, 0x4, R8', 7, 0),
    (0x30, '@P0 LDS.64 R10, [R6]', 1, 0),
    (0x40, 'HMMA.16816.F32.BF16 R12, R4, R10, RZ', 7, 0b110),
    (0x50, 'MUFU.EX2 R13, R12', 0, 0),
    (0x60, '@!P1 BRA 0x30', 7, 0),
    (0x70, 'FADD.FTZ R14, R13, R13', 7, 0b1),
    (0x80, 'LDG.E R15, desc[UR4][R2.64]', 3, 0),
    *((0x90 + 0x10 * i, 'FFMA R14, R14, R14, R14', 7, 0) for i in range(12)),
    (0x150, 'STG.E.64 desc[UR4][R2.64], R14', 7, 0b1000),
    (0x160, '@P2 BRA 0x20', 7, 0),
    (0x164, '@P3 BRA 0x180', 7, 0),
    (0x170, 'EXIT', 7, 0),
    (0x180, 'FADD R14, R14, R14', 7, 0),
    (0x190, 'BRA 0x170', 7, 0),  # out of line: no loop
]


def disassembly():
    lines = ['\t\tFunction : _Z6kernelv', '\t.headerflags\t@"EF_CUDA_SM90"']
    for address, text, sets, awaits in LINES:
        control = sets << 46 | 7 << 49 | awaits << 52 | 0xFC1 << 41 & 0x3E0000000000
        lines.append(
            f'        /*{address:04x}*/    {text} ;    /* 0x0000000000007919 */'
        )
        lines.append(f'                                 /* 0x{control:016x} */')
    return '\n'.join(lines) + '\n'


@pytest.fixture
def instructions():
    return cuda_cost.parse_sass('\n' + disassembly())['_Z6kernelv']


def test_every_instruction_is_read(instructions):
    assert [(i.address, i.text) for i in instructions] == [line[:2] for line in LINES]
    assert [i.sets for i in instructions][:5] == [None, 2, None, 1, None]
    assert [i.awaits for i in instructions] == [line[3] for line in LINES]


def test_notes_of_the_assembler_are_left_out(instructions):
    noted = disassembly().replace(' ;', '  &req={0}  ?trans5;')
    assert cuda_cost.parse_sass('\n' + noted)['_Z6kernelv'] == instructions


def test_instructions_by_pipe_and_bytes(instructions):
    pipes = [i.pipe for i in instructions[:9]]
    assert pipes == [
        'uniform',
        'global',
        'integer',
        'shared',
        'mma',
        'special',
        'branch',
        'math',
        'global',
    ]
    assert instructions[1].moved == ('global', 16)
    assert instructions[3].moved == ('shared', 8)
    assert instructions[8].moved == ('global', 4)
    assert instructions[4].moved == ('none', 0)


def test_a_load_waited_for_at_once_is_exposed(instructions):
    # The first is awaited three instructions on, the second after twelve others.
    assert cuda_cost.exposed_loads(instructions) == 1


def test_loops_by_depth(instructions):
    outer, inner = cuda_cost.loops(instructions)
    assert (outer['at'], outer['depth'], outer['instructions']) == (0x20, 1, 21)
    assert (inner['at'], inner['depth'], inner['instructions']) == (0x30, 2, 4)
    assert (inner['mma'], inner['special'], inner['shared']) == (1, 1, 1)
    assert inner['bytes'] == {'shared': 32 * 8}
    assert outer['bytes'] == {'shared': 32 * 8, 'global': 32 * (4 + 8)}
    assert cuda_cost.heaviest_loop({'loops': [outer, inner]}) is inner


def test_a_rare_path_hides_no_loop_of_products():
    products = {'depth': 1, 'innermost': False, 'instructions': 9, 'mma': 2}
    rare = {'depth': 2, 'innermost': True, 'instructions': 5}
    other = {'depth': 1, 'innermost': True, 'instructions': 40}
    row = {'loops': [products, rare, other]}
    assert cuda_cost.heaviest_loop(row) is products


def test_resources_of_a_kernel():
    log = """ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'
ptxas info    : Function properties for _Z6kernelv
    48 bytes stack frame, 60 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 48 bytes stack size, 2048 bytes smem
"""
    ptx = '.visible .entry _Z6kernelv(\n.param .u64 a\n)\n.maxntid 224, 1, 1\n{'
    assert cuda_cost.parse_resources(log, ptx) == {
        '_Z6kernelv': {
            'registers': 80,
            'spill_stores': 60,
            'spill_loads': 56,
            'shared': 2048,
            'threads': 224,
        }
    }


@pytest.mark.parametrize(
    'architecture, threads, registers, shared, blocks',
    [
        ('sm_90', 256, 32, 0, 8),  # threads
        ('sm_90', 224, 80, 0, 3),  # registers: 7 * 2560 * 3 of 65536
        ('sm_90', 128, 32, 50 << 10, 4),  # shared memory: 4 * 51 of 228 KB
        ('sm_90', 32, 32, 0, 32),  # blocks
        ('sm_80', 128, 32, 50 << 10, 3),  # 3 * 51 of 164 KB
        ('sm_120', 256, 32, 0, 6),  # 1536 threads
    ],
)
def test_blocks_of_a_multiprocessor(architecture, threads, registers, shared, blocks):
    machine = cuda_cost.ARCHITECTURES[architecture]
    assert machine.blocks_of(threads, registers, shared) == blocks


def test_names_are_readable():
    name = '_ZN5mmdgt12_GLOBAL__N_16kernelI13__nv_bfloat16Li32EEEvi'
    assert cuda_cost.short_names([name]) == {name: 'kernel<bfloat16, 32>'}
