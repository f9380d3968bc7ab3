"""Chooses how a rank batches: continuously where the model allows it, else one request after the other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dwdp.serving.rank_server.backend import Backend, UnsupportedModel
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.rank_server.plain import PlainBackend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DEFAULT_MAX_SEQUENCE_LENGTH = 8192


def create_backend(model: PreTrainedModel, options: RankOptions) -> Backend:
    """The backend that ``options.batching`` asks for; what ``auto`` chose and why is logged.

    Raises:
        UnsupportedModel: ``continuous`` was asked for and the model does not allow it.
        ValueError: a limit cannot be had.
    """
    length = max_sequence_length(model, options)
    if options.batching == "plain":
        return PlainBackend(model, length)
    try:
        backend = _continuous(model, options, length)
    except UnsupportedModel as error:
        model_type = model.config.model_type
        if options.batching == "continuous":
            raise UnsupportedModel(
                f"Transformers cannot batch {model_type} continuously ({error}); use --batching plain"
            ) from error
        logger.warning(
            "requests are answered one after the other: continuous batching cannot run %s (%s)",
            model_type,
            error,
        )
        return PlainBackend(model, length)
    logger.info(
        "continuous batching: %d tokens of key-value cache, %d bytes",
        backend.kv_cache_tokens,
        backend.kv_cache_bytes,
    )
    return backend


def _continuous(model: PreTrainedModel, options: RankOptions, length: int) -> Backend:
    try:
        from dwdp.serving.rank_server.continuous import ContinuousBackend
    except ImportError as error:  # it builds on more of Transformers than its public interface
        raise UnsupportedModel(f"this Transformers does not have what it needs: {error}") from error
    return ContinuousBackend(model, options, length)


def max_sequence_length(model: PreTrainedModel, options: RankOptions) -> int:
    """Tokens of a prompt and its answer together.

    Raises:
        ValueError: more than the model has positions for.
    """
    config = model.config.get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if options.max_sequence_length is None:
        return min(positions or DEFAULT_MAX_SEQUENCE_LENGTH, DEFAULT_MAX_SEQUENCE_LENGTH)
    if positions is not None and options.max_sequence_length > positions:
        raise ValueError(
            f"max_sequence_length is {options.max_sequence_length}, but the model has {positions} positions"
        )
    return options.max_sequence_length
