"""Rules as text and as TOML: what is read is what is written, and each mistake is one line that names its key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm.abi.names import errno_name
from anykvm.layers.inject import Rule, RuleError, load, rules
from anykvm.layers.inject.sites import FAULTS, WITH_GPA, all_sites, row

WRONG = {
    "KVM_RUM:errno=EIO": "site: no site 'KVM_RUM'; did you mean KVM_RUN?",
    "kvm_run:errno=EIO": "site: no site 'kvm_run'; did you mean KVM_RUN?",
    "xyzzy:errno=EIO": "site: no site 'xyzzy'; an ioctl's name",
    ":errno=EIO": "site: no site ''",
    "KVM_RUN": "errno: nothing happens",
    "KVM_RUN:": "errno: nothing happens",
    "KVM_RUN:nth=2": "errno: nothing happens",
    "KVM_RUN:errno=EIO,errno=EIO": "errno: given twice",
    "KVM_RUN:errno=EBROKEN": "errno: no errno 'EBROKEN'",
    "KVM_RUN:errno=5": "errno: no errno '5'",
    "KVM_RUN:errno": "errno: True is not a text",
    "KVM_RUN:errno=0": "errno: KVM_RUN (early) gives",
    "KVM_RUN:errno=EEXIST": "errno: KVM_RUN (early) gives",
    "KVM_GET_REGS:errno=EEXIST": "errno: KVM_GET_REGS gives EFAULT, EIO, ENOMEM (km:kvm_vcpu_ioctl()), not EEXIST",
    "open:errno=EEXIST": "errno: open gives",
    "kvm_gmem_get_pfn:errno=EPERM": "errno: kvm_gmem_get_pfn gives",
    "hva_to_pfn:errno=EFAULT": "errno: a look-up by host address has a fault",
    "hva_to_pfn:fault=gone": "fault: no fault 'gone' of hva_to_pfn; there are no_vma,",
    "kvm_gmem_get_pfn:fault=no_vma": "fault: no fault 'no_vma' of kvm_gmem_get_pfn; there are interrupted",
    "KVM_RUN:fault=no_vma": "fault: only page look-ups",
    "KVM_RUN:race=signal": "race: 'signal' of KVM_RUN; there is immediate_exit",
    "KVM_GET_REGS:race=immediate_exit": "race: 'immediate_exit' of KVM_GET_REGS",
    "KVM_RUN:race=immediate_exit,errno=EIO": "race: a rule has one of errno, fault, race, and this has errno already",
    "KVM_RUN:errno=EIO,when=never": "when: 'never'",
    "KVM_GET_REGS:errno=EIO,when=late": "when: 'late'",
    "KVM_RUN:race=immediate_exit,when=late": "when: 'late'",
    "KVM_RUN:errno=0,when=late,unlawful": "when: success without doing it is early",
    "KVM_RUN:errno=EIO,reason=IO": "reason: no exit reason 'IO'",
    "KVM_GET_REGS:errno=EIO,reason=keep": "reason: only an errno of KVM_RUN",
    "KVM_RUN:errno=EFAULT,memory_fault=0,reason=keep": "reason: memory_fault makes it",
    "KVM_GET_REGS:errno=EIO,memory_fault=0": "memory_fault: only an errno of KVM_RUN",
    "KVM_RUN:errno=EFAULT,size=1": "size: there is no memory_fault",
    "KVM_RUN:errno=EFAULT,flags=1": "flags: there is no memory_fault",
    "KVM_RUN:errno=EHWPOISON": "memory_fault: KVM_RUN gives EHWPOISON only with",
    "KVM_RUN:errno=EFAULT,memory_fault=0x10000000000000000": "memory_fault: 0x10000000000000000 does not fit",
    "KVM_RUN:errno=EIO,nth=0": "nth: 0 is below 1",
    "KVM_RUN:errno=EIO,nth=x": "nth: 'x' is not a number",
    "KVM_RUN:errno=EIO,nth": "nth: True is not a number",
    "KVM_RUN:errno=EIO,vcpu=-2": "vcpu: -2 is below -1",
    "open:errno=ENOMEM,vcpu=0": "vcpu: calls of open belong to no vCPU",
    "KVM_RUN:errno=EIO,gpa=0x1000": "gpa: calls of KVM_RUN have no guest-physical address",
    "hva_to_pfn:fault=no_vma,gpa=0x2000-0x2000": "gpa: the range ends at 0x2000",
    "KVM_RUN:errno=EIO,probability=0": "probability: 0 is not above 0",
    "KVM_RUN:errno=EIO,probability=2": "probability: 2 is not above 0",
    "KVM_RUN:errno=EIO,probability=nan": "probability: nan is not above 0",
    "KVM_RUN:delay=61": "delay: 61 is not from 0 to 60",
    "KVM_RUN:delay=-1": "delay: -1 is not from 0 to 60",
    "hva_to_pfn:fault=no_vma,delay=1": "delay: a page's look-up cannot be delayed",
    "KVM_RUN:errno=EIO,unlawful=maybe": "unlawful: 'maybe' is not true or false",
    "KVM_RUN:errno=EIO,nht=2": "nht: no such key; did you mean nth?",
    "KVM_RUN:errno=EIO,xyzzy=2": "xyzzy: no such key",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_rule_is_one_line_that_names_its_key(text: str) -> None:
    with pytest.raises(RuleError) as caught:
        Rule.parse(text)
    message = str(caught.value)
    assert message.startswith(WRONG[text]) and "\n" not in message


def _rules() -> st.SearchStrategy[Rule]:
    def what(site: str) -> st.SearchStrategy[dict[str, object]]:
        if site == "hva_to_pfn":
            return st.sampled_from([{"fault": fault} for fault in FAULTS])
        if site == "ioctl":
            either: list[dict[str, object]] = [{"errno": "EIO"}, {"delay": 0.5}]
            return st.sampled_from(either)
        found = row(site)
        assert found is not None
        names = [errno_name(number) for number in sorted(found.errnos) if errno_name(number) != "EHWPOISON"]
        errnos: list[dict[str, object]] = [{"errno": name} for name in names]
        return st.sampled_from(errnos or [{"delay": 1.5}])

    def build(site: str) -> st.SearchStrategy[Rule]:
        gpa: st.SearchStrategy[dict[str, object]] = st.just({})
        if site in WITH_GPA:
            gpa = st.sampled_from([{}, {"gpa": 0x5000}, {"gpa": 0x5123, "gpa_end": 0x9000}])
        counts = st.fixed_dictionaries(
            {"nth": st.integers(1, 99), "times": st.integers(-1, 5), "probability": st.sampled_from([1.0, 0.25])}
        )
        return st.tuples(what(site), gpa, counts).map(lambda parts: Rule(site=site, **parts[0], **parts[1], **parts[2]))  # type: ignore[arg-type]

    return st.sampled_from(all_sites()).flatmap(build)


@settings(max_examples=300, deadline=None)
@given(_rules())
def test_what_is_written_is_read(rule: Rule) -> None:
    assert Rule.parse(str(rule)) == rule


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(
        """# what a machine without memory does
