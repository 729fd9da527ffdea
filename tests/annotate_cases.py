"""The instructions of the annotate layer's test bed, by the bits of the code; AT&T syntax, bars between them."""

from __future__ import annotations

import re

from anykvm.testing.assembler import assemble

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
mov %rax, %cr3 | hlt | pause; mov (%rsi), %eax | ltr %dx | lldt %dx | lsl %dx, %eax | verr %dx | str (%rbx)
mov (%rsi), %fs | pop %gs | lgs (%rsi), %eax | lss 1(%rsi), %eax | ljmp *(%rsi) | lcall *(%rsi) | ljmpl *2(%rsi)
lretl | lretw | lretq $8 | iretl | xorps (%rsi), %xmm1 | movhlps %xmm0, %xmm1 | pshufd $1, (%rsi), %xmm2
maskmovdqu %xmm1, %xmm2 | addsd (%rsi), %xmm1 | cvtps2pd (%rsi), %xmm3 | movd (%rsi), %xmm1 | movd %xmm1, (%rdi)
lock orb $1, (%rdi) | lock subq $1, (%rbx) | lock xorw %ax, (%rdi) | lock btcl $3, (%rdi) | lock decl (%rdi)
sgdt (%rbx) | outsb | insb
"""
# With ESI, EDI, EBX and the rest as in 32-bit code; 16-bit code has the same with SI, DI, BX.
LEGACY = """
mov (%esi), %al | mov (%esi), %ax | mov (%esi), %eax | mov %al, (%edi) | mov %eax, (%edi) | movl $7, 3(%edi)
movw $7, (%ebx) | mov %fs:(%esi), %eax | mov %eax, %gs:8(%edi) | mov %es:(%ebx), %cx | mov %ss:(%esi), %eax
mov (%ebp), %eax | mov %eax, 4(%ebp)
add %eax, (%ebx) | add (%esi), %eax | incl (%edi) | notl (%edi) | negw (%ebx) | lock incl (%edi) | lock addl $3, (%ebx)
lock notw (%edi) | lock negl (%edi) | xchg %eax, (%esi) | xchg %al, (%edi) | xadd %eax, (%edi) | lock xadd %eax, (%edi)
cmpxchg %ecx, (%edi) | lock cmpxchg %ecx, (%edi) | cmpxchg8b (%edi) | lock cmpxchg8b (%edi) | push %eax | pushw %ax
pushl $5 | pushw $5 | pushfl | pushfw | push %fs | push %ds | pushl (%esi) | pushw (%esi) | pop %eax | popw %ax
popl (%edi) | popw (%edi) | popfl | popfw | pushal | pushaw | popal | popaw | call *%edx | calll *(%esi) | callw *(%esi)
jmp *(%esi) | jmp *%edx | ret | retl | retw | ret $16 | leave | leavew | enter $32, $0 | enter $16, $3 | enterw $8, $2
movsb | movsw | movsl | rep movsb | rep movsl | stosb | stosl | rep stosl | lodsb | lodsl | rep lodsw | scasb
repne scasw | cmpsb | cmpsl | repe cmpsw | xlat | fs movsb | movups (%esi), %xmm0 | movaps (%esi), %xmm1
movups %xmm0, (%edi) | movaps %xmm0, (%edi) | movq %xmm0, (%edi) | movsd (%esi), %xmm2 | movss %xmm2, (%edi)
addps (%esi), %xmm0 | paddd (%esi), %xmm3 | MOVNTI | fxsave (%edi) | fxrstor (%esi) | fldt (%esi) | fldl (%esi)
flds (%esi) | fstpt (%edi) | fstpl (%edi) | fstps (%edi) | fildq (%esi) | fistpl (%edi) | fistpll (%edi) | fldcw (%esi)
fnstcw (%edi) | fnstsw (%edi) | fnstenv (%edi) | fldenv (%esi) | fnsave (%edi) | frstor (%esi) | fbld (%esi)
fbstp (%edi) | faddl (%esi) | fiaddl (%esi) | stmxcsr (%edi) | ldmxcsr (%esi) | lgdtl (%esi) | lidtl (%esi)
sgdtl (%edi) | sidtl (%edi) | sldt (%edi) | str (%edi) | smsw (%edi) | bt %eax, (%esi) | bts %eax, (%edi)
btrl %ecx, (%edi) | btcw $3, (%edi) | lock bts %eax, (%edi) | bt $20, (%esi) | bts %ax, (%edi) | movzbl (%esi), %eax
movswl (%esi), %ecx | cmp (%esi), %eax | cmpb $1, (%esi) | test %eax, (%esi) | cmovne (%esi), %eax | sete (%edi)
imul (%esi), %eax | mull (%esi) | bsf (%esi), %eax | popcnt (%esi), %eax | shll %cl, (%edi) | rolb $1, (%edi)
shld $4, %eax, (%edi) | lea (%esi), %eax | nopw (%esi) | prefetcht0 (%esi) | clflush (%esi) | invlpg (%esi)
lss (%esi), %eax | lfs (%esi), %eax | lds (%esi), %eax | les (%esi), %eax | lgs 1(%esi), %ax | lar %dx, %eax
lsl %dx, %eax | verr %dx | ltr %dx | lldt %dx | mov %edx, %fs | mov %edx, %es | mov (%esi), %gs | pop %fs | popw %es
int $0x40 | int3 | ud2 | into | div %ecx | boundl %eax, (%esi) | boundw %ax, (%esi) | ljmp *(%esi) | ljmpw *(%esi)
lcall *(%esi) | lcallw *(%esi) | lret | lretw | lretl $8 | iretl | iretw | adc %cl, (%ebx) | sbb (%ebx), %dl
movdqu (%esi), %xmm4 | movntdq %xmm0, (%edi) | movlps (%esi), %xmm0 | movhps %xmm0, (%edi) | movbe (%esi), %eax
mov %ds, (%edi) | mov (%esi), %ds | aam | hlt | movd (%esi), %xmm1 | maskmovdqu %xmm1, %xmm2 | arpl %ax, (%edi)
addr16 mov (%si), %eax | addr16 stosb | outsb | insb | ljmp *%fs:(%esi)
"""
_SIXTEEN = re.compile(r"\((?:%e)(si|di|bx|bp)\)")


def _sources(bits: int) -> list[str]:
    text = LONG if bits == 64 else LEGACY
    sources = [source.strip() for line in text.strip().splitlines() for source in line.split("|")]
    if bits == 16:
        sources = [_sixteen(source) for source in sources]
    return [source.replace("MOVNTI", f"movnti %eax, (%{'di' if bits == 16 else 'edi'})") for source in sources]


def _sixteen(source: str) -> str:
    """Make it of 16-bit code."""
    if source.startswith("addr16"):
        return source.replace("addr16 mov (%si)", "addr32 mov (%esi)").replace("addr16", "addr32")
    return _SIXTEEN.sub(r"(%\1)", source).replace("*%edx", "*%dx")


def templates(bits: int) -> list[tuple[str, bytes]]:
    """Assemble each instruction, with its text; one call of the assembler for all."""
    sources = _sources(bits)
    slot = 32
    program = "\n".join(f".balign {slot}\n{source}\n" + "1: .byte 0x0f,0x0b,0xde,0xad" for source in sources)
    code = assemble(program, 0x40000000 if bits > 16 else 0, bits)
    found = []
    for index, source in enumerate(sources):
        piece = code[index * slot : (index + 1) * slot]
        found.append((source, piece[: piece.index(b"\x0f\x0b\xde\xad")]))
    return found
