"""Accuracy over bit error rate."""
