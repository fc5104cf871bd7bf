"""A model divided among processes, by the tensor-parallel plan that transformers has for its family.

Each rank gets a slice of every matrix: q, k, v and the MLP's first products by output, so attention sees the rank's own
heads; what follows them by input, so that a sum over all ranks ends each half of a layer. Embedding and head are
divided by token; logits come out whole everywhere. A rank reads its slices of the checkpoint and nothing else.

Knows transformers and the process's default group. Does not know what is done in the other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh

from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.adapter import TransformersModel, load_transformers_model, model_class, read_model, undrawn_model
from packlight.models.dummy_tensors import DummyParameter
from packlight.models.folder import ModelFolder

# What transformers calls the ways in which a model can be divided; all but the last are of one part here.
_WAYS = ("pp", "dp_replicate", "fsdp", "tp")


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

    `meet` is called when the share is there, because one rank may read much faster than another. Raises ModelError
    where transformers has no plan that divides attention by head."""

    def make(folder: ModelFolder, spec: ModelSpec, _: str) -> Any:
        model = _read_share(folder, spec, device, num_ranks)
        meet("read")
        return model

    # A slice goes to the thread's current device before anybody says which.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return load_transformers_model(
            folder, spec, device=str(device), on_progress=on_progress, num_ranks=num_ranks, make=make
        )


def _read_share(folder: ModelFolder, spec: ModelSpec, device: torch.device, num_ranks: int) -> Any:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        raise ModelError(f"transformers {transformers.__version__} cannot divide a model; 5.23 can") from None
    divided = _on_own_mesh(model_class(folder), device, num_ranks)
    options = {"distributed_config": DistributedConfig(tp_size=num_ranks)}
    if not folder.is_dummy:
        return read_model(divided, folder.path, spec, **options)
    with torch.device("meta"):
        whole = undrawn_model(folder, spec)
    dtype = getattr(torch, spec.dtype)
    drawn = {name: DummyParameter(name, weight.shape, dtype, device) for name, weight in whole.named_parameters()}
    return read_model(divided, None, spec, config=whole.config, state_dict=drawn, **options)


def _on_own_mesh(found: Any, device: torch.device, num_ranks: int) -> Any:
    """`found`, over the ranks of the default group on `device`: left alone, transformers takes the best device that the
    machine has, by an index of its own, and cannot read to it without another package."""
    if not hasattr(found, "prepare_distribute_model"):
        raise ModelError(f"transformers {transformers.__version__} cannot divide a model; 5.23 can")
    from transformers.distributed.utils import TransformersDeviceMesh

    mesh = init_device_mesh(device.type, (1,) * (len(_WAYS) - 1) + (num_ranks,), mesh_dim_names=_WAYS)
    meshes = TransformersDeviceMesh(mesh, mesh)

    def prepare(_: Any, distributed_config: Any, device_map: Any = None) -> Any:
        return distributed_config, device_map, meshes

    # Of the same name, by which transformers finds what belongs to a class.
    return type(found.__name__, (found,), {"prepare_distribute_model": classmethod(prepare)})
