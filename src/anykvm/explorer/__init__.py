"""The model of KVM_RUN's error ABI, and the search for traces in which a VMM misreads, loses or repeats something.

``policy``, ``rules`` and ``arch`` say who may play; ``state``, ``kernel`` and ``moves`` what can happen; ``properties``
what must not; ``search`` finds the shortest traces, ``catalogue`` names them, ``replay`` performs them on real guests.
Every rule cites the section of ABI.md it rests on.
"""

from anykvm.explorer.arch import ARCHITECTURES as ARCHITECTURES
from anykvm.explorer.arch import architecture as architecture
from anykvm.explorer.catalogue import ENTRIES as ENTRIES
from anykvm.explorer.catalogue import named as named
from anykvm.explorer.catalogue import trace as trace
from anykvm.explorer.moves import Game as Game
from anykvm.explorer.policy import POLICIES as POLICIES
from anykvm.explorer.properties import Property as Property
from anykvm.explorer.rules import RULES as RULES
from anykvm.explorer.search import DEPTH as DEPTH
from anykvm.explorer.search import Trace as Trace
from anykvm.explorer.search import search as search
