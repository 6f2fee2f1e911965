"""Decides where experts live. Knows numpy and schemas; no torch, and sockets only under control."""
