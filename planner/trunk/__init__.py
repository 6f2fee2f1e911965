"""Where the trunk of each layer runs: paths of tokens, their cost, and the search for them with a placement."""
