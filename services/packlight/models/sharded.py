"""A model divided among processes, by the tensor-parallel plan that transformers has for its family.

Each rank gets a slice of every matrix: q, k, v and the MLP's first products by output, so attention sees the rank's own
heads; what follows them by input, so that a sum over all ranks ends each half of a layer. Embedding and head are
divided by token; logits come out whole everywhere.

Knows transformers and the process's default group. Does not know what is done in the other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh

from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.adapter import TransformersModel, load_transformers_model
from packlight.models.folder import ModelFolder


def load_sharded_model(
    folder: ModelFolder,
    spec: ModelSpec,
    *,
    device: torch.device,
    num_ranks: int,
    meet: Callable[[str], None],
    on_progress: Callable[[str], None],
) -> TransformersModel:
    """This rank's share of the model in `folder`. `spec` is the whole model's, and stays its `spec`.

    The checkpoint is read whole into the host's memory, then divided. `meet` is called in between, because one rank may
    read much faster than another. Raises ModelError where transformers has no plan that divides attention by head."""

    def divide(model: Any) -> Any:
        meet("read")
        return _divide(model, device.type, num_ranks)

    return load_transformers_model(
        folder, spec, device=str(device), on_progress=on_progress, num_ranks=num_ranks, divide=divide
    )


def _divide(model: Any, device_type: str, num_ranks: int) -> Any:
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        raise ModelError(
            f"transformers {transformers.__version__} cannot divide a model that is loaded; 5.23 can"
        ) from None
    _untie(model)
    mesh = init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("tp",))
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=num_ranks))
    return apply_tensor_parallelism(model, mesh, plan)


def _untie(model: Any) -> None:
    """A head that is the embedding is divided as what it is: the plan finds parameters by name, each once."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.data, requires_grad=False)
