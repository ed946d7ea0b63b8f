"""Scores over bit error rate."""
