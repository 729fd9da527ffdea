"""Guest code of the scenarios: 64-bit machine code beside the assembly it comes from.

Most pieces do one thing at (rdi) and then report on port 0x10; a fault is seen as a KVM_RUN that did not get there.
"""

from __future__ import annotations

from typing import Final

_REPORT: Final = bytes.fromhex("e610 f4")  # out 0x10, al; hlt

READ8: Final = bytes.fromhex("48 8b 07") + _REPORT  # mov rax, [rdi]
READ1: Final = bytes.fromhex("0f b6 07") + _REPORT  # movzx eax, byte [rdi]
WRITE8: Final = bytes.fromhex("48 89 1f") + _REPORT  # mov [rdi], rbx
READ_WRITE_READ: Final = bytes.fromhex(
    "48 8b 07 e6 10"  # mov rax, [rdi]; out 0x10, al
    "48 89 1f e6 11"  # mov [rdi], rbx; out 0x11, al
    "48 8b 07 e6 12 f4"  # mov rax, [rdi]; out 0x12, al; hlt
)
JUMP: Final = bytes.fromhex("ff e7")  # jmp rdi
TARGET: Final = bytes.fromhex("e6 12 f4")  # out 0x12, al; hlt: what JUMP is to find
LOCK_CMPXCHG: Final = bytes.fromhex("f0 48 0f b1 1f") + _REPORT  # lock cmpxchg [rdi], rbx
LOCK_ADD: Final = bytes.fromhex("f0 48 83 07 01") + _REPORT  # lock add qword [rdi], 1
REP_INSB: Final = bytes.fromhex("ba 20 00 00 00 f3 6c") + _REPORT  # mov edx, 0x20; rep insb
REP_OUTSB: Final = bytes.fromhex("ba 20 00 00 00 f3 6e") + _REPORT  # mov edx, 0x20; rep outsb
REP_MOVSB: Final = bytes.fromhex("f3 a4") + _REPORT  # rep movsb
MOVSQ: Final = bytes.fromhex("48 a5") + _REPORT  # movsq
REP_STOSB: Final = bytes.fromhex("f3 aa") + _REPORT  # rep stosb
PUSH: Final = bytes.fromhex("48 89 fc 53") + _REPORT  # mov rsp, rdi; push rbx
PUSH_MEMORY: Final = bytes.fromhex("48 89 fc ff 36") + _REPORT  # mov rsp, rdi; push qword [rsi]
INT3: Final = bytes.fromhex("cc") + _REPORT  # int3
INT3_ON_STACK: Final = bytes.fromhex("48 89 fc cc") + _REPORT  # mov rsp, rdi; int3
LOAD_DS: Final = bytes.fromhex("b8 10 00 00 00 8e d8") + _REPORT  # mov eax, 0x10; mov ds, eax
SPIN: Final = bytes.fromhex("eb fe")  # jmp .
IN: Final = bytes.fromhex("e4 21") + _REPORT  # in al, 0x21
OUT_OUT: Final = bytes.fromhex("e6 31 e6 32 f4")  # out 0x31, al; out 0x32, al; hlt
MOVDQU: Final = bytes.fromhex("f3 0f 7f 07") + _REPORT  # movdqu [rdi], xmm0
FXSAVE: Final = bytes.fromhex("0f ae 07") + _REPORT  # fxsave [rdi]
CLFLUSH: Final = bytes.fromhex("0f ae 3f") + _REPORT  # clflush [rdi]
WRMSR: Final = (
    bytes.fromhex("48 89 f8 48 89 fa 48 c1 ea 20 0f 30") + _REPORT  # mov rax, rdi; mov rdx, rdi; shr rdx, 32; wrmsr
)
LOAD_CR3: Final = bytes.fromhex("0f 22 df") + _REPORT  # mov cr3, rdi
HALT: Final = bytes.fromhex("f4 e6 10")  # hlt; out 0x10, al
UD2: Final = bytes.fromhex("0f 0b")  # ud2
LGDT: Final = bytes.fromhex("0f 01 17") + _REPORT  # lgdt [rdi]
INVLPG_READ: Final = bytes.fromhex("0f 01 3f 48 8b 07") + _REPORT  # invlpg [rdi]; mov rax, [rdi]
