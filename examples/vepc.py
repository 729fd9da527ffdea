#!/usr/bin/env python3
"""An SGX guest's page cache runs out, KVM_RUN fails with EFAULT, and the VMM gives the machine more.

A page fault that KVM cannot resolve, and that few can try: on virtual EPC, when the host has no page left to back it.
That needs SGX hardware under memory pressure; here the EPC is anykvm's, which only the soft backend knows. The guest
stores to one page after the other of 16 pages of EPC; the machine has 6. Each time it runs out, KVM_RUN fails with
EFAULT. With profile "documented" the exit names the page; with "linux-7.3", whose x86 code returns a bare -EFAULT here,
the VMM has only the registers to go by. Either way it adds pages and runs the vCPU again, which stands at the same
instruction.

    python examples/vepc.py [BACKEND [PROFILE]]
"""

from __future__ import annotations

import errno

import anykvm
from anykvm.backends.soft import SgxVepc
from start import Missing, start

PAGE = anykvm.PAGE_SIZE
EPC, PAGES = 0x100000, 16  # guest-physical address of the EPC, and how much of it the guest sees
GUEST = bytes.fromhex(
    "66 bf 00001000"  # mov edi, 0x100000
    "66 b9 10000000"  # mov ecx, 16
    "67 66 89 0f"  # next: mov [edi], ecx
    "66 81 c7 00100000"  # add edi, 4096
    "66 49 75 f1"  # dec ecx; jnz next
    "f4"  # hlt
)


def main(kvm: anykvm.Kvm) -> None:
    """Run the guest to its end."""
    if kvm.backend.name != "soft":
        raise Missing("an EPC that can be made to run out; a real one is /dev/sgx_vepc, and needs SGX hardware")
    epc = SgxVepc(pages=6)
    with kvm.create_vm() as vm, anykvm.GuestMemory(PAGE) as memory:
        memory[0 : len(GUEST)] = GUEST
        vm.map(memory, guest_phys_addr=0)
        vepc = epc.map(PAGES * PAGE)  # as mmap of /dev/sgx_vepc
        vm.map(vepc, guest_phys_addr=EPC)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(rip=0)
        sregs = vcpu.get_sregs()
        sregs.ds.limit = 0xFFFFFFFF  # "unreal" mode: 32-bit addresses, to reach beyond 1 MiB
        vcpu.set_sregs(sregs)
        while True:
            try:
                exit = vcpu.run()
            except OSError as error:  # bare: KVM says that memory is missing, not which
                if error.errno != errno.EFAULT:
                    raise
                where = f"the store at rip {vcpu.get_regs().rip:#x} (KVM does not say where)"
            else:
                if exit == anykvm.Hlt():
                    break
                assert isinstance(exit, anykvm.MemoryFault) and exit.errno == errno.EFAULT, exit
                assert EPC <= exit.gpa < EPC + PAGES * PAGE, f"{exit} is not in the EPC"
                where = f"guest page {exit.gpa:#x}"
            print(f"EPC full: {epc.pages} pages, none free; fault: {where}; adding 5")
            epc.grow(5)
        stored = [int.from_bytes(vepc.read(page * PAGE, 4), "little") for page in range(PAGES)]
        assert stored == list(range(PAGES, 0, -1)), stored
        print(f"done: {PAGES} pages stored, {epc.pages - epc.free} of {epc.pages} EPC pages in use")


if __name__ == "__main__":
    start(main)
