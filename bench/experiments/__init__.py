"""Trainings whose results are recorded beside their scripts."""
