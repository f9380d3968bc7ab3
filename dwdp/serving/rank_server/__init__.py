"""One rank as a server of OpenAI's protocol, over the engine ``transformers``."""
