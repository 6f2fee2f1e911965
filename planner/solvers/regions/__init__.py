"""Placement over hundreds of nodes: between regions, then within them, with one bound over the whole."""
