"""Trainings in every topology, an implementation and the reference side by side."""
