"""The guests' program. Each round: choose an area, a page, one of its addresses and an operation; note on the board
what is about to be accessed; access it; judge the value. Judging needs no exit.

Registers: %r15 the vCPU's note, %r14 the generator's state, %r13 the writer's number; in a round %rbx the area's
descriptor, %rdi the page's linear address, %ebp its number on the board, %r8d its state (if the area follows it), %r9d
its loss count, %r12d more random bits; of the channel accessed %r10 its address on the board, %rdx and %r11d its floor
and purged number, read before the access.
"""

from __future__ import annotations

from anykvm.testing.assembler import assemble
from stress import board as b

PORT_WRONG = 0x21
FUTURE, PAST, LOST, HIDDEN = 1, 2, 3, 4
WHY = {
    FUTURE: "was never written",
    PAST: "was thrown away before",
    LOST: "is older than what was there before",
    HIDDEN: "is of memory that the attribute forbids to access in this way",
}

_MACROS = f"""
.macro channel page, number         # of a page: its address in r10, what the board says of it
    mov \\page, %r10d
    shl $8, %r10d
    add ${b.CHANNELS:#x} + (\\number) * {b.CHANNEL_SIZE}, %r10d
    known
.endm
.macro known
    mov 8(%r10), %rdx
    mov 4(%r10), %r11d
.endm
.macro of_somebody first            # a channel of a random writer: its number in ecx
    mov %r12d, %ecx
    shr $4, %ecx
    and $3, %ecx
    movzbl who(%rcx), %ecx
    channel_ecx \\first
.endm
.macro channel_ecx first
    lea (\\first)(%rcx), %r10d
    shl $4, %r10d
    mov %ebp, %eax
    shl $8, %eax
    lea {b.CHANNELS:#x}(%r10, %rax), %r10d
    shl $4, %ecx                    # and 16 times the writer
    known
.endm
.macro own first
    mov %r13d, %ecx
    channel_ecx \\first
    push %rcx
    call intend
    pop %rax                        # 16 times the writer; the number is in ecx, and in esi
    mov %ecx, %esi
.endm
"""

_ROUND = f"""
again:
    cmpl $0, {b.STOP:#x}
    jne done
    imul $1103515245, %r14, %r14
    add $12345, %r14
    mov %r14, %rax
    shr $33, %rax
    mov %eax, %ecx
    and $31, %ecx
    movzbl {b.PICK:#x}(%rcx), %ecx
    mov %ecx, %ebx
    imul ${b.DESCRIPTOR_SIZE}, %ebx, %ebx
    add ${b.DESCRIPTORS:#x}, %ebx
    mov %eax, %edx
    shr $5, %edx
    and ${b.PAGES - 1}, %edx
    mov %eax, %esi
    shr $9, %esi
    and ${b.ADDRESSES - 1}, %esi
    mov {b.FIRST_PAGE}(%rbx), %ebp
    add %edx, %ebp
    mov (%rbx, %rsi, 8), %rdi
    shl $12, %edx
    add %rdx, %rdi
    lea (%rsi, %rcx, {b.ADDRESSES}), %ecx
    mov %ecx, {b.NOTE_ADDRESS}(%r15)
    mov {b.SLOT:#x}(, %rcx, 4), %ecx
    mov %ecx, {b.NOTE_SLOT}(%r15)
    test ${b.CHANGING}, %ecx
    jnz rarely                      # no slot, probably: an exit
has_slot:
    mov %ebp, {b.NOTE_PAGE}(%r15)
    mov {b.STATE:#x}(, %rbp, 4), %rcx       # of two pages
    mov %rcx, {b.NOTE_STATE}(%r15)
    mov %ecx, {b.NOTE_BEGAN}(%r15)
    mov %ecx, %r8d
    xor {b.WANTS}(%rbx), %ecx
    and ${b.PRIVATE}, %ecx
    jnz rarely_private              # an exit, and a conversion
is_right:
    and {b.FOLLOW}(%rbx), %r8d
    test ${b.CHANGING}, %r8d
    jnz again
    test ${b.PRIVATE}, %r8d
    jz 1f
    add {b.TWIN}(%rbx), %ebp
1:  mov {b.REACH:#x}(, %rbp, 4), %rcx
    mov %rcx, {b.NOTE_REACH}(%r15)
    movl $0, {b.NOTE_VOID}(%r15)
    mov {b.LOSS:#x}(, %rbp, 4), %r9d
    shr $11, %eax
    mov %eax, %r12d
    and $15, %eax
    jmp *{b.OPERATIONS}(%rbx, %rax, 8)
done:
    hlt
    jmp again
rarely:
    test $0x38000, %eax
    jnz again
    jmp has_slot
rarely_private:
    testl ${b.PRIVATE}, {b.FOLLOW}(%rbx)
    jnz is_right
    test $0x1c0000, %eax
    jnz again
    jmp is_right
who: .byte 1, 2, 3, 1
owners: .byte {", ".join(str(b.owner(page)) for page in range(b.PAGES))}
"""

