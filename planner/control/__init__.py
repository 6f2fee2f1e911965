"""The coordinator: brings the agents of a cluster from one epoch to the next, and tells how they are."""
