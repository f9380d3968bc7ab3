"""How much of the contract public sources of other TensorRT-LLM versions fit, as far as they were read.

Only the tested version was read as a whole. Of NVIDIA/TensorRT-LLM single files were read, each of a known
commit that belongs to no release: a reading says which commit, and by what its text is known to be older or
newer than the tested version. The comparison is the contract's own; the signatures that were found are
recorded in ``tests/tensorrt_llm/recorded``. None of this decides whether dwdp patches a TensorRT-LLM: that
is done by reading the one that is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dwdp.engines.tensorrt_llm.contract_symbols import SYMBOLS, TESTED_VERSION, Symbol

FITS = "fits"
NOT_READ = "not read"


@dataclass(frozen=True)
class Reading:
    """One module as a commit of NVIDIA/TensorRT-LLM has it.

    Attributes:
        module: below ``tensorrt_llm``.
        commit: of the file that was read.
        known_by: what shows that it is older, or newer, than the tested version.
        moved: symbols that do not fit, and what is there instead.
        not_read: symbols that a class inherits from a file that was not read.
    """

    module: str
    commit: str
    known_by: str
    moved: Mapping[str, str] = field(default_factory=dict)
    not_read: tuple[str, ...] = ()


@dataclass(frozen=True)
class Era:
    """What was read of the versions on one side of the tested one.

    Attributes:
        name: of the recording of the signatures that were found.
        versions: which these are, for a user.
        outcome: what becomes of a version of this era, and why.
        readings: one per module that was read.
    """

    name: str
    versions: str
    outcome: str
    readings: tuple[Reading, ...]

    def mark(self, symbol: Symbol) -> str:
        """``"fits"``, ``"not read"``, or what is there instead of the symbol."""
        for reading in self.readings:
            if reading.module == symbol.module and symbol.attribute not in reading.not_read:
                return reading.moved.get(symbol.attribute, FITS)
        return NOT_READ

    def summary(self) -> str:
        """How many lines of the contract fit, and what becomes of these versions."""
        marks = [self.mark(symbol) for symbol in SYMBOLS]
        num_read = len(marks) - marks.count(NOT_READ)
        return (
            f"{self.versions}: {num_read} of {len(marks)} symbols were read in public sources, "
            f"{marks.count(FITS)} of them fit. {self.outcome}"
        )


_MOE = "_torch.modules.fused_moe"
_OLD_STATISTICS = "statistics come by a queue, not by RPC"
_NEW_MOE = "can_implement takes a problem and a deployment (pull request 17532, August 2026)"

OLDER = Era(
    "older",
    f"Before {TESTED_VERSION}",
    "1.2.1 and older versions are refused: launch_grpc_server of commands.serve came with 1.3.",
    (
        Reading(
            "commands.serve",
            "4c05a74891e4df8066f08ed4ce14b0972abe4e25",
            "there is no option --grpc, which came with 1.3 (pull request 11037, January 2026)",
            {
                "help_info_with_stability_tag": "missing: options say help= themselves",
                "launch_grpc_server": "missing: there is no gRPC server",
            },
        ),
        Reading(
            "executor.executor",
            "ed53795b33fc139493f762a1c6c53f691cf52d38",
            "generate_async has no trace_headers",
        ),
        Reading("executor.proxy", "b93e14ca093e446615f3009cae6ca5a33c4f2f56", _OLD_STATISTICS),
        Reading("executor.worker", "cc4777e94ddab84b0e2676f1dbcc91b86060329f", _OLD_STATISTICS),
        Reading("executor.utils", "7b437aaa73bf5a44b1102aee5c631074da763b8f", _OLD_STATISTICS),
        Reading(
            "executor.request",
            "4ce835a571f85cc37dcffb7268b3a4c014039ce6",
            "a request has no trace_headers",
        ),
        Reading(
            "_torch.models.checkpoints.hf.weight_loader",
            "149b221391edea2c3ef09390083aa4805e2461a2",
            "load_weights has no mapping",
        ),
    ),
)

NEWER = Era(
    "newer",
    f"After {TESTED_VERSION}",
    "Sources of August 2026 and later are refused, so 1.4.0rc1 is expected to be: commands.serve, the "
    "MoE layers and executor.base_worker are not what dwdp patches.",
    (
        Reading(
            "commands.serve",
            "44373a31ee62ab48501d4d14dc2b6ec7f71df403",
            "there is an option --grpc-protocol (as in pull request 17221, August 2026)",
            {
                "help_info_with_stability_tag": "missing: _serve_stability.stability_option",
                "launch_grpc_server": "missing: imported where it is called, from "
                "tensorrt_llm.grpc.smg.server or tensorrt_llm.grpc.openengine.server",
            },
        ),
        Reading(
            "llmapi.llm_args",
            "c55c1ae6af2e9c20a70ac936640d6a1126afa489",
            "TorchLlmArgs has dwdp_config (pull request 12136, March 2026), and sleep_config",
        ),
        Reading(
            "executor.proxy",
            "a67b04ab6aa2a8e814c4a02e192f1152c90a1209",
            "pending requests end in EngineDeadError",
            not_read=(
                "GenerationExecutorProxy._error_queue",
                "GenerationExecutorProxy.enable_postprocess_parallel",
            ),
        ),
        Reading(
            "executor.worker",
            "a67b04ab6aa2a8e814c4a02e192f1152c90a1209",
            "the commit of executor.proxy",
        ),
        Reading(
            "executor.base_worker",
            "c6fb6ac3ae5626eee188dd2d6467e7581c06bd53",
            "setup_engine passes checkpoint_io_policy",
            {"get_numa_aware_cpu_affinity": "missing: llmapi.utils.configure_cpu_affinity"},
        ),
        Reading(
            "executor.utils",
            "c55c1ae6af2e9c20a70ac936640d6a1126afa489",
            "the commit of llmapi.llm_args; it has EngineDeadError",
        ),
        Reading(
            "executor.request",
            "1382841d013f2934883aa2e24a5269e9f5f8d7fd",
            "a request has a priority",
        ),
        Reading(
            "_torch.pyexecutor.model_loader",
            "47a1b1fd6992401328dcfb51d4d1df2cca5e7ff3",
            "ModelLoader takes model_weights_restore_mode",
        ),
        Reading(
            f"{_MOE}.interface",
            "05e459806a980fd03b91aa242b8c8c5b87d159c1",
            _NEW_MOE,
            {"MoE.run_moe": "(self, ctx, *, workspace=)"},
        ),
        Reading(
            f"{_MOE}.configurable_moe",
            "eebc0563a94032d2c1202b6d043c3db34ecdf91d",
            _NEW_MOE,
            {"ConfigurableMoE._forward_chunk_impl": "missing: chunks are moe_scheduler's"},
        ),
        Reading(f"{_MOE}.fused_moe_cutlass", "05e459806a980fd03b91aa242b8c8c5b87d159c1", _NEW_MOE),
        Reading(
            f"{_MOE}.fused_moe_trtllm_gen", "05e459806a980fd03b91aa242b8c8c5b87d159c1", _NEW_MOE
        ),
        Reading(
            f"{_MOE}.fused_moe_deepgemm",
            "eebc0563a94032d2c1202b6d043c3db34ecdf91d",
            _NEW_MOE,
            {
                "DeepGemmFusedMoE.create_weights": "(self) of MoEWeightOwnerMixin",
                "DeepGemmFusedMoE.load_weights": "(self, weights, allow_partial_loading=) "
                "of MoEWeightOwnerMixin",
            },
        ),
    ),
)

ERAS = (OLDER, NEWER)
