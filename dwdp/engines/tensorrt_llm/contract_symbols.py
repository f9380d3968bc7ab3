"""The contract's lines. :mod:`dwdp.engines.tensorrt_llm.contract` says how they are compared.

Every line was read in 1.3.0rc3, and the tests run with it. How each fits other versions, as far as their
sources were read, is in :mod:`dwdp.engines.tensorrt_llm.contract_readings`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dwdp.engines.tensorrt_llm.formats import FORMATS

TESTED_VERSION = "1.3.0rc3"


@dataclass(frozen=True)
class Symbol:
    """One thing that dwdp relies on.

    Attributes:
        module: below ``tensorrt_llm``.
        attribute: of the module, or ``Class.member``; inherited members count.
        shape: a signature (``...`` for parameters that do not matter, ``=`` for those that need a default),
            ``class``, ``member``, ``global`` or ``absent``. `` of Class`` says which class defines a member.
        why: what dwdp does with it.
        later_names: what other versions call it, where any of the names serves dwdp as well.
    """

    module: str
    attribute: str
    shape: str
    why: str
    later_names: tuple[str, ...] = ()


def _members(module: str, owner: str, names: str, why: str) -> tuple[Symbol, ...]:
    return tuple(Symbol(module, f"{owner}.{name}", "member", why) for name in names.split())


_COMMAND_LINE = (
    Symbol("commands.serve", "serve", "(model, ...)", "gets options"),
    Symbol(
        "commands.serve",
        "help_info_with_stability_tag",
        "global",
        "called with (text, tag) for the help of an option",
    ),
    Symbol(
        "commands.serve",
        "get_llm_args",
        "(model, ..., **llm_args_extra_dict)",
        "its result gets what the options say",
    ),
    Symbol(
        "commands.serve",
        "update_llm_args_with_extra_dict",
        "global",
        "looked up at call time; dwdp_config of a YAML file is merged with the options",
    ),
    Symbol(
        "commands.serve",
        "launch_server",
        "(host, port, llm_args, ..., metadata_server_cfg=, server_role=, disagg_cluster_config=, ...)",
        "looked up at call time; starts a group instead of one server",
    ),
    Symbol(
        "commands.serve",
        "launch_grpc_server",
        "(host, port, llm_args, ...)",
        "looked up at call time; refused for a group",
    ),
    Symbol(
        "commands.serve",
        "OpenAIServer",
        "global",
        "looked up at call time; its server gets a route with the rank's statistics",
    ),
    *_members(
        "commands.serve",
        "DisaggLauncherEnvs",
        "TLLM_DISAGG_INSTANCE_IDX",
        "the environment variable that says which server of its file a process is",
    ),
)

_ARGUMENTS = (
    Symbol("llmapi.llm_args", "TorchLlmArgs", "class", "gets the fields parallel and dwdp_config"),
    Symbol("llmapi.llm_args", "TorchLlmArgs.parallel", "absent", "the field's name is free"),
    Symbol("llmapi.llm_args", "Field", "(default=, *, status=, ...)", "makes the fields"),
    Symbol(
        "llmapi.llm_args",
        "update_llm_args_with_extra_dict",
        "(llm_args, llm_args_dict, ...)",
        "what commands.serve imports",
    ),
    *_members(
        "llmapi.llm_args",
        "TorchLlmArgs",
        "backend tensor_parallel_size pipeline_parallel_size context_parallel_size "
        "moe_tensor_parallel_size moe_expert_parallel_size moe_cluster_parallel_size "
        "enable_attention_dp enable_lm_head_tp_in_adp moe_config enable_lora lora_config "
        "orchestrator_type ray_worker_extension_cls ray_placement_config "
        "torch_compile_config enable_min_latency mm_encoder_only load_format",
        "refused where it conflicts with DWDP",
    ),
    Symbol(
        "llmapi.llm_args",
        "TorchLlmArgs.enable_sleep",
        "member",
        "refused: peers read a sleeping rank's memory",
        ("TorchLlmArgs.sleep_config",),
    ),
    *_members(
        "llmapi.llm_args",
        "MoeConfig",
        "backend load_balancer",
        "refused where it conflicts with DWDP",
    ),
    Symbol(
        "llmapi.llm_args",
        "MoeConfig.max_num_tokens",
        "member",
        "where it is given, the limit of DEEPGEMM's workspace is the user's",
    ),
    *_members(
        "llmapi.llm_args",
        "TorchCompileConfig",
        "enable_piecewise_cuda_graph max_num_streams",
        "refused where it conflicts with DWDP",
    ),
    Symbol("lora_helper", "LoraConfig.lora_target_modules", "member", "refused for experts"),
    *_members(
        "llmapi.llm_args",
        "TorchLlmArgs",
        "cuda_graph_config",
        "turned off where the fabric cannot be captured in a graph",
    ),
    *_members("llmapi.llm_args", "TorchLlmArgs", "env_overrides", "carries the rank to the worker"),
    *_members("llmapi.llm_args", "LoadFormat", "AUTO", "the only load format that is not refused"),
    Symbol("llmapi.llm", "LLM", "class", "asked for parallel='dwdp'"),
    Symbol("llmapi.llm", "BaseLLM.__init__", "(self, model, ..., **kwargs)", "checks the fields"),
    Symbol("logger", "logger", "global", "dwdp's messages"),
)

_EXECUTOR = (
    Symbol(
        "executor.executor",
        "GenerationExecutor.create",
        "(engine, ..., llm_args=, ...)",
        "wrapped: one executor for the whole group",
    ),
    Symbol(
        "executor.executor",
        "GenerationExecutor.__init__",
        "(self, num_postprocess_workers=, postprocess_tokenizer_dir=, is_llm_executor=)",
        "the base of the group's executor",
    ),
    Symbol("executor.executor", "GenerationExecutor.submit", "(self, request)", "overridden"),
    Symbol("executor.executor", "GenerationExecutor.shutdown", "(self)", "overridden"),
    Symbol(
        "executor.executor",
        "GenerationExecutor._get_next_client_id",
        "(self)",
        "numbers the requests of all ranks",
    ),
    Symbol(
        "executor.executor",
        "GenerationExecutor._maybe_initialize_iteration_results",
        "(self)",
        "called before statistics are read",
    ),
    *_members(
        "executor.executor",
        "GenerationExecutor",
        "_iter_stats_result _iter_kv_events_result doing_shutdown",
        "the group's own",
    ),
    Symbol(
        "executor.proxy",
        "GenerationExecutorProxy.__init__",
        "(self, worker_kwargs, ..., mpi_session=, *, ..., postproc_worker_config=, is_llm_executor=)",
        "one per rank, with a session of dwdp's",
    ),
    *(
        Symbol("executor.proxy", f"GenerationExecutorProxy.{method}", shape, "called for a rank")
        for method, shape in (
            ("submit", "(self, request)"),
            ("abort_request", "(self, request_id)"),
            ("pre_shutdown", "(self)"),
            ("shutdown", "(self)"),
            ("get_stats", "(self, timeout)"),
            ("get_kv_events", "(self, timeout)"),
        )
    ),
    *_members(
        "executor.proxy",
        "GenerationExecutorProxy",
        "_results _error_queue mpi_futures request_queue result_queue dispatch_result_thread "
        "doing_shutdown enable_postprocess_parallel mpi_session",
        "read where a rank has died",
    ),
    Symbol(
        "executor.ipc",
        "FusedIpcQueue.__init__",
        "(self, address=, *, is_server, ...)",
        "answers for a worker that has died",
    ),
    Symbol("executor.ipc", "FusedIpcQueue.put", "(self, obj, ...)", "sends the answer"),
    Symbol("executor.ipc", "FusedIpcQueue.close", "(self)", "ends it"),
    *_members(
        "executor.utils",
        "ErrorResponse",
        "client_id error_msg request_id",
        "the answer for a worker that has died",
    ),
    *_members(
        "executor.result", "GenerationResult", "prompt_token_ids sampling_params", "a rank's load"
    ),
    *_members("executor.request", "GenerationRequest", "id", "a rank's load"),
    Symbol(
        "executor.worker",
        "GenerationExecutorWorker.shutdown",
        "(self)",
        "wrapped: ends the worker's session",
    ),
    Symbol(
        "executor.base_worker", "BaseWorker.shutdown", "(self)", "wrapped: ends an RPC worker's"
    ),
    Symbol("executor.base_worker", "BaseWorker.llm_args", "member", "read by the session"),
    Symbol(
        "llmapi.utils",
        "get_numa_aware_cpu_affinity",
        "(device_id)",
        "wrapped: NVML counts all GPUs, CUDA the visible ones",
    ),
    Symbol("executor.base_worker", "get_numa_aware_cpu_affinity", "global", "who imports it"),
    Symbol(
        "_torch.pyexecutor.model_loader",
        "ModelLoader.load",
        "(self, checkpoint_dir, checkpoint_loader)",
        "wrapped: shares the experts before the KV cache is sized",
    ),
    Symbol(
        "_torch.pyexecutor.model_loader",
        "ModelLoader.reload",
        "(self, model, weights, ...)",
        "wrapped: refused for a shared model",
    ),
    Symbol(
        "_torch.pyexecutor.model_loader", "ModelLoader.llm_args", "member", "read by the session"
    ),
)

_MOE = "_torch.modules.fused_moe"
_LAYER = f"{_MOE}.interface"

_FORWARD = (
    Symbol(
        _LAYER,
        "MoE.run_moe",
        "(self, x, token_selected_experts, token_final_scales, ...)",
        "wrapped on instances: waits for the layer's experts",
    ),
    Symbol(
        _LAYER,
        "MoE.forward_impl",
        "(self, x, router_logits, *, ...)",
        "wrapped on instances: releases the layer's experts",
    ),
    Symbol(_LAYER, "MoE.forward", "(self, x, router_logits, ...)", "calls forward_impl"),
    Symbol(
        _LAYER,
        "MoE.register_to_config",
        "member",
        "false for layers that torch.compile would trace, which are refused",
    ),
    Symbol(
        _LAYER,
        "MoE._supports_load_balancer",
        "(self)",
        "replaced on instances, so that routing comes before the kernel",
    ),
    Symbol(
        f"{_MOE}.configurable_moe",
        "ConfigurableMoE.forward_impl",
        "(self, x, router_logits, *, ...)",
        "wrapped on instances",
    ),
    Symbol(
        f"{_MOE}.configurable_moe",
        "ConfigurableMoE._forward_chunk_impl",
        "(self, x, router_logits, ...)",
        "calls the backend's run_moe",
    ),
    Symbol(
        f"{_MOE}.fused_moe_vanilla",
        "VanillaMoE.forward",
        "(self, x, router_logits, ...)",
        "wrapped on instances",
    ),
    Symbol(
        f"{_MOE}.fused_moe_vanilla",
        "VanillaMoE.run_experts",
        "(self, input, expanded_inputs, expanded_scales, sorted_experts, batch_indices)",
        "wrapped on instances",
    ),
)

_CREATE_AND_LOAD = (
    ("create_weights", "(self)"),
    ("load_weights", "(self, weights, allow_partial_loading=)"),
)

_WEIGHTS = (
    *_members(
        _LAYER,
        "MoE",
        "ep_size tp_size cluster_size parallel_size num_experts layer_load_balancer "
        "weight_loading_mode",
        "read: what a backend was made for",
    ),
    *_members(
        _LAYER,
        "MoE",
        "expert_size_per_partition initial_local_expert_ids",
        "narrowed to the resident experts while they are created and loaded",
    ),
    *_members(
        _LAYER,
        "MoEWeightLoadingMode",
        "VANILLA FUSED_GATE_UP_PROJ W4A8_CUSTOM",
        "says how the checkpoint is laid out",
    ),
    Symbol(f"{_MOE}.configurable_moe", "ConfigurableMoE.backend", "member", "has the parameters"),
    Symbol(f"{_MOE}.configurable_moe", "ConfigurableMoE.create_weights", "(self)", "calls it"),
    *_members(
        f"{_MOE}.configurable_moe",
        "ConfigurableMoE",
        "moe_max_num_tokens aux_stream",
        "set, so that DEEPGEMM's workspace for all experts is no larger than one for the share",
    ),
    *(
        Symbol(f"{_MOE}.{module}", f"{backend}.{method}", shape, "wrapped: resident experts only")
        for module, backend in (
            ("fused_moe_cutlass", "CutlassFusedMoE"),
            ("fused_moe_trtllm_gen", "TRTLLMGenFusedMoE"),
            ("fused_moe_triton", "TritonFusedMoE"),
            ("fused_moe_vanilla", "VanillaMoE"),
        )
        for method, shape in _CREATE_AND_LOAD
    ),
    Symbol(
        f"{_MOE}.fused_moe_vanilla",
        "VanillaMoE.create_experts",
        "(self, module_list=)",
        "called with the resident experts",
    ),
    *(
        Symbol(
            f"{_MOE}.{module}",
            f"{backend}.{method}",
            f"{shape} of CutlassFusedMoE",
            "inherited: what is wrapped in Cutlass",
        )
        for module, backend in (
            ("fused_moe_cute_dsl", "CuteDslFusedMoE"),
            ("fused_moe_deepgemm", "DeepGemmFusedMoE"),
        )
        for method, shape in _CREATE_AND_LOAD
    ),
    *(
        Symbol(
            f"{_MOE}.{'fused_moe_triton' if name.startswith('Triton') else 'quantization'}",
            name,
            "class",
            "a quantisation method whose parameters dwdp knows",
        )
        for name in FORMATS
    ),
    Symbol(f"{_MOE}.fused_moe_wide_ep", "WideEPMoE.__init__", "(self, *, ...)", "wrapped: refused"),
    Symbol(
        f"{_MOE}.routing", "BaseMoeRoutingMethod.experts_per_token", "member", "top-k of the layer"
    ),
    Symbol(
        "_torch.models.checkpoints.hf.weight_loader",
        "HfWeightLoader.prefetch_files",
        "(self, file_names)",
        "wrapped: reads what the rank needs",
    ),
)

SYMBOLS: tuple[Symbol, ...] = (*_COMMAND_LINE, *_ARGUMENTS, *_EXECUTOR, *_FORWARD, *_WEIGHTS)
