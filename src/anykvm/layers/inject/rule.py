"""A rule: at which site something fails, which of its calls, and how. Its text form is one line that replays it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from anykvm.abi.constants import KVM_EXIT_MEMORY_FAULT, KVM_EXIT_UNKNOWN
from anykvm.abi.names import EXIT_NAMES, errno_name, exit_name
from anykvm.layers.inject import sites
from anykvm.layers.inject.errnos import errno_number, names

WHEN: Final = ("early", "late")
IMMEDIATE_EXIT: Final = "immediate_exit"
KEEP: Final = "keep"
_PAGE: Final = 4096
_EXITS: Final = {name: number for number, name in EXIT_NAMES.items()}


class RuleError(ValueError):
    """A rule that makes no sense. ``key`` is the key at fault; the text begins with it."""

    def __init__(self, key: str, text: str) -> None:
        """Say which key, and what is wrong with it."""
        super().__init__(f"{key}: {text}")
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of failure at one site. Raises RuleError for what makes no sense, or what no kernel does.

    What happens is an ``errno``, a ``fault`` of a page's look-up, a ``race``, or a ``delay``; a delay may precede any.

    >>> rule = Rule(site="KVM_RUN", errno="EFAULT", nth=3)
    >>> str(rule)
    'KVM_RUN:errno=EFAULT,nth=3'
    >>> Rule.parse(str(rule)) == rule
    True
    """

    site: str
    """An ioctl by name, ``ioctl`` for every one, ``open``, ``mmap``, ``hva_to_pfn``, ``kvm_gmem_get_pfn``."""
    errno: str = ""
    """The errno's name. ``0``, with ``unlawful``: success, without anything being done."""
    fault: str = ""
    """How a look-up in the page fault path fails: one of ``sites.FAULTS``."""
    race: str = ""
    """``immediate_exit``: another thread sets kvm_run.immediate_exit just before KVM_RUN, and clears it afterwards."""
    delay: float = 0.0
    """Seconds that the call waits before it does anything."""
    when: str = ""
    """KVM_RUN's errno: ``early``, before anything is done; ``late``, after the completion of the last exit and the
    reset of exit_reason, on the guest's first instruction. Default: late, where that errno is possible."""
    reason: str = ""
    """What KVM_RUN leaves in exit_reason: ``keep``, or a KVM_EXIT_* name. Default: keep if early; if late
    KVM_EXIT_INTR for EINTR, else KVM_EXIT_UNKNOWN."""
    memory_fault: int = -1
    """With KVM_RUN's errno: fill memory_fault with this gpa, and say KVM_EXIT_MEMORY_FAULT. -1: do not."""
    size: int = _PAGE
    """Bytes of that memory_fault."""
    flags: int = 0
    """Flags of that memory_fault."""
    nth: int = 1
    """The first matching call that fails, from 1."""
    times: int = -1
    """How many calls fail from there; 0: all. Default: 1, with a probability all."""
    vcpu: int = -1
    """Only calls on vCPUs with this id; -1: any."""
    gpa: int = -1
    """Only calls about a guest-physical range that has a byte at or above this address; -1: any."""
    gpa_end: int = -1
    """... and below this one; -1: of the page of ``gpa``."""
    probability: float = 1.0
    """The chance of each matching call, from 0 to 1."""
    seed: int = 0
    """Of the random numbers for ``probability``."""
    unlawful: bool = False
    """Allow an errno that no kernel gives there."""

    def __post_init__(self) -> None:
        """Check all of it, and fill in what depends on the rest."""
        _check_types(self)
        if not sites.known(self.site):
            spelt = {site.upper(): site for site in sites.all_sites()}
            near = [spelt[name] for name in difflib.get_close_matches(self.site.upper(), spelt, 1)]
            hint = f"; did you mean {near[0]}?" if near else "; an ioctl's name, ioctl, open, mmap, hva_to_pfn, ..."
            raise RuleError("site", f"no site {self.site!r}{hint}")
        if self.gpa >= 0 and self.gpa_end < 0:
            self._set("gpa_end", (self.gpa | (_PAGE - 1)) + 1)
        if self.times < 0:
            self._set("times", 0 if self.probability < 1 else 1)
        _check_selection(self)
        _check_what(self)
        if self.site == sites.RUN and self.errno and not self.when:
            self._set("when", "late" if errno_number(self.errno) in _allowed(self, "late") else "early")
        _check_errno(self)
        _check_run(self)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def number(self) -> int:
        """The errno's number; 0 for none, and for success."""
        return errno_number(self.errno) or 0

    @property
    def exit_reason(self) -> int:
        """What KVM_RUN leaves in exit_reason; -1: what was there."""
        if self.memory_fault >= 0:
            return KVM_EXIT_MEMORY_FAULT
        if self.reason:
            return -1 if self.reason == KEEP else _EXITS[self.reason]
        if self.when == "early":
            return -1
        return _EXITS["KVM_EXIT_INTR"] if self.errno == "EINTR" else KVM_EXIT_UNKNOWN

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``SITE:key=value,key=value``, as ``str`` writes it. Raises RuleError.

        A key that is true needs no value; ``gpa`` takes one address, or ``FIRST-END``.

        >>> Rule.parse("hva_to_pfn:fault=no_vma,gpa=0x7000-0x9000,times=0").gpa_end == 0x9000
        True
        """
        site, _, rest = text.partition(":")
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in rest.split(","))):
            key, equals, value = item.partition("=")
            if key in values:
                raise RuleError(key, "given twice")
            values[key] = value if equals else True
        return cls.make({"site": site.strip(), **values})

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Rule:
        """Make a rule of keys and values, the values also as text. Raises RuleError."""
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key not in _KINDS:
                near = difflib.get_close_matches(key, _KINDS, 1)
                raise RuleError(key, f"no such key{f'; did you mean {near[0]}?' if near else ''}")
            if key == "gpa" and isinstance(value, str) and "-" in value:
                value, _, end = value.partition("-")
                made["gpa_end"] = _convert("gpa_end", end)
            made[key] = _convert(key, value)
        if "site" not in made:
            raise RuleError("site", "missing")
        return cls(**made)

    def __str__(self) -> str:
        """Write it as ``parse`` reads it, without what is the default."""
        plain = {entry.name: entry.default for entry in fields(self)}
        default_times = 0 if self.probability < 1 else 1
        parts = []
        for name, default in plain.items():
            value = getattr(self, name)
            if name in ("site", "gpa_end") or value == default or (name == "times" and value == default_times):
                continue
            if name == "gpa":
                page_end = (self.gpa | (_PAGE - 1)) + 1
                parts.append(f"gpa={self.gpa:#x}" + ("" if self.gpa_end == page_end else f"-{self.gpa_end:#x}"))
            elif name == "when" and value == _default_when(self):
                continue
            elif value is True:
                parts.append(name)
            else:
                parts.append(f"{name}={value:#x}" if name in _HEX else f"{name}={value}")
        return f"{self.site}:{','.join(parts)}"

    def what(self) -> str:
        """Say in a few words what fails how."""
        if self.fault:
            return f"{self.site}: {self.fault}"
        if self.race:
            return f"{self.site}: {self.race} is set"
        if not self.errno:
            return f"{self.site}: waits {self.delay:g} s"
        left = "" if self.exit_reason < 0 or self.site != sites.RUN else f", {exit_name(self.exit_reason)}"
        when = f", {self.when}" if self.when else ""
        return f"{self.site}: {self.errno if self.number else 'success without doing it'}{when}{left}"


_HEX: Final = frozenset(("memory_fault", "size", "flags"))
_KINDS: Final[dict[str, type]] = {entry.name: type(entry.default) for entry in fields(Rule) if entry.name != "site"} | {
    "site": str
}


def _convert(key: str, value: Any) -> Any:
    kind = _KINDS[key]
    if kind is bool and isinstance(value, str):
        if value not in ("true", "false"):
            raise RuleError(key, f"{value!r} is not true or false")
        return value == "true"
    if kind is str and type(value) is int:
        value = str(value)
    if kind in (int, float) and isinstance(value, str):
        try:
            return int(value, 0) if kind is int else float(value)
        except ValueError:
            raise RuleError(key, f"{value!r} is not a number") from None
    return float(value) if kind is float and type(value) is int else value


def _check_types(rule: Rule) -> None:
    for key, kind in _KINDS.items():
        value = getattr(rule, key)
        if type(value) is not kind and not (kind is float and type(value) is int):
            what = {int: "a number", float: "a number", bool: "true or false", str: "a text"}[kind]
            raise RuleError(key, f"{value!r} is not {what}")


def _check_selection(rule: Rule) -> None:
    for key, least in (("nth", 1), ("times", 0), ("vcpu", -1), ("gpa", -1), ("size", 0), ("flags", 0)):
        if getattr(rule, key) < least:
            raise RuleError(key, f"{getattr(rule, key)} is below {least}")
    if not 0 < rule.probability <= 1:
        raise RuleError("probability", f"{rule.probability:g} is not above 0 and up to 1")
    if not 0 <= rule.delay <= 60:
        raise RuleError("delay", f"{rule.delay:g} is not from 0 to 60 seconds")
    for key in ("memory_fault", "size", "flags", "gpa", "gpa_end"):
        if getattr(rule, key) > 1 << 64 or (key != "gpa_end" and getattr(rule, key) == 1 << 64):
            raise RuleError(key, f"{getattr(rule, key):#x} does not fit into 64 bits")
    if rule.gpa >= 0 and rule.site not in sites.WITH_GPA:
        raise RuleError("gpa", f"calls of {rule.site} have no guest-physical address to select by")
    if rule.gpa_end >= 0 and rule.gpa_end <= rule.gpa:
        raise RuleError("gpa", f"the range ends at {rule.gpa_end:#x}, not above {rule.gpa:#x}")
    if rule.vcpu >= 0 and rule.site in ("open", "mmap"):
        raise RuleError("vcpu", f"calls of {rule.site} belong to no vCPU")


def _check_what(rule: Rule) -> None:
    given = [key for key in ("errno", "fault", "race") if getattr(rule, key)]
    if len(given) > 1:
        raise RuleError(given[1], f"a rule has one of errno, fault, race, and this has {given[0]} already")
    if rule.fault and rule.site not in sites.LOOKUPS:
        raise RuleError("fault", f"only page look-ups ({', '.join(sites.LOOKUPS)}) fail so")
    faults = (sites.INTERRUPTED,) if rule.site == sites.GMEM else tuple(sites.FAULTS)
    if rule.fault and rule.fault not in faults:
        raise RuleError("fault", f"no fault {rule.fault!r} of {rule.site}; there are {', '.join(faults)}")
    if rule.site == sites.HVA and rule.errno:
        raise RuleError("errno", f"a look-up by host address has a fault ({', '.join(faults)}), not an errno")
    if rule.race and (rule.race != IMMEDIATE_EXIT or rule.site != sites.RUN):
        raise RuleError("race", f"{rule.race!r} of {rule.site}; there is {IMMEDIATE_EXIT} of {sites.RUN}")
    if rule.delay and rule.site in sites.LOOKUPS:
        raise RuleError("delay", "a page's look-up cannot be delayed: the VM's slots wait for it")
    if not given and not rule.delay:
        raise RuleError("errno", "nothing happens: a rule has one of errno, fault, race, delay")


def _allowed(rule: Rule, when: str) -> frozenset[int]:
    row = sites.row(rule.site, when)
    return frozenset() if row is None else row.errnos


def _default_when(rule: Rule) -> str:
    return "late" if errno_number(rule.errno) in _allowed(rule, "late") else "early"


def _check_errno(rule: Rule) -> None:
    if not rule.errno:
        return
    number = 0 if rule.errno == "0" else errno_number(rule.errno)
    if number is None or (number and errno_name(number) == f"errno {number}"):
        raise RuleError("errno", f"no errno {rule.errno!r}")
    row = sites.row(rule.site, rule.when)
    if rule.unlawful or (row is None and number):
        return
    if row is None or number not in row.errnos:
        gives = f"{rule.site}{f' ({rule.when})' if rule.when else ''} gives {names(row) if row else 'errnos'}"
        raise RuleError("errno", f"{gives} ({row.source if row else ''}), not {rule.errno}; unlawful = true injects it")


def _check_run(rule: Rule) -> None:
    if rule.when and (rule.when not in WHEN or rule.site != sites.RUN or not rule.errno):
        raise RuleError("when", f"{rule.when!r}: an errno of KVM_RUN is early or late, and nothing else is")
    for key in ("reason", "memory_fault"):
        if getattr(rule, key) not in ("", -1) and not (rule.site == sites.RUN and rule.errno):
            raise RuleError(key, "only an errno of KVM_RUN comes with it")
    if rule.reason and rule.reason != KEEP and rule.reason not in _EXITS:
        raise RuleError("reason", f"no exit reason {rule.reason!r}; keep, or a KVM_EXIT_* name")
    if rule.reason and rule.memory_fault >= 0:
        raise RuleError("reason", "memory_fault makes it KVM_EXIT_MEMORY_FAULT")
    if rule.memory_fault < 0 and (rule.size != _PAGE or rule.flags):
        raise RuleError("size" if rule.size != _PAGE else "flags", "there is no memory_fault that it belongs to")
    if rule.site == sites.RUN and not rule.number and rule.errno and rule.when == "late":
        raise RuleError("when", "success without doing it is early")
    if rule.errno == "EHWPOISON" and rule.site == sites.RUN and rule.memory_fault < 0 and not rule.unlawful:
        raise RuleError("memory_fault", "KVM_RUN gives EHWPOISON only with memory_fault filled (ABI.md 2.3)")
