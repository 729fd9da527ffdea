"""Page look-ups of the soft backend that fail on demand: hva_to_pfn() and kvm_gmem_get_pfn()."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

from anykvm.layers.inject import sites
from anykvm.layers.inject.selection import Counter, Fired

_WRITE: Final = 1
_PAGE: Final = 4096
_SITES: Final = {0: sites.HVA, 1: sites.GMEM}  # enum ak_lookup


class Lookups:
    """The rules about page look-ups, asked from inside the page fault."""

    def __init__(self, counters: Sequence[Counter], note: Callable[[Fired], None]) -> None:
        """``note`` is called with what was injected."""
        # Only here: other backends need no engine.
        from anykvm.backends.soft.engine.library import REFUSAL_HOOK

        self._counters = tuple(counters)
        self._note = note
        self._hook: Any = REFUSAL_HOOK(self._ask)

    def watch(self, vm: int) -> None:
        """Ask the rules about every look-up of a VM, by its descriptor."""
        from anykvm.backends.soft.engine.library import library
        from anykvm.backends.soft.files import FILES
        from anykvm.backends.soft.vm import VmFile

        file = FILES.get(vm)
        assert isinstance(file, VmFile)
        file.vm.refusal_hook = self._hook  # the VM may live longer than this layer
        library().ak_vm_refusal_hook(file.vm.address, ctypes.cast(self._hook, ctypes.c_void_p))

    def _ask(self, lookup: int, vcpu: int, gpa: int, access: int) -> int:
        """Answer the engine: 0, enum ak_host_fault, or -errno. Nothing may be raised into it."""
        try:
            return self._answer(_SITES[lookup], vcpu, gpa, access)
        except Exception as error:
            sys.unraisablehook(_unraisable(error, self._ask))
            return 0

    def _answer(self, site: str, vcpu: int, gpa: int, access: int) -> int:
        answer = 0
        for counter in self._counters:
            rule = counter.rule
            if rule.site != site or (rule.fault == "denied" and access != _WRITE):
                continue
            met = counter.meets(vcpu, gpa, _PAGE)
            if met and not answer:
                self._note(Fired(rule, site, met, vcpu, gpa))
                answer = sites.FAULTS[rule.fault] if rule.fault else -rule.number
        return answer


def _unraisable(error: Exception, where: object) -> Any:
    told = "a rule about page look-ups failed"
    return SimpleNamespace(
        exc_type=type(error), exc_value=error, exc_traceback=error.__traceback__, err_msg=told, object=where
    )
