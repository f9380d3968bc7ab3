"""Starts the rank processes of one group, watches them, and starts again those that die."""
