"""Talking to a finished model."""
