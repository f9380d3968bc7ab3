"""The front door: one OpenAI-compatible endpoint over the ranks of a group."""
