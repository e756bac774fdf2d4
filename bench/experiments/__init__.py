"""Trainings that ask what a method costs in accuracy; each prints its rows and states what it was run with."""
