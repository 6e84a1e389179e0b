"""Scores of a run, and the table that reports them."""
