"""Conformance: scenarios that run on any backend, and records of what a real kernel did in them.

A scenario is a Python function (``scenario``, ``scenarios``); ``record`` runs it on a backend and gives its steps as
records (a module to import by itself, because it is also a program); ``compare`` holds them against a golden file::

    >>> from anykvm.conformance import golden, compare_scenario
    >>> records = golden("linux-7.3-npt")["unmapped_read"]
    >>> [record["s"] for record in records]
    ['read8', 'again', 'remapped_resume']
    >>> compare_scenario("unmapped_read", records, records)
    []
"""

from anykvm.conformance.compare import Difference as Difference
from anykvm.conformance.compare import compare_scenario as compare_scenario
from anykvm.conformance.golden_file import by_scenario as by_scenario
from anykvm.conformance.golden_file import golden as golden
from anykvm.conformance.golden_file import read_records as read_records
from anykvm.conformance.scenario import SCENARIOS as SCENARIOS
from anykvm.conformance.scenario import Scenario as Scenario
from anykvm.conformance.scenario import load as load
