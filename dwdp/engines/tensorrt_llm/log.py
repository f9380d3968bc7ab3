"""Lines in TensorRT-LLM's own log, which obeys its log level and names the rank."""

from __future__ import annotations


def info(message: str) -> None:
    """Log what a user may want to know."""
    from tensorrt_llm.logger import logger

    logger.info(f"dwdp: {message}")


def error(message: str) -> None:
    """Log what a user has to know."""
    from tensorrt_llm.logger import logger

    logger.error(f"dwdp: {message}")
