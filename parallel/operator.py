"""One operator for everything that communicates inside the model, so that checkpointing can keep its outputs.

A non-reentrant checkpoint runs an autograd Function's forward again, collectives included; the outputs of an
operator of `torch.library` it can keep instead (`checkpoint_contexts`). An operator takes tensors and numbers
only: the operation itself is found by its number while somebody holds it.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts


class Operation:
    """A differentiable function that communicates. Its first output is the one that others differentiate.

    The outputs must hold all that the backward needs besides the inputs: after a checkpoint's recomputation
    `backward` is called on an operation whose `forward` did not run.
    """

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """The inputs' gradients."""
        raise NotImplementedError


_numbers = itertools.count()
_operations: "weakref.WeakValueDictionary[int, Operation]" = weakref.WeakValueDictionary()


def apply(operation: Operation, *inputs: Tensor) -> Tensor:
    """The operation's first output, differentiable."""
    number = next(_numbers)
    _operations[number] = operation
    return _operator(number, list(inputs))[0]


def checkpoint_contexts() -> Any:
    """For `torch.utils.checkpoint.checkpoint(context_fn=...)`: keeps what communicating operations computed."""
    return create_selective_checkpoint_contexts([torch.ops.nsa_dist.communicate.default])


@torch.library.custom_op("nsa_dist::communicate", mutates_args=())
def _operator(number: int, inputs: list[Tensor]) -> list[Tensor]:
    return _operations[number].forward(inputs)


def _setup(ctx: Any, inputs: tuple[int, list[Tensor]], output: list[Tensor]) -> None:
    number, tensors = inputs
    ctx.operation, ctx.count = _operations[number], len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[None, list[Tensor]]:
    saved = ctx.saved_tensors
    inputs, outputs = saved[: ctx.count], saved[ctx.count :]
    grad = grads[0] if grads[0] is not None else torch.zeros_like(outputs[0])
    found = ctx.operation.backward(inputs, outputs, grad)
    return None, [g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]


_operator.register_autograd(_backward, setup_context=_setup)
