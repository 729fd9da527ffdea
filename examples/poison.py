#!/usr/bin/env python3
"""A page of guest memory breaks, and the VMM gives the guest another one.

The machine reports an uncorrectable error in a page. KVM cannot give that page to the guest: the thread in KVM_RUN
gets SIGBUS with code BUS_MCEERR_AR and the page's host address, and KVM_RUN ends with EINTR. (That is ordinary memory.
A guest_memfd has no host address to speak of: there KVM_RUN fails with EHWPOISON and KVM_EXIT_MEMORY_FAULT, which names
the guest page.) This VMM keeps a backup of the page, maps fresh memory over the broken one, restores it, and runs the
vCPU again. The error is injected, which only the soft backend can: no root, and no memory is harmed.

    python examples/poison.py [BACKEND [PROFILE]]
"""

from __future__ import annotations

import signal

import anykvm
from anykvm.backends.soft import poison
from start import Missing, start

PAGE = anykvm.PAGE_SIZE
COUNTER = 0x2000  # the guest's data
GUEST = bytes.fromhex(
    "ff 06 0020"  # next: inc word [0x2000]
    "e6 10"  # out 0x10, al: tell the VMM
    "eb f8"  # jmp next
)


def main(kvm: anykvm.Kvm) -> None:
    """Let the guest count, break its counter's page, and repair it."""
    if kvm.backend.name != "soft":
        raise Missing("injected errors; to break memory in earnest, as root, is madvise(MADV_HWPOISON)")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})  # taken below, with what it says, not by a handler
    with kvm.create_vm() as vm, anykvm.GuestMemory(4 * PAGE) as memory:
        memory[0 : len(GUEST)] = GUEST
        vm.map(memory, guest_phys_addr=0)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(rip=0)
        vcpu.set_signal_mask(())  # but it ends KVM_RUN
        for count in range(1, 4):
            assert isinstance(vcpu.run(), anykvm.Io)
            assert memory.read(COUNTER, 2) == count.to_bytes(2, "little")
        backup = memory.read(COUNTER, PAGE)

        poison(vm, memory, COUNTER)
        exit = vcpu.run()
        assert isinstance(exit, anykvm.Intr), exit
        told = signal.sigtimedwait({signal.SIGBUS}, 0)
        assert told is not None and told.si_code == 4  # BUS_MCEERR_AR
        print(f"SIGBUS: the guest's page {COUNTER:#x} is broken, rip {vcpu.get_regs().rip:#x}")

        memory.map(COUNTER, PAGE)  # another page at the same address
        memory.write(COUNTER, backup)
        for count in range(4, 7):
            assert isinstance(vcpu.run(), anykvm.Io)
            assert memory.read(COUNTER, 2) == count.to_bytes(2, "little")
        print(f"the guest goes on: it has counted to {count}, and missed nothing")


if __name__ == "__main__":
    start(main)
