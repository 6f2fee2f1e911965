"""Placement by decomposition: Lagrangian prices, exact holder sets per expert, restricted models, certified gap."""
