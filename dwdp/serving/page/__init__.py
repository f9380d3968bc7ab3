"""The live page: one HTML document with its style and script, and the events that keep it up to date."""
