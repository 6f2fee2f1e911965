"""Executes tokens. Knows torch, transformers and schemas; no sockets, no planner."""
