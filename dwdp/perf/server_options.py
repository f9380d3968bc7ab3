"""TensorRT-LLM's options of context and generation servers, as they go into YAML files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOKENS_PER_BLOCK = 32
"""TensorRT-LLM's default; the transfer buffer holds whole blocks."""


@dataclass(frozen=True)
class ServerSettings:
    """What context and generation servers have in common.

    Attributes:
        max_seq_len: the longest input and output together.
        moe_backend: of the routed experts; AUTO leaves the choice to TensorRT-LLM.
        kv_cache_dtype: of the KV cache; both sides need the same one.
        transfer_backend: of the KV cache on its way from prefill to generation.
        mtp_layers: multi-token prediction layers; 0: none.
    """

    max_seq_len: int
    moe_backend: str = "AUTO"
    kv_cache_dtype: str = "auto"
    transfer_backend: str = "DEFAULT"
    mtp_layers: int = 0

    def _common(self, max_batch_size: int, max_num_tokens: int, kv_share: float) -> dict[str, Any]:
        buffer_tokens = -(-self.max_seq_len // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
        options: dict[str, Any] = {
            "pipeline_parallel_size": 1,
            "max_batch_size": max_batch_size,
            "max_num_tokens": max_num_tokens,
            "max_seq_len": self.max_seq_len,
            "print_iter_log": True,
            "trust_remote_code": True,
            "kv_cache_config": {
                # Prompts are compared by length: none may be served from an earlier one's cache.
                "enable_block_reuse": False,
                "free_gpu_memory_fraction": kv_share,
                "dtype": self.kv_cache_dtype,
            },
            "moe_config": {"backend": self.moe_backend},
            "cache_transceiver_config": {
                "backend": self.transfer_backend,
                "max_tokens_in_buffer": buffer_tokens,
            },
        }
        if self.mtp_layers:
            options["speculative_config"] = {
                "decoding_type": "MTP",
                "num_nextn_predict_layers": self.mtp_layers,
            }
        return options

    def context(
        self,
        max_batch_size: int,
        max_num_tokens: int,
        kv_share: float,
        expert_parallel_size: int = 1,
        dwdp_config: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A context server: expert parallel over its ranks, or a replica that is a rank of a DWDP group.

        ``max_batch_size`` and ``max_num_tokens`` are per rank and forward, ``kv_share`` is of the memory left
        free by the weights. ``dwdp_config``: with TensorRT-LLM's keys; None: no DWDP.
        """
        options = {
            "tensor_parallel_size": expert_parallel_size,
            "moe_expert_parallel_size": expert_parallel_size,
            "enable_attention_dp": expert_parallel_size > 1,
            **self._common(max_batch_size, max_num_tokens, kv_share),
            "disable_overlap_scheduler": True,  # context-only requests need it
            "cuda_graph_config": None,
        }
        if dwdp_config is not None:
            options |= {"parallel": "dwdp", "dwdp_config": dwdp_config}
        return options

    def generation(
        self,
        max_batch_size: int,
        kv_share: float,
        expert_parallel_size: int,
        expert_slots: int = 0,
    ) -> dict[str, Any]:
        """A generation server: attention data parallel, experts shared out over its ranks.

        ``max_batch_size`` is per rank. ``expert_slots``: of TensorRT-LLM's expert load balancer; 0: none.
        """
        options = {
            "tensor_parallel_size": expert_parallel_size,
            "moe_expert_parallel_size": expert_parallel_size,
            "enable_attention_dp": expert_parallel_size > 1,
            **self._common(max_batch_size, max_batch_size * (1 + self.mtp_layers), kv_share),
            "cuda_graph_config": {"enable_padding": True, "max_batch_size": max_batch_size},
            "stream_interval": 20,
            "num_postprocess_workers": 4,
        }
        if expert_slots:
            options["moe_config"]["load_balancer"] = {
                "num_slots": expert_slots,
                "layer_updates_per_iter": 1,
            }
        return options
