"""Advice about a running or planned cluster: whether to move again, and what each machine and link is worth."""
