"""One node: composes runtime and schemas and owns all its I/O. Knows no planner."""
