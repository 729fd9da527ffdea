"""The test bed of the annotate layer: random instructions over random pages that the host refuses in random ways.

The soft backend knows what it met (``struct ak_exit`` stays readable), also under the profile that tells nobody. So one
VM gives both: the truth, and the EFAULT that the layer has to explain.
"""

from __future__ import annotations

import collections
import errno
import mmap
import os
import random
import struct
import sys
from types import TracebackType

import anykvm
from anykvm.abi.structures import kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events
from anykvm.api import libc
from anykvm.backends import Backend
from anykvm.backends.soft import native
from anykvm.backends.soft.files import FILES
from anykvm.layers.annotate import Access, Annotate, Cause
from machine import KERNEL_CS, KERNEL_DS, TSS_SEL, USER_CS, USER_DS, assemble, segment

PAGE = 4096
ARENA_GPA = 0x100000
AREAS = ("code", "source", "target", "stack", "base", "inner", "idt", "gdt", "tss", "halt")
VA = {name: 0x40000000 + (index << 21) for index, name in enumerate(AREAS)}
"""Each area is two pages, below a page table of its own."""
HALT = VA["halt"]
KINDS = {0: Access.READ, 1: Access.WRITE, 2: Access.EXEC}
REFUSALS = ("none", "read-only", "unmapped", "beyond")

LONG = """
mov (%rsi), %al | mov (%rsi), %ax | mov (%rsi), %eax | mov (%rsi), %rax | mov %al, (%rdi) | mov %rax, (%rdi)
movl $7, 3(%rdi) | movq $7, (%rbx,%rcx,8) | mov %fs:(%rsi), %eax | mov %rax, %gs:8(%rdi) | add %rax, (%rbx)
add (%rsi), %rax | incq (%rdi) | notl (%rdi) | negw (%rbx) | lock incq (%rdi) | lock addl $3, (%rbx) | lock notw (%rdi)
lock negl (%rdi) | xchg %rax, (%rsi) | xchg %al, (%rdi) | xadd %rax, (%rdi) | lock xadd %eax, (%rdi)
cmpxchg %rcx, (%rdi) | lock cmpxchg %ecx, (%rdi) | cmpxchg8b (%rdi) | lock cmpxchg8b (%rdi) | cmpxchg16b (%rdi)
lock cmpxchg16b (%rdi) | push %rax | pushw %ax | pushq $5 | pushfq | push %fs | pushq (%rsi) | pop %rax | popw %ax
popq (%rdi) | popq 8(%rsp) | popfq | call *%rdx | call *(%rsi) | jmp *(%rsi) | jmp *%rdx | ret | ret $16 | leave
enter $32, $0 | enter $16, $3 | movsb | movsw | movsl | movsq | rep movsb | rep movsq | stosb | stosq | rep stosq
lodsb | lodsq | rep lodsl | scasb | repne scasw | cmpsb | cmpsq | repe cmpsl | xlat | movups (%rsi), %xmm0
movaps (%rsi), %xmm1 | movups %xmm0, (%rdi) | movaps %xmm0, (%rdi) | movq %xmm0, (%rdi) | movsd (%rsi), %xmm2
movss %xmm2, (%rdi) | addps (%rsi), %xmm0 | paddd (%rsi), %xmm3 | movnti %rax, (%rdi) | cvtsi2sdl (%rsi), %xmm1
fxsave (%rdi) | fxrstor (%rsi) | fldt (%rsi) | fldl (%rsi) | flds (%rsi) | fstpt (%rdi) | fstpl (%rdi) | fstps (%rdi)
fildq (%rsi) | fistpl (%rdi) | fistpll (%rdi) | fldcw (%rsi) | fnstcw (%rdi) | fnstsw (%rdi) | fnstenv (%rdi)
fldenv (%rsi) | fnsave (%rdi) | frstor (%rsi) | fbld (%rsi) | fbstp (%rdi) | faddl (%rsi) | fiaddl (%rsi)
stmxcsr (%rdi) | ldmxcsr (%rsi) | lgdt (%rsi) | lidt (%rsi) | sgdt (%rdi) | sidt (%rdi) | sldt (%rdi) | str (%rdi)
smsw (%rdi) | bt %rax, (%rsi) | bts %rax, (%rdi) | btrl %ecx, (%rdi) | btcw $3, (%rdi) | lock bts %rax, (%rdi)
bt $40, (%rsi) | movzbl (%rsi), %eax | movsxd (%rsi), %rax | movzwq (%rsi), %rcx | cmp (%rsi), %rax | cmpb $1, (%rsi)
test %rax, (%rsi) | cmovne (%rsi), %rax | sete (%rdi) | setne (%rbx) | imul (%rsi), %rax
mulq (%rsi) | bsf (%rsi), %rax
popcnt (%rsi), %rax | shll %cl, (%rdi) | rolb $1, (%rdi) | shld $4, %rax, (%rdi) | lea (%rsi), %rax | nopw (%rsi)
prefetcht0 (%rsi) | clflush (%rsi) | invlpg (%rsi) | lss (%rsi), %eax | lfs (%rsi), %eax | lar %dx, %eax | mov %edx, %fs
int $0x40 | int3 | ud2 | div %r15 | mov (%r14), %rax | push (%r14) | mov %rax, 0x10(%rip) | movabs 0x40200008, %rax
adc %cl, (%rbx) | sbb (%rbx), %dl | movdqu (%rsi), %xmm4 | movntdq %xmm0, (%rdi) | movlps (%rsi), %xmm0
movhps %xmm0, (%rdi) | movbe (%rsi), %rax | iretq | lretq | mov %ds, (%rdi) | orq $1, 8(%rsp) | addr32 mov (%esi), %eax
mov %rax, %cr3 | hlt | pause; mov (%rsi), %eax
"""


