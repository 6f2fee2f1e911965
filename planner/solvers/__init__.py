"""Ways to find a placement, behind one Protocol (see `base`). Solver libraries are imported nowhere else."""
