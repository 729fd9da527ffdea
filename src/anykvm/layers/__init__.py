"""Layers: backends that wrap a backend and add one thing to it. None of them is imported unless it is used."""
