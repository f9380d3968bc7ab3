"""Rank processes, and the dispatcher that shares out prompts over them."""
