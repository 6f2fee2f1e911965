"""Decisions of the runtime as values in, values out: what is evicted, which experts a token gets.

Must not know torch, sockets, clocks or weights: the same code runs beside a model and on recorded traces. Experts are
named by flat keys, ``layer * E + expert``.
"""
