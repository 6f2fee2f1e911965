"""Published heuristics, each written from its description, to compare with. They prove no bound."""
