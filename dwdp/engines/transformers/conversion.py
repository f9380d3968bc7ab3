"""The conversion of checkpoint tensors into parameters, one expert at a time.

Transformers stores a layer's experts stacked, ``[num_experts, ...]``, while most checkpoints store every
expert on its own. Its loading collects all experts' tensors of a parameter, stacks them and applies the
rest of a chain of operations. Here the same operations run on one expert alone, ``[1, ...]``: the result
is the same bit for bit as long as none of them mixes experts, which is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dwdp.engines.transformers.checkpoint import CheckpointError, LazyTensor
from dwdp.engines.transformers.contract import internals
from dwdp.engines.transformers.experts import ExpertTensor, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Conversion:
    """Checkpoint tensors that together become one parameter (or several, for a converter that splits).

    Attributes:
        target: the parameter's name; with several, the one the checkpoint keys are renamed to.
        converter: Transformers' WeightConverter, or None where the tensor is only renamed.
        sources: tensors per source pattern, in the order Transformers stacks them.
    """

    target: str
    converter: Any
    sources: dict[str, list[LazyTensor]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [tensor.key for tensors in self.sources.values() for tensor in tensors]

    @property
    def stacks(self) -> bool:
        """Whether the checkpoint stores every expert on its own."""
        return self.converter is not None and any(
            isinstance(operation, internals().MergeModulelist)
            for operation in self.converter.operations
        )

    def apply(
        self, model: Any, inputs: Mapping[str, Sequence[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The converter's outputs by parameter name, for ``inputs`` in place of ``sources``."""
        if self.converter is None:
            ((tensor,),) = inputs.values()
            return {self.target: tensor}
        for pattern, tensors in inputs.items():
            for tensor in tensors:
                # The key is kept for saving only, which a sharded model cannot do.
                self.converter.add_tensor(self.target, self.target, pattern, tensor)
        try:
            outputs = self.converter.convert(self.target, model=model, config=model.config)
        except Exception as error:
            raise CheckpointError(
                f"{self.keys[0]} and {len(self.keys) - 1} other tensors do not convert into "
                f"{self.target}: {error}"
            ) from error
        return {name: out[0] if isinstance(out, list) else out for name, out in outputs.items()}


