"""The placement problem for OR-tools' CP-SAT, in integers. Mirrors `milp` file by file.

Flow: `scaling` → `variables` → `constraints` → `model` → `solver`.
"""
