"""All that a training leaves on a rank, to be compared with what it leaves when a callback watches."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from truestep_fixtures.topologies import read_parameters
from truestep_fixtures.training import Attach, train

from truestep_spec_tests.runs import Setup, same_bits


class OptimizerProbe(TrainerCallback):
    """Gets hold of the training's model and optimizer, the latter without its wrappers."""

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer: torch.optim.Optimizer = optimizer
        self.model = model

    def tensors(self) -> list[Tensor]:
        """This rank's part of what the optimizer steps, under ZeRO its master copies, and of its moments."""
        partitioned = [parameter for parameter in self.model.parameters() if hasattr(parameter, "ds_tensor")]
        if partitioned:
            return [tensor for parameter in partitioned if parameter.requires_grad for tensor in _of_zero3(parameter)]
        tensors = [tensor for key, moments in self.optimizer.state.items() for tensor in (key, *moments.values())]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return [tensor.detach().clone() for tensor in local]


def _of_zero3(parameter: Any) -> list[Tensor]:
    """A parameter's part of the optimizer under ZeRO-3, without the padding, which is uninitialised memory."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    masters = safe_get_local_fp32_param(parameter)
    moments = [safe_get_local_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")]
    start = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.numel()
    owned = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))
    return [tensor.flatten()[:owned].clone() for tensor in (masters, *moments)]


def state_after_training(
    setup: Setup, directory: Path, observers: Sequence[TrainerCallback] = (), attach: Attach | None = None
) -> dict[str, Any]:
    """Trains with some callbacks, and returns what is left on this rank."""
    probe = OptimizerProbe()
    result = train(
        setup.topology,
        setup.build_model(),
        output_dir=directory,
        callbacks=[*observers, probe],
        attach=attach,
        steps=setup.steps,
        dtype=setup.torch_dtype,
        seed=setup.seed,
        **setup.evaluation(),
        **({"save_strategy": "steps", "save_steps": 2} | setup.training),
    )
    python, numpy = random.getstate(), np.random.get_state()
    pytorch = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return {
        "optimizer": probe.tensors(),
        "weights": list(read_parameters(result.model).values()),
        "buffers": [buffer.clone() for buffer in result.model.buffers()],
        "random": [torch.tensor(python[1]), torch.tensor(numpy[1].tolist()), torch.tensor(numpy[2]), *pytorch],
    }


def assert_same_states(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> None:
    for rank, (expected_state, actual_state) in enumerate(zip(expected, actual, strict=True)):
        for what, tensors in expected_state.items():
            pairs = zip(tensors, actual_state[what], strict=True)
            assert all(same_bits(one, other) for one, other in pairs), f"{what} of rank {rank}"
