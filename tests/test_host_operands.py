"""operand.c: which memory a host instruction accesses; it decides whether a vCPU that sleeps in a page fault may be
woken there. Against an assembler's word for what the operand is."""

from __future__ import annotations

import ctypes
import random

import pytest

from anykvm.backends.soft.engine.library import library
from anykvm.testing.assembler import assemble

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
FORMS = [
    "mov {}, %r9", "mov %eax, {}", "movb %r15b, {}", "movzwl {}, %edx", "movsbq {}, %rax", "movslq {}, %rcx",
    "lock orb $0, {}", "lock cmpxchg %rsi, {}", "lock cmpxchg16b {}", "lock xadd %ax, {}", "movbe {}, %rdi",
    "movdqu %xmm9, {}", "movups {}, %xmm1", "movq %xmm0, {}", "vmovdqu {}, %ymm12", "vmovdqu %xmm1, {}",
    "shlx %rax, {}, %rbx", "movl $0x12345678, {}", "movw $0x1234, {}", "addq $1, {}", "fldt {}", "fstpl {}", "incl {}",
    "testb $1, {}", "imul $300, {}, %ecx", "xchg %rbp, {}", "pinsrd $1, {}, %xmm2", "crc32q {}, %rax",
    "movntdqa {}, %xmm3",
]  # fmt: skip
NO_OPERAND = [
    "mov %rax, %rcx", "push %rax", "pop %r12", "call .+100", "ret", "mov 0x100(%rip), %rax", "mov %fs:(%rax), %rax",
    "rep movsb", "nop", "vzeroupper", "cpuid", "bswap %rax", "movabs 0x1122334455667788, %al", "jne .+1000",
    "mov %gs:8(%rbx), %rcx", "vmovdqu64 (%rax), %zmm1",
]  # fmt: skip


def operand(code: bytes, values: list[int]) -> int | None:
    function = ctypes.CDLL(library()._name).ak_operand_address
    function.restype = ctypes.c_bool
    address = ctypes.c_uint64()
    registers = (ctypes.c_uint64 * 16)(*values)
    return address.value if function(code.ljust(20, b"\xcc"), registers, ctypes.byref(address)) else None


@pytest.mark.parametrize("form", FORMS)
def test_the_address_of_a_memory_operand(form: str) -> None:
    choose = random.Random(form)
    values = [choose.getrandbits(47) for _ in NAMES]
    cases = []
    for _ in range(24):
        base, index = choose.choice([*NAMES, ""]), choose.choice([name for name in NAMES if name != "rsp"] + ["", ""])
        scale, displacement = choose.choice((1, 2, 4, 8)), choose.choice((0, 1, -8, 127, 128, -129, 0x12345678))
        inside = (f"%{base}" if base else "") + (f",%{index},{scale}" if index else "")
        cases.append(
            (
                f"{displacement}({inside})" if inside else str(displacement & 0x7FFFFFFF),
                base,
                index,
                scale,
                displacement,
            )
        )
    marks = "\n".join(f"{form.format(text)}\n.balign 32, 0xcc" for text, *_ in cases)
    image = assemble(marks)
    for number, (text, base, index, scale, displacement) in enumerate(cases):
        want = (values[NAMES.index(base)] if base else 0) + (values[NAMES.index(index)] * scale if index else 0)
        want += displacement if base or index else displacement & 0x7FFFFFFF
        assert operand(image[number * 32 : number * 32 + 20], values) == want % (1 << 64), text


@pytest.mark.parametrize("source", NO_OPERAND)
def test_no_operand_that_could_be_guest_memory(source: str) -> None:
    assert operand(assemble(source), [0x1000] * 16) is None
