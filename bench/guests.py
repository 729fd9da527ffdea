"""Guest code of the benchmarks, as bytes; the assembler text is beside each."""

from __future__ import annotations

#: 1: out %al, $0xe9; jmp 1b
OUT_LOOP = bytes.fromhex("e6e9ebfc")

#: 1: movb $1, (%rdi); add $0x1000, %rdi; dec %rcx; jnz 1b; hlt   (rdi: first page, rcx: pages)
TOUCH = bytes.fromhex("c607014881c70010000048ffc975f1f4")

#: Mixed work, rcx rounds: a 4 KiB table at rsi is filled, xor-shifted, summed and copied; result in rax.
#:   1: mov $512, %edx; mov %rsi, %rdi; mov %rcx, %rax
#:   2: imul $0x4c957f2d, %rax, %rax; mov %rax, (%rdi); add $8, %rdi; dec %edx; jnz 2b
#:   mov $511, %edx
#:   3: mov (%rsi,%rdx,8), %rbx; mov %rbx, %rbp; shr $13, %rbp; xor %rbp, %rbx; add %rbx, %rax
#:      mov %rbx, 4096(%rsi,%rdx,8); dec %edx; jns 3b
#:   dec %rcx; jnz 1b; hlt
MIX = bytes.fromhex(
    "ba000200004889f74889c84869c02d7f954c4889074883c708ffca75eebaff010000488b1cd64889dd48c1ed0d4831eb4801"
    "d848899cd600100000ffca79e348ffc975bcf4"
)
#: Instructions of one round of MIX.
MIX_INSTRUCTIONS = 3 + 512 * 5 + 1 + 512 * 8 + 2
