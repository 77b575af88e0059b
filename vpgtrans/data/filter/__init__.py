"""Scoring a data set's samples, and choosing which of them to keep."""
