"""A confidential-style guest: its pages are private or shared as it asks, by hypercall, and this VMM converts them.

Private memory is a guest_memfd's, shared memory this process's. A page has both; which one the guest reaches is the
page's attribute. The VMM's rules are those of VMMs for confidential guests: a page that becomes shared loses its
private memory, and its shared memory stays. Nothing is encrypted here. It prints what the guest saw. On /dev/kvm it
needs a kernel with CONFIG_KVM_SW_PROTECTED_VM.

    python examples/convert.py [BACKEND [PROFILE]]
"""

from __future__ import annotations

import struct
from contextlib import ExitStack

from anykvm import GuestMemory, Hlt, Hypercall, Io, Kvm, abi
from start import Missing, start

PAGE, CODE, DATA, PAGES = 0x1000, 0x1000, 0x8000, 4
KVM_HC_MAP_GPA_RANGE, ENCRYPTED = 12, 1 << 4
SECRET, MOVED = DATA, DATA + PAGE


def store(gpa: int, letter: str) -> bytes:
    """The guest's code, in real mode: ``movb $letter, gpa``."""
    return b"\xc6\x06" + struct.pack("<HB", gpa, ord(letter))


def show(gpa: int) -> bytes:
    """``mov gpa, %al; out %al, $0xe9``."""
    return b"\xa0" + struct.pack("<H", gpa) + b"\xe6\xe9"


def ask(gpa: int, attributes: int) -> bytes:
    """``mov $12, %eax; mov $gpa, %ebx; mov $1, %ecx; mov $attributes, %edx; vmcall``."""
    loads = ((0xB8, KVM_HC_MAP_GPA_RANGE), (0xBB, gpa), (0xB9, 1), (0xBA, attributes))
    return b"".join(struct.pack("<BBI", 0x66, opcode, number) for opcode, number in loads) + b"\x0f\x01\xc1"


GUEST = b"".join(
    (
        store(MOVED, "s"),  # shared: the VMM sees it
        ask(MOVED, ENCRYPTED) + show(MOVED),  # private memory begins as zeros: "."
        store(MOVED, "p") + show(MOVED),  # "p"
        ask(SECRET, ENCRYPTED) + store(SECRET, "k"),
        ask(MOVED, 0) + show(MOVED),  # shared again, as it was left: "s"
        ask(MOVED, ENCRYPTED) + show(MOVED),  # the private memory was given back: "."
        show(SECRET),  # a page that was not converted: "k"
        b"\xf4",
    )
)


def require(kvm: Kvm) -> None:
    """Raise Missing for what this KVM has not."""
    needed = {
        "VMs of type KVM_X86_SW_PROTECTED_VM": kvm.check_extension(abi.KVM_CAP_VM_TYPES)
        & 1 << abi.KVM_X86_SW_PROTECTED_VM,
        "guest_memfd": kvm.check_extension(abi.KVM_CAP_GUEST_MEMFD),
        "exits for KVM_HC_MAP_GPA_RANGE": kvm.check_extension(abi.KVM_CAP_EXIT_HYPERCALL) & 1 << KVM_HC_MAP_GPA_RANGE,
    }
    if lacking := [name for name, there in needed.items() if not there]:
        raise Missing(", ".join(lacking))


def main(kvm: Kvm) -> None:
    """Run the guest; print the letters it saw, a dot for zero."""
    require(kvm)
    seen = b""
    with ExitStack() as stack:
        ram = stack.enter_context(GuestMemory(DATA))
        shared = stack.enter_context(GuestMemory(PAGES * PAGE))
        vm = stack.enter_context(kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM))
        vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        gmem = vm.create_guest_memfd(shared.size)
        stack.callback(kvm.backend.close, gmem)
        vm.map(ram, 0)
        vm.set_user_memory_region2(1, DATA, shared.size, shared.address, abi.KVM_MEM_GUEST_MEMFD, gmem)
        ram[CODE : CODE + len(GUEST)] = GUEST
        vcpu = vm.create_vcpu()
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        sregs.cs.base = sregs.cs.selector = 0
        regs.rip = CODE
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        while (exit := vcpu.run()) != Hlt():
            match exit:
                case Io(Io.OUT, 0xE9, data=letter):
                    seen += letter
                case Hypercall(nr=12, args=(gpa, pages, attributes, *_)):
                    private = bool(attributes & ENCRYPTED)
                    vm.set_memory_attributes(gpa, pages * PAGE, abi.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0)
                    if not private:
                        vm.discard_guest_memfd(gmem, gpa - DATA, pages * PAGE)
                    exit.respond(0)
                case _:
                    raise SystemExit(f"unexpected: {exit}")
        assert shared[MOVED - DATA] == ord("s") and shared[SECRET - DATA] == 0  # all that the VMM's own memory got
    print(seen.replace(b"\0", b".").decode())


if __name__ == "__main__":
    start(main)