#: eax: the value read from the channel in r10. Keeps esi, not r12.
_JUDGE = f"""
judge:
    cmpl $0, {b.NOTE_VOID}(%r15)
    jne 9f
    mov {b.NOTE_PAGE}(%r15), %ecx
    mov {b.STATE:#x}(, %rcx, 4), %ecx
    cmp {b.NOTE_BEGAN}(%r15), %ecx
    jne 1f                          # it was changed meanwhile
    mov %ecx, %r12d
    xor {b.WANTS}(%rbx), %r12d
    and ${b.CHANGING | b.PRIVATE}, %r12d
    cmp ${b.PRIVATE}, %r12d
    jne 1f
    testl ${b.PRIVATE}, {b.FOLLOW}(%rbx)
    jnz 1f
    mov ${HIDDEN}, %ecx
    jmp wrong
1:  and {b.FOLLOW}(%rbx), %ecx
    cmp %ecx, %r8d
    jne 9f                          # of which memory it was is not known
    mov ${FUTURE}, %ecx
    cmp (%r10), %eax
    ja wrong
    test %eax, %eax
    jz 1f
    mov ${PAST}, %ecx
    cmp %r11d, %eax
    jbe wrong
1:  cmp %r9d, {b.LOSS:#x}(, %rbp, 4)
    jne 2f
    cmp %edx, %r9d
    jne 2f
    mov %rdx, %rcx
    shr $32, %rcx
    cmp %ecx, %eax
    mov ${LOST}, %ecx
    jb wrong
2:  incq {b.NOTE_CHECKED}(%r15)
9:  ret
wrong:
    mov $PORT_WRONG, %edx
    out %eax, %dx
    hlt
intend:                             # the next number of the channel in r10, in ecx; of its twin's too
    mov {b.TWIN}(%rbx), %eax
    and {b.FOLLOW}(%rbx), %eax
    shl $8, %eax
    test ${b.PRIVATE}, %r8d
    jz 1f
    neg %eax
1:  cltq
    mov (%r10), %ecx
    cmp %ecx, (%r10, %rax)
    jbe 2f
    mov (%r10, %rax), %ecx
2:  inc %ecx
    mov %ecx, (%r10)
    mov %ecx, (%r10, %rax)
    ret
publish:                            # esi is in the channel
    cmpl $0, {b.NOTE_VOID}(%r15)
    jne 9f
    mov {b.NOTE_PAGE}(%r15), %ecx
    mov {b.STATE:#x}(, %rcx, 4), %ecx
    and {b.FOLLOW}(%rbx), %ecx
    cmp %ecx, %r8d
    jne 9f
    test ${b.CHANGING}, %r9d
    jnz 9f
    mov %rsi, %rcx
    shl $32, %rcx
    or %r9, %rcx
    mov %rcx, 8(%r10)
    incq {b.NOTE_WRITTEN}(%r15)
9:  ret
""".replace("PORT_WRONG", str(PORT_WRONG))

