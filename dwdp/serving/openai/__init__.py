"""OpenAI's HTTP protocol: requests, responses, errors and event streams. No engine, no server."""
