"""KVM_ENABLE_CAP, which VMs and vCPUs share."""

from __future__ import annotations

from anykvm.abi.ioctls import KVM_ENABLE_CAP
from anykvm.abi.names import cap_name
from anykvm.abi.structures import kvm_enable_cap
from anykvm.api.handle import Handle


def enable_cap(handle: Handle, cap: int, args: tuple[int, ...], flags: int) -> int:
    """Do KVM_ENABLE_CAP on a VM or vCPU; ValueError for more than four arguments."""
    if len(args) > 4:
        raise ValueError(f"{cap_name(cap)} takes at most four arguments")
    structure = kvm_enable_cap(cap=cap, flags=flags)
    structure.args[: len(args)] = list(args)
    shown = {"cap": cap, **{f"args[{index}]": value for index, value in enumerate(args)}, "flags": flags}
    return handle._call(KVM_ENABLE_CAP, structure, shown)