#: Label: code. All begin as described above and end at `again`.
_OPERATIONS = {
    "read_vmm": f"channel %ebp, {b.VMM}; mov {b.AT_VMM}(%rdi), %eax; call judge",
    "read_aligned": f"of_somebody {b.ALIGNED}; mov {b.AT_ALIGNED}(%rdi, %rcx), %eax; call judge",
    "read_unaligned": f"of_somebody {b.UNALIGNED}; mov {b.AT_UNALIGNED}(%rdi, %rcx), %eax; call judge",
    "write_aligned": f"own {b.ALIGNED}; mov %ecx, {b.AT_ALIGNED}(%rdi, %rax); call publish",
    "write_unaligned": f"own {b.UNALIGNED}; mov %ecx, {b.AT_UNALIGNED}(%rdi, %rax); call publish",
    "exchange": f"own {b.ALIGNED}; xchg %ecx, {b.AT_ALIGNED}(%rdi, %rax); mov %ecx, %eax; call judge; call publish",
    # locked, and no host can do it in one: the whole VM waits
    "exchange_unaligned": f"""own {b.UNALIGNED}
        xchg %ecx, {b.AT_UNALIGNED}(%rdi, %rax); mov %ecx, %eax; call judge; call publish""",
    "compare_exchange": f"""own {b.ALIGNED}
        lea {b.AT_ALIGNED}(%rdi, %rax), %rdi
        lea -1(%rcx), %eax
        lock cmpxchg %ecx, (%rdi)
        je 1f
        call judge                  # it was another one, and nothing was written
        jmp again
    1:  call publish""",
    # code that the VMM changes, after a serializing instruction
    "fetch": f"""mov %ebp, %ecx; and $15, %ecx
        bt %ecx, {b.CALLED:#x}; jnc again
        channel %ebp, {b.VMM}
        push %rbx; push %rdx
        xor %eax, %eax; cpuid
        pop %rdx; pop %rbx
        lea {b.AT_VMM - 1}(%rdi), %rcx
        call *%rcx
        call judge""",
    # over the boundary to the next page: r12 the first page's count, esi the number
    "write_across": f"""mov %ebp, %ecx; and $15, %ecx
        movzbl owners(%rcx), %eax
        cmp %eax, %r13d; jne again
        mov %r12d, %eax
        mov %r9d, %r12d; shl $32, %r12
        mov {b.LOSS:#x} + 4(, %rbp, 4), %r9d
        or %r9, %r12                # both pages' loss counts
        channel %ebp, {b.TAIL}
        mov (%r10), %esi; inc %esi
        mov %esi, (%r10)
        mov %esi, {(b.PAGE_CHANNELS + b.HEAD - b.TAIL) * b.CHANNEL_SIZE}(%r10)
        mov %eax, %edx
        mov %esi, %eax
        test $1, %ebp; jnz 2f
        lea {b.PAGE - 4 * b.STRIP}(%rdi), %rdi
        test $16, %edx; jnz 1f
        mov ${2 * b.STRIP}, %ecx; rep stosl
        jmp 3f
    1:  push %rsi; push %rdi
        lea {b.NOTE_SCRATCH}(%r15), %rdi
        mov ${2 * b.STRIP}, %ecx; rep stosl
        pop %rdi
        lea {b.NOTE_SCRATCH}(%r15), %rsi
        mov ${b.STRIP}, %ecx; rep movsq
        pop %rsi
        jmp 3f
    2:  mov %rax, %rcx; shl $32, %rcx; or %rcx, %rax
        mov %rax, {b.PAGE - 4}(%rdi)
    3:  mov %r12, %r9; shr $32, %r9
        call publish
        add ${(b.PAGE_CHANNELS + b.HEAD - b.TAIL) * b.CHANNEL_SIZE}, %r10d
        mov %r12d, %r9d
        call publish""",
    "read_across": f"""mov %ebp, %ecx; and $15, %ecx
        cmp $15, %ecx; je again
        channel %ebp, {b.TAIL} + {b.PAGE_CHANNELS} + {b.HEAD - b.TAIL}
        push %rdx; push %r11        # what is known of the second page's
        mov {b.LOSS:#x} + 4(, %rbp, 4), %ecx; push %rcx
        channel %ebp, {b.TAIL}
        test $1, %ebp; jnz 2f
        push %rdi
        lea {b.PAGE - 4 * b.STRIP}(%rdi), %rsi
        lea {b.NOTE_SCRATCH}(%r15), %rdi
        mov ${2 * b.STRIP}, %ecx
        rep movsl
        pop %rdi
        shr $5, %r12d; mov %r12d, %ecx
        and ${b.STRIP - 1}, %ecx
        mov {b.NOTE_SCRATCH}(%r15, %rcx, 4), %eax
        shr $4, %r12d; and ${b.STRIP - 1}, %r12d
        mov {b.NOTE_SCRATCH + 4 * b.STRIP}(%r15, %r12, 4), %esi
        jmp 3f
    2:  mov {b.PAGE - 4}(%rdi), %rax
        mov %rax, %rsi; shr $32, %rsi
    3:  call judge
        pop %r9; pop %r11; pop %rdx
        mov %esi, %eax
        add ${(b.PAGE_CHANNELS + b.HEAD - b.TAIL) * b.CHANNEL_SIZE}, %r10d
        inc %ebp
        call judge""",
}