[[rule]]
site = "KVM_CREATE_VCPU"
errno = "ENOMEM"

[[rule]]
site = "hva_to_pfn"
fault = "no_vma"
gpa = "0x1000-0x3000"
times = 0

[[rule]]
site = "KVM_RUN"
errno = "EFAULT"
memory_fault = 0x7000
probability = 0.5
"""
    )
    texts = [
        "KVM_CREATE_VCPU:errno=ENOMEM",
        "hva_to_pfn:fault=no_vma,times=0,gpa=0x1000-0x3000",
        "KVM_RUN:errno=EFAULT,memory_fault=0x7000,probability=0.5",
    ]
    assert [str(rule) for rule in load(path)] == texts
    assert rules([str(path), "open:errno=ENOENT"]) == (*load(path), Rule(site="open", errno="ENOENT"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rules.toml: there is no [[rule]]"),
        ("x = ", "rules.toml: not TOML: Invalid value (at"),
        ("\nrules = 1", "rules.toml:2: rules: there are [[rule]] tables, and nothing else"),
        ("[rule]\nsite = 'open'", "rules.toml:1: rule: not a [[rule]] table"),
        ("\nrule = 7", "rules.toml:2: rule: not a [[rule]] table"),
        ("[[rule]]\nerrno = 'EIO'", "rules.toml:1: rule 1: site: missing"),
        ("[[rule]]\nsite = 'open'\nerrno = 'ENOENT'\n\n[[rule]]\nsite = 'open'\n\nnth = 0\nerrno = 'ENOENT'",
         "rules.toml:8: rule 2: nth: 0 is below 1"),
        ("[[rule]]\nsite = 'open'\nerrno = 'ENOENT'\nnth = '2x'", "rules.toml:4: rule 1: nth: '2x' is not a number"),
        ("[[rule]]\nsite = 'open'\nerrno = ['ENOENT']", "rules.toml:3: rule 1: errno: ['ENOENT'] is not a text"),
        ("[[rule]]\nsite = 'open'\nerrno = 2", "rules.toml:3: rule 1: errno: no errno '2'"),
        ("[[rule]]\nsite = 'open'\nerrno = 'ENOENT'\nnth = 1.5", "rules.toml:4: rule 1: nth: 1.5 is not a number"),
        ("[[rule]]\nsite = 'open'\nerrno = 'ENOENT'\nnth = true", "rules.toml:4: rule 1: nth: True is not a number"),
        ("[[rule]]\nsite = 'open'\nerrno = 'ENOENT'\nevil.key = 1", "rules.toml:4: rule 1: evil: no such key"),
        ("[[rule]]\nsite = 'open'\n[rule.errno]\na = 1", "rules.toml:1: rule 1: errno: {'a': 1} is not a text"),
        ("[[rule]]\nsite = 'open'\nerrno = nan", "rules.toml:3: rule 1: errno: nan is not a text"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_file_line_and_key(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(content)
    with pytest.raises(RuleError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_bytes(b"# \xff")
    with pytest.raises(RuleError, match="not UTF-8 at byte 2"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.toml")
