"""Recipes, plans and runs: what the user writes, what would happen, and the doing of it, stage by stage."""
