"""The stress test: vCPUs that check themselves while all that a VMM may change under a running guest is changed.

``board``   what guests and VMM tell each other: which values there may be in memory, and since when
``guest``   the guests' program: accesses of all kinds, each value judged where it was read
``area``    what all memory under test has in common; ``areas``, ``slots``, ``logged``, ``private``: its kinds
``updater`` threads that choose changes, seeded
``vcpus``   the guests' threads; whether each exit was to be expected
``audit``   the end: memory as the VMM sees it
``world``   all of it together; ``python -m stress --help``
"""
