"""Objectives: pure functions from what the model read at the sites to a summed loss. No model, trainer or logger here."""
