"""From a ``quantization_config`` to the format of each kind of weight.

Checkpoints say what is quantised and list what is not, as names, globs or regular expressions. Each
kind of weight is asked for under the names that its modules have in Transformers' checkpoints.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dwdp.perf.model import Formats, WeightFormat

_IGNORE_KEYS = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")

_DTYPES: dict[str, WeightFormat] = {"float32": "fp32", "float16": "bf16", "bfloat16": "bf16"}


def formats_of(
    quantization: Mapping[str, Any], dtype: str, sparse_layer: int, dense_layer: int
) -> Formats:
    """The formats of a checkpoint whose unquantised weights are ``dtype``.

    Args:
        quantization: ``quantization_config``; empty where nothing is quantised.
        dtype: ``torch_dtype`` of the configuration.
        sparse_layer, dense_layer: indices of a layer with experts and of one without, to ask about.

    Raises:
        ValueError: a quantisation that is not known; the text names method and value.
    """
    plain = _DTYPES.get(dtype, "bf16")
    if not quantization:
        return Formats(plain, plain, plain, plain, plain, plain)
    quantised = _format(quantization)
    # MXFP4 checkpoints (gpt-oss) quantise experts only, whatever they list.
    experts_only = quantised == "mxfp4"
    patterns = list(_ignored(quantization))
    sparse, dense = f"model.layers.{sparse_layer}", f"model.layers.{dense_layer}"

    def of(*names: str) -> WeightFormat:
        is_expert = ".experts." in names[0]
        if any(_is_listed(name, patterns) for name in names) or (experts_only and not is_expert):
            return plain
        return quantised

    return Formats(
        attention=of(f"{sparse}.self_attn.q_b_proj", f"{sparse}.self_attn.q_proj"),
        o_proj=of(f"{sparse}.self_attn.o_proj"),
        shared=of(
            f"{sparse}.mlp.shared_experts.down_proj", f"{sparse}.mlp.shared_expert.down_proj"
        ),
        dense=of(f"{dense}.mlp.down_proj"),
        routed=of(f"{sparse}.mlp.experts.0.down_proj", f"{sparse}.block_sparse_moe.experts.0.w2"),
        lm_head=plain,
    )


def _ignored(quantization: Mapping[str, Any]) -> Iterator[str]:
    """What the checkpoint lists as not quantised."""
    for key in _IGNORE_KEYS:
        listed = quantization.get(key) or ()
        if not isinstance(listed, list | tuple):
            raise ValueError(f"quantization_config.{key}: {listed!r} is not a list.")
        for pattern in map(str, filter(None, listed)):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"quantization_config.{key}: {pattern!r}: {error}.") from error
            yield pattern


def kv_cache_bytes_of(quantization: Mapping[str, Any]) -> float:
    """Bytes of one KV-cache element.

    Raises:
        ValueError: a number of bits that no cache has.
    """
    scheme = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    if not scheme:
        return 2.0
    bits = scheme.get("num_bits", 8) if isinstance(scheme, Mapping) else 8
    if isinstance(scheme, str) and "4" in scheme:
        bits = 4
    if isinstance(bits, bool) or bits not in (4, 8, 16, 32):
        raise ValueError(
            f"quantization_config.kv_cache_scheme.num_bits: {bits!r} is none of 4, 8, 16, 32."
        )
    return float(bits) / 8


def _format(quantization: Mapping[str, Any]) -> WeightFormat:
    method = str(quantization.get("quant_method") or "modelopt").lower()
    algorithm = str(quantization.get("quant_algo") or "").lower()
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return "mxfp4"
    if method == "modelopt" or algorithm:
        for word, kind in _ALGORITHMS:
            if word in algorithm:
                return kind
        raise ValueError(f"quantization_config.quant_algo: {algorithm or 'missing'} is not known.")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    bits = quantization.get("bits") or quantization.get("w_bit")
    if bits is None and method == "bitsandbytes":
        bits = 4 if quantization.get("load_in_4bit") else 8
    if bits in (4, 8):
        return "int4" if bits == 4 else "int8"
    raise ValueError(f"quantization_config.quant_method: {method} with {bits} bits is not known.")


_ALGORITHMS: Sequence[tuple[str, WeightFormat]] = (
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("w4a16", "int4"),
    ("w4a8", "int4"),
    ("int4", "int4"),
    ("fp8", "fp8"),
    ("int8", "int8"),
)


def _compressed_tensors(quantization: Mapping[str, Any]) -> WeightFormat:
    groups = quantization.get("config_groups")
    weights = None
    if isinstance(groups, Mapping) and groups:
        group = next(iter(groups.values()))
        weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError("quantization_config.config_groups: no group says how weights are stored.")
    bits, kind = weights.get("num_bits"), weights.get("type")
    known: dict[tuple[Any, Any], WeightFormat] = {
        (4, "float"): "nvfp4" if weights.get("group_size") == 16 else "mxfp4",
        (8, "float"): "fp8",
        (8, "int"): "int8",
        (4, "int"): "int4",
    }
    if (bits, kind) not in known:
        raise ValueError(
            f"quantization_config.config_groups: {bits}-bit {kind} weights are not known."
        )
    return known[bits, kind]


def _is_listed(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module or one of its parents is named by a pattern."""
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif "*" in pattern or "?" in pattern:
            if any(fnmatch.fnmatchcase(parent, pattern) for parent in parents):
                return True
        elif pattern in parents or pattern in parts:
            return True
    return False
