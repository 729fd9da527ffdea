"""A small VMM on the API: images, modes, a console, a run loop, and memory that arrives on demand.

``loaders`` reads images, ``modes`` puts a vCPU where they start, ``serial`` is the guest's console, ``loop`` runs a
guest to its end, ``interrupts`` makes Ctrl-C and time limits end it; ``lazy`` is memory with absent pages,
``resolvers`` brings them on a memory fault, ``postcopy`` is all of it on a real task, and ``report`` draws that.
"""