COUNTERS = {
    "count": 0x200,
    "count_own": 0x240,
    "count_over_line": 0x2BC,
    "count_over_page": 0xFFC,
    "count_locked": 0x308,
}
"""Where a page's counters are (``count_own``: 8 bytes a writer); their tallies are in this order."""
_SPINLOCK = 0x300
"""Who exchanges 1 for 0 may increment the last of them."""


def _count(kind: int, lock: str, at: str) -> str:
    return f"""{lock} incq {at}
        mov %ebp, %ecx; and $15, %ecx
        shl $6, %ecx
        incq {b.NOTE_TALLY + 8 * kind}(%r15, %rcx)"""


_OPERATIONS |= {
    "count": _count(0, "lock", f"{COUNTERS['count']}(%rdi)"),
    "count_own": _count(1, "", f"{COUNTERS['count_own']}(%rdi, %r13, 8)"),
    "count_over_line": _count(2, "lock", f"{COUNTERS['count_over_line']}(%rdi)"),
    "count_over_page": "mov %ebp, %ecx; and $15, %ecx; cmp $15, %ecx; je again;"
    + _count(3, "lock", f"{COUNTERS['count_over_page']}(%rdi)"),
    "count_locked": f"""mov $1, %eax
    1:  xchg %eax, {_SPINLOCK}(%rdi)
        test %eax, %eax; jnz 1b
        {_count(4, "", f"{COUNTERS['count_locked']}(%rdi)")}
        movl $0, {_SPINLOCK}(%rdi)""",
}

#: In the pages: mov $number, %eax; ret, with the number where the VMM's channel is.
FUNCTION = (b.AT_VMM - 1, b"\xb8", b.AT_VMM + 4, b"\xc3")


def program() -> tuple[bytes, dict[str, int]]:
    """The program, to be put at CODE, where it begins; and the addresses of the operations."""
    bodies = "".join(f".balign 16\n{name}:\n{code}\njmp again\n" for name, code in _OPERATIONS.items())
    addresses = "".join(f".quad {name}\n" for name in _OPERATIONS)
    source = f"{_MACROS}{_ROUND}{_JUDGE}{bodies}\n.balign 8\n{addresses}"
    image = assemble(source)
    table = image[-8 * len(_OPERATIONS) :]
    at = [int.from_bytes(table[8 * n : 8 * n + 8], "little") for n in range(len(_OPERATIONS))]
    assert len(image) <= 0x2000, "the program overlaps the machine's tables"
    return image, dict(zip(_OPERATIONS, at, strict=True))