def templates(text: str) -> list[tuple[str, bytes]]:
    """Assemble each instruction; one call of the assembler for all."""
    sources = [source.strip() for line in text.strip().splitlines() for source in line.split("|")]
    slot = 32
    program = "\n".join(f".balign {slot}\n{source}\n" + "1: .byte 0x0f,0x0b,0xde,0xad" for source in sources)
    code = assemble(program, VA["code"])
    found = []
    for index, source in enumerate(sources):
        piece = code[index * slot : (index + 1) * slot]
        found.append((source, piece[: piece.index(b"\x0f\x0b\xde\xad")]))
    return found


class Result:
    """How many faults there were, and how the layer did."""

    def __init__(self) -> None:
        self.faults = self.ambiguous = self.skipped = 0
        self.wrong: list[str] = []
        self.roles: collections.Counter[str] = collections.Counter()
        self.sources: collections.Counter[str] = collections.Counter()

    def __str__(self) -> str:
        share = 100 * self.ambiguous / max(1, self.faults)
        return (
            f"{self.faults} faults, {len(self.wrong)} wrong, {self.ambiguous} ambiguous ({share:.1f} %), "
            f"{len(self.sources)} instructions, by role {dict(self.roles)}; {self.skipped} runs did not fault"
        )


class Bed:
    """One VM in long mode whose every page can be refused by the host."""

    def __init__(self, seed: int, backend: Backend | None = None) -> None:
        self.random = random.Random(seed)
        self.layer = Annotate(backend or anykvm.backend("soft", "linux-7.3"))
        self.kvm = anykvm.open(self.layer)
        self.vm = self.kvm.create_vm()
        self.file = os.memfd_create("ram")
        pages = 4 * len(AREAS) + 8
        self.size = pages * PAGE
        os.ftruncate(self.file, self.size)
        self.host = libc.mmap(0, self.size, 3, libc.MAP_SHARED, self.file)
        os.ftruncate(self.file, self.size)
        self.short = os.memfd_create("short")  # an empty file: every page of it is beyond the end
        self.vm.set_user_memory_region(3, ARENA_GPA, self.size, self.host)
        self.view = mmap.mmap(self.file, self.size)
        order = list(range(pages))
        self.random.shuffle(order)
        self.page = {(name, n): order.pop() for name in AREAS for n in (0, 1)}
        self.table = {name: order.pop() for name in AREAS}
        self.top = [order.pop() for _ in range(3)]
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_cpuid2(self.kvm.get_supported_cpuid())
        self.templates = templates(LONG)
        self.state = self.vcpu.get_sregs()
        self.refused: list[int] = []

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.kvm.close()
        self.view.close()
        libc.munmap(self.host, self.size)
        os.close(self.file)
        os.close(self.short)

    def at(self, name: str) -> int:
        """Linear address of an area."""
        return VA[name]

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Write into an area, over its page boundary if need be."""
        while data:
            page, within = divmod(offset, PAGE)
            piece = data[: PAGE - within]
            start = self.page[name, page] * PAGE + within
            self.view[start : start + len(piece)] = piece
            offset, data = offset + len(piece), data[len(piece) :]

    def fill(self) -> None:
        """Pages full of pointers to a HLT, the tables, and the descriptor tables."""
        self.view[:] = self.at("halt").to_bytes(8, "little") * (self.size // 8)
        self.put("halt", 0, b"\xf4" * 2 * PAGE)
        gates = b""
        for vector in range(256):
            where = self.at("halt")
            ist = 1 if vector % 3 == 0 else 0
            low = where & 0xFFFF | KERNEL_CS << 16 | ist << 32 | 0xEE << 40 | (where >> 16 & 0xFFFF) << 48
            gates += struct.pack("<QQ", low, where >> 32)
        self.put("idt", PAGE - 128, gates[: PAGE + 128])
        user = (0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
        self.put(
            "gdt",
            PAGE - 16,
            struct.pack("<7Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, *user, 0x0000890060000067, 0),
        )
        inner = self.at("inner") + PAGE + 24
        tss = struct.pack("<IQQQ8xQ", 0, inner, inner, inner, inner).ljust(0x68, b"\0")
        self.put("tss", PAGE - 8, tss)
        gpa = [ARENA_GPA + page * PAGE for page in self.top]
        self._quad(self.top[0], 0, gpa[1] | 7)
        self._quad(self.top[1], 1, gpa[2] | 7)
        for name in AREAS:
            self._quad(self.top[2], AREAS.index(name), (ARENA_GPA + self.table[name] * PAGE) | 7)
            for n in (0, 1):
                self._quad(self.table[name], n, (ARENA_GPA + self.page[name, n] * PAGE) | 7)

    def _quad(self, page: int, index: int, value: int) -> None:
        self.view[page * PAGE + index * 8 : page * PAGE + index * 8 + 8] = value.to_bytes(8, "little")

    def sregs(self, cpl: int) -> kvm_sregs:
        """The mode, in a ring."""
        sregs = kvm_sregs.from_buffer_copy(self.state)
        sregs.cs = segment(USER_CS if cpl else KERNEL_CS, 11, cpl, long=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, segment(USER_DS if cpl else KERNEL_DS, 3, cpl))
        sregs.fs.base = 0x20
        sregs.gs.base = 0x1000
        sregs.tr = kvm_segment(base=self.at("tss") + PAGE - 8, limit=0x67, selector=TSS_SEL, type=11, present=1)
        sregs.gdt.base, sregs.gdt.limit = self.at("gdt") + PAGE - 16, 0x37
        sregs.idt.base, sregs.idt.limit = self.at("idt") + PAGE - 128, 0xFFF
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, ARENA_GPA + self.top[0] * PAGE, 0x620, 0xD01
        return sregs

    def offset(self) -> int:
        """Where in an area an operand is: anywhere, or at the boundary of its pages."""
        roll = self.random.random()
        if roll < 0.4:
            return PAGE - self.random.randrange(0, 20)
        if roll < 0.7:
            return self.random.randrange(0, PAGE, 16)
        return self.random.randrange(64, PAGE)

    def refuse(self, page: int, how: str) -> None:
        """Let the host refuse a page of the arena."""
        at = self.host + page * PAGE
        if how == "unmapped":
            libc.munmap(at, PAGE)
        elif how == "beyond":
            libc.mmap(at, PAGE, 3, libc.MAP_SHARED | libc.MAP_FIXED, self.short)
        else:
            libc.mprotect(at, PAGE, 1 if how == "read-only" else 0)
        self.refused.append(page)

    def restore(self) -> None:
        """Give every page back."""
        for page in self.refused:
            libc.mmap(self.host + page * PAGE, PAGE, 3, libc.MAP_SHARED | libc.MAP_FIXED, self.file, page * PAGE)
        self.refused.clear()

    def prepare(self) -> str:
        """Make a case: an instruction, its operands, and what the host refuses."""
        r = self.random
        source, code = r.choice(self.templates)
        self.fill()
        cpl = 3 if r.random() < 0.25 else 0
        mnemonic = source.split()[0]
        if cpl and mnemonic in ("lgdt", "lidt", "invlpg", "hlt", "pause;"):
            cpl = 0
        at = self.offset() if r.random() < 0.3 else 256
        at = min(at, 2 * PAGE - 32)
        self.put("code", at, code + b"\xf4")
        align = 16 if mnemonic in ("movaps", "fxsave", "fxrstor", "addps", "paddd", "movntdq") or "16b" in source else 1
        if r.random() < 0.3:
            align = 16
        regs = kvm_regs(rip=self.at("code") + at, rflags=2 | (0x400 if r.random() < 0.2 else 0))
        for register, area in (("rsi", "source"), ("rdi", "target"), ("rsp", "stack"), ("rbx", "base")):
            setattr(regs, register, self.at(area) + self.offset() // align * align)
        regs.rbp = self.at("stack") + self.offset()
        regs.rcx = r.choice((0, 1, 2, 5)) if "rep" in source else r.randrange(0, 8)
        regs.rax = r.choice((0, 1, 77, 200, -9)) & (1 << 64) - 1
        regs.rdx = KERNEL_DS if "%dx" in source or "%edx, %fs" in source else self.at("halt") + self.offset()
        if "xlat" in source:
            regs.rax = 5
        if "cr3" in source:
            regs.rax = ARENA_GPA + self.top[0] * PAGE
        regs.r14 = 0x7000000000
        self.vcpu.set_sregs(self.sregs(cpl))
        self.vcpu.set_regs(regs)
        self.vcpu.set_vcpu_events(kvm_vcpu_events())
        return source

    def choose(self) -> None:
        """Refuse some pages."""
        r = self.random
        candidates = list(self.page.values())
        if r.random() < 0.1:
            table = r.choice([*self.table.values(), *self.top])
            self.refuse(table, r.choice(REFUSALS))
            if r.random() < 0.7:
                return
        for page in r.sample(candidates, r.choice((2, 4, 7))):
            if page not in self.refused:
                self.refuse(page, r.choice(REFUSALS))

    def once(self, result: Result) -> None:
        """Run one case and compare."""
        source = self.prepare()
        self.choose()
        try:
            self.vcpu.run()
        except OSError as error:
            if error.errno == errno.EFAULT:
                self._compare(source, getattr(error, "cause", None), result)
                return
            raise
        finally:
            self.restore()
        result.skipped += 1

    def truth(self) -> native.Exit:
        """What the engine met."""
        return native.Vcpu.from_address(int(FILES.get(self.vcpu.fileno()))).exit  # type: ignore[call-overload]

    def _compare(self, source: str, cause: Cause | None, result: Result) -> None:
        truth = self.truth()
        result.faults += 1
        result.sources[source] += 1
        wanted = (truth.gpa & -PAGE, KINDS[truth.access])
        if cause is None:
            result.wrong.append(f"{source}: {wanted}: nothing found")
            return
        result.roles[cause.role] += 1
        found = [(suspect.page, suspect.access) for suspect in cause.candidates]
        if cause.ambiguous:
            result.ambiguous += 1
        if (wanted not in found) if cause.ambiguous else (wanted != found[0]):
            regs = self.vcpu.get_regs()
            result.wrong.append(
                f"{source}: truth {wanted[0]:#x} {wanted[1].value} hva {truth.hva:#x}, found {cause.reason} "
                f"[{cause.instruction}] rip {regs.rip:#x} rsp {regs.rsp:#x} rsi {regs.rsi:#x} rdi {regs.rdi:#x}"
            )


def run(count: int, seed: int) -> Result:
    """Make ``count`` faults."""
    result = Result()
    with Bed(seed) as bed:
        while result.faults < count:
            bed.once(result)
    return result


if __name__ == "__main__":
    outcome = run(int(sys.argv[1]), seed=1)
    print(outcome, *outcome.wrong[:20], sep="\n")
    sys.exit(bool(outcome.wrong))
