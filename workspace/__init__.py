"""Folders of runs, and the client of servers: what answering and judging share. Knows no model."""
