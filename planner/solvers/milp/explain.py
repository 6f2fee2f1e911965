"""Why no placement is feasible: the smallest enlargement of memory, compute and links that would make one.

Decides by an elastic model: every row that stands for a machine's limit may be exceeded at a price, and what the
optimum exceeds is what is in the way.
"""
