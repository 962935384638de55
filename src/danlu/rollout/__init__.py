"""Reinforcement learning's other half: answers are sampled and scored, and what they were worth is told per token."""
