"""Chooses how a rank batches: continuously where the model allows it, else one request after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dwdp.serving.rank_server.backend import Backend, UnsupportedModel
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.rank_server.plain import PlainBackend

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

DEFAULT_MAX_SEQUENCE_LENGTH = 8192


def create_backend(model: PreTrainedModel, options: RankOptions) -> Backend:
    """The backend that ``options.batching`` asks for; what ``auto`` chose and why is logged.

    Raises:
        UnsupportedModel: ``continuous`` was asked for and the model does not allow it.
        ValueError: a limit cannot be had.
    """
    length = max_sequence_length(model.config, options)
    if options.batching == "plain":
        return PlainBackend(model, length)
    try:
        backend = _continuous(model, options, length)
    except UnsupportedModel as error:
        if options.batching == "continuous":
            raise _refusal(model.config, error) from error
        logger.warning(
            "requests are answered one after the other: continuous batching cannot run %s (%s)",
            model.config.model_type,
            error,
        )
        return PlainBackend(model, length)
    logger.info(
        "continuous batching: %d tokens of key-value cache, %d bytes",
        backend.kv_cache_tokens,
        backend.kv_cache_bytes,
    )
    return backend


def planned_kv_cache_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, options: RankOptions
) -> int:
    """The key-value cache that a rank is going to set aside; 0 where it answers requests one by one.

    Args:
        config, dtype: of the model.

    Raises:
        UnsupportedModel: ``continuous`` was asked for and the model does not allow it.
        ValueError: a limit cannot be had.
    """
    length = max_sequence_length(config, options)
    if options.batching == "plain":
        return 0
    try:
        return _planned_bytes(config, dtype, options, length)
    except UnsupportedModel as error:
        if options.batching == "continuous":
            raise _refusal(config, error) from error
        return 0


def _planned_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, options: RankOptions, length: int
) -> int:
    with _private_interface():
        from dwdp.serving.rank_server.kv_cache import plan_kv_cache
    return plan_kv_cache(config.get_text_config(), dtype, options, length).num_bytes


def _continuous(model: PreTrainedModel, options: RankOptions, length: int) -> Backend:
    with _private_interface():
        from dwdp.serving.rank_server.continuous import ContinuousBackend
    return ContinuousBackend(model, options, length)


@contextmanager
def _private_interface() -> Iterator[None]:
    """Continuous batching builds on more of Transformers than its public interface."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedModel(f"this Transformers does not have what it needs: {error}") from error


def _refusal(config: PreTrainedConfig, error: UnsupportedModel) -> UnsupportedModel:
    return UnsupportedModel(
        f"Transformers cannot batch {config.model_type} continuously ({error}); use --batching plain"
    )


def max_sequence_length(config: PreTrainedConfig, options: RankOptions) -> int:
    """Tokens of a prompt and its answer together.

    Raises:
        ValueError: more than the model has positions for.
    """
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if options.max_sequence_length is None:
        return min(positions or DEFAULT_MAX_SEQUENCE_LENGTH, DEFAULT_MAX_SEQUENCE_LENGTH)
    if positions is not None and options.max_sequence_length > positions:
        raise ValueError(
            f"max_sequence_length is {options.max_sequence_length}, but the model has {positions} positions"
        )
    return options.max_sequence_length
