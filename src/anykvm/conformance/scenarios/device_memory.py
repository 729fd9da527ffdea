"""Slots over mappings of devices (VM_IO, VM_PFNMAP): the vDSO's data pages, /dev/mem, PCI resources.

Reads device registers through /dev/mem: run it in a virtual machine.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from anykvm.conformance import guest_code as code
from anykvm.conformance.host import PAGE, file_mapping
from anykvm.conformance.layout import TEST
from anykvm.conformance.machine import Machine
from anykvm.conformance.outcome import Outcome
from anykvm.conformance.scenario import Lab, scenario
from anykvm.host.libc import PROT_READ

AREA = "device_memory"
_BIOS = 0xF0000
_HPET = 0xFED00000
_IOAPIC = 0xFEC00000
_SPECIAL = ("[vvar]", "[vvar_vclock]", "[vdso]")
_MAX_BARS = 3


@scenario("pfnmap", area=AREA, needs=("device_memory",))
def pfnmap(lab: Lab) -> None:
    """What may be read and written, and what is refused, is decided by the mapping's own fault handler."""
    m = lab.machine()
    _process_mappings(lab, m)
    try:
        memory = os.open("/dev/mem", os.O_RDWR | os.O_SYNC)
    except OSError as error:
        lab.step("open_dev_mem", Outcome(-1, error.errno or 0))
        return
    _physical(lab, m, memory)
    _read_only_and_private(m, memory)
    _pci(lab, m)


def _process_mappings(lab: Lab, m: Machine) -> None:
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.split()[-1]
        if name not in _SPECIAL:
            continue
        found += 1
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        gpa = TEST + found * 0x100000
        lab.step(name.strip("[]"), m.slot(1 + found, gpa, end - start, start))
        lab.note("len", len=end - start)
        m.at(code.READ8, gpa)
        m.run("read")
        m.at(code.WRITE8, gpa)
        m.run("write")


def _physical(lab: Lab, m: Machine, memory: int) -> None:
    for index, (name, physical) in enumerate(
        (("devmem_bios_0xf0000", _BIOS), ("devmem_hpet_0xfed00000", _HPET), ("devmem_ioapic_0xfec00000", _IOAPIC))
    ):
        gpa = TEST + 0x1000000 + index * PAGE
        try:
            host = file_mapping(memory, PAGE, offset=physical)
        except OSError as error:
            lab.step(name, Outcome(-1, error.errno or 0))
            continue
        m.slot(8 + index, gpa, PAGE, host)
        m.at(code.READ8, gpa)
        m.run("read", map=name)
        if physical == _BIOS:
            m.at(code.WRITE8, gpa)
            m.run("write", map=name)
        host.unmap()
        m.at(code.READ8, gpa)
        m.run("read_after_munmap", map=name)


def _read_only_and_private(m: Machine, memory: int) -> None:
    for slot, gpa, name, host in (
        (12, TEST + 0x2000000, "devmem_PROT_READ", file_mapping(memory, PAGE, PROT_READ, offset=_BIOS)),
        (13, TEST + 0x2100000, "devmem_MAP_PRIVATE", file_mapping(memory, PAGE, shared=False, offset=_BIOS)),
    ):
        m.slot(slot, gpa, PAGE, host)
        m.at(code.READ8, gpa)
        m.run(f"{name}_read")
        m.at(code.WRITE8, gpa)
        m.run(f"{name}_write")


def _pci(lab: Lab, m: Machine) -> None:
    found = 0
    for path in sorted(glob.glob("/sys/bus/pci/devices/*/resource[0-9]")):
        if found == _MAX_BARS:
            break
        try:
            host = file_mapping(os.open(path, os.O_RDWR), PAGE)
        except OSError as error:
            lab.step("pci_resource_mmap", Outcome(-1, error.errno or 0), path=path)
            continue
        found += 1
        gpa = TEST + 0x3000000 + found * PAGE
        m.slot(14 + found, gpa, PAGE, host)
        m.at(code.READ8, gpa)
        m.run("pci_bar_read", path=path)
