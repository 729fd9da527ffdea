"""The instruction fuzzer: every instruction form with operands at their boundaries, in every mode and ring. Whatever it
does to its guest, the process lives, the instruction ends, and no memory changes but the guest's.

``forms``     a case by its number: the mode, and the bytes of code
``modes``     what each mode needs of descriptors, page tables and special registers
``operands``  what registers hold
``bed``       one vCPU that executes cases, and tells what they have broken
``campaign``  children that work through cases; who dies, hangs or reports is a finding

``python -m instruction_fuzz --help``
"""