class ExpertConversion:
    """Reads single experts of one parameter, or of the parameters one converter gives.

    Raises:
        CheckpointError: an expert is missing, or shapes do not fit the model.
        UnsupportedModelError: the conversion mixes experts.
    """

    def __init__(
        self, model: PreTrainedModel, conversion: Conversion, tensors: Mapping[str, ExpertTensor]
    ) -> None:
        self._conversion = conversion
        self._num_experts = tensors[conversion.target].num_experts
        self._model = _OneExpertModel(model, tensors)
        self._check_sources()
        self._check_operations(tensors[conversion.target])
        metas = {
            pattern: [self._one_expert_meta(sources[0])]
            for pattern, sources in conversion.sources.items()
        }
        outputs = conversion.apply(self._model, metas)
        path = tensors[conversion.target].module_path
        others = [
            name for name in outputs if name not in tensors or tensors[name].module_path != path
        ]
        if others:
            raise UnsupportedModelError(
                f"{conversion.keys[0]} becomes both {conversion.target} and {others[0]}: experts stored "
                "together with other weights cannot be shared out"
            )
        self.tensors = tuple(tensors[name] for name in outputs)
        for tensor in self.tensors:
            found = tuple(outputs[tensor.full_name].shape)
            if found != (1, *tensor.expert_shape):
                raise CheckpointError(
                    f"{conversion.keys[0]}: one expert of {tensor.full_name} would be "
                    f"{list(found[1:])}, but config.json makes it {list(tensor.expert_shape)}"
                )
        expert_ndim = len(tensors[conversion.target].expert_shape)
        self._concatenated_dim = self._find_concatenated_dim(1 + expert_ndim)

    def read(self, expert: int, destinations: Mapping[str, torch.Tensor]) -> None:
        """Read ``expert`` into ``destinations``: per parameter name, a tensor of one expert's shape."""
        conversion = self._conversion
        if self._concatenated_dim is not None:
            self._read_parts(expert, destinations[conversion.target], self._concatenated_dim)
            return
        # Cast before converting, as Transformers does; no operation changes values.
        dtype = destinations[conversion.target].dtype
        inputs = {
            pattern: [self._read_one(sources, expert).to(dtype)]
            for pattern, sources in conversion.sources.items()
        }
        outputs = conversion.apply(self._model, inputs)
        for name, destination in destinations.items():
            destination.copy_(outputs[name].reshape(destination.shape))

    def _read_parts(self, expert: int, destination: torch.Tensor, dim: int) -> None:
        """Read what is only moved, without a copy on the way where the destination allows it."""
        begin = 0
        for sources in self._ordered_sources():
            source = sources[expert] if self._conversion.stacks else sources[0]
            shape = source.shape if self._conversion.stacks else source.shape[1:]
            size = shape[dim] if shape else 0
            # A scalar has no dimension to be cut along, nor anything to share it with.
            part = destination.narrow(dim, begin, size) if shape else destination
            start = 0 if self._conversion.stacks else expert * part.numel()
            if part.device.type == "cpu" and part.dtype == source.dtype and part.is_contiguous():
                source.read_elements(part, start)
            else:
                scratch = torch.empty(shape, dtype=source.dtype)
                source.read_elements(scratch, start)
                part.copy_(scratch)
            begin += size

    def _read_one(self, sources: Sequence[LazyTensor], expert: int) -> torch.Tensor:
        if self._conversion.stacks:
            return sources[expert][...]
        return sources[0].read_rows(expert, expert + 1)

    def _ordered_sources(self) -> list[list[LazyTensor]]:
        converter = self._conversion.converter
        if converter is None:
            return list(self._conversion.sources.values())
        return [self._conversion.sources[pattern] for pattern in converter.source_patterns]

    def _find_concatenated_dim(self, ndim: int) -> int | None:
        """The dimension of one expert along which its sources lie side by side, each as it is.

        None when anything more happens to them than that.
        """
        hf = internals()
        converter = self._conversion.converter
        operations = [] if converter is None else converter.operations
        remaining = [op for op in operations if type(op) is not hf.MergeModulelist]
        if not remaining and len(self._conversion.sources) == 1:
            return 0
        if len(remaining) == 1 and type(remaining[0]) is hf.Concatenate:
            return remaining[0].dim % ndim - 1
        return None

    def _one_expert_meta(self, source: LazyTensor) -> torch.Tensor:
        shape = source.shape if self._conversion.stacks else (1, *source.shape[1:])
        return torch.empty(shape, dtype=source.dtype, device="meta")

    def _check_sources(self) -> None:
        conversion, num_experts = self._conversion, self._num_experts
        for pattern in [] if conversion.converter is None else conversion.converter.source_patterns:
            if pattern not in conversion.sources:
                raise CheckpointError(
                    f"the checkpoint has {conversion.keys[0]} but nothing that matches {pattern}, "
                    f"which {conversion.target} needs too"
                )
        for sources in conversion.sources.values():
            if conversion.stacks:
                _check_every_expert(sources, num_experts)
            elif len(sources) != 1:
                raise CheckpointError(
                    f"{sources[0].key} and {sources[1].key} both become {conversion.target}"
                )
            elif sources[0].shape[:1] != (num_experts,):
                raise CheckpointError(
                    f"{sources[0].key} is {list(sources[0].shape)}: its first dimension should be the "
                    f"{num_experts} experts of config.json"
                )

    def _check_operations(self, tensor: ExpertTensor) -> None:
        operations = (
            [] if self._conversion.converter is None else self._conversion.converter.operations
        )
        ndim = 1 + len(tensor.expert_shape)
        for number, operation in enumerate(operations):
            if not _keeps_experts_apart(operation, ndim, is_first=number == 0):
                raise UnsupportedModelError(
                    f"{self._conversion.keys[0]} is converted by {operation}, which is not known to "
                    "keep experts apart, so that a rank could convert its own experts only"
                )


def _check_every_expert(sources: Sequence[LazyTensor], num_experts: int) -> None:
    """Check that ``sources`` are experts 0 to ``num_experts`` - 1 of one layer, all of one shape."""
    ids = [_expert_id(source.key) for source in sources]
    if ids != list(range(num_experts)):
        absent = sorted(set(range(num_experts)) - {i for i in ids if i is not None})
        what = f"expert {absent[0]} is missing" if absent else f"{len(ids)} experts are there"
        raise CheckpointError(
            f"config.json has {num_experts} experts, but of those stored like {sources[0].key} {what}"
        )
    for source in sources:
        if source.shape != sources[0].shape or source.dtype != sources[0].dtype:
            raise CheckpointError(
                f"{source.key} is {list(source.shape)} {source.dtype}, unlike {sources[0].key}, which "
                f"is {list(sources[0].shape)} {sources[0].dtype}"
            )


def _expert_id(key: str) -> int | None:
    return next((int(part) for part in reversed(key.split(".")) if part.isdigit()), None)


def _keeps_experts_apart(operation: Any, ndim: int, *, is_first: bool) -> bool:
    """Whether ``operation`` treats every expert of a ``[num_experts, ...]`` tensor alike and alone."""
    hf = internals()
    if isinstance(operation, hf.MergeModulelist):
        return is_first and operation.dim == 0
    if isinstance(operation, (hf.Concatenate, hf.Chunk)):
        return operation.num_shards_attribute is None and operation.dim % ndim != 0
    if isinstance(operation, hf.Interleave):
        return operation.dim % ndim != 0
    if isinstance(operation, hf.Transpose):
        return operation.dim0 % ndim != 0 and operation.dim1 % ndim != 0
    return False


class _OneExpertModel:
    """Stands in for the model while one expert is converted: its expert tensors are ``[1, ...]``.

    Some operations look at the shape of the parameter they are about to give.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, ExpertTensor]) -> None:
        self._tensors = tensors
        self.config = model.config

    def get_parameter(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return torch.empty((1, *tensor.expert_shape), dtype=tensor.dtype, device="meta")
