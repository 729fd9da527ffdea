"""The scenarios, a module an area; ``anykvm.conformance.load`` imports them all."""
