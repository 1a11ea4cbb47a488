"""The two teachers of PG-SB: the frozen one, and the LoRA teacher, which follows what the student draws."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class TeacherPair:
    """One network that is both: the LoRA teacher with its adapters, the frozen one without them. `network` is the LoRA teacher.

    rank 0: two networks, the LoRA teacher being a full copy, also called a fake score network.
    """

    def __init__(self, network: nn.Module, targets: tuple[str, ...], rank: int, scale: int):
        self.network, self._adapted, self._frozen = network, None, network
        if rank:
            self._adapted = with_lora(network, targets, rank, scale)
        else:
            network.requires_grad_(False)
            self.network = copy.deepcopy(network).requires_grad_(True)

    def set_attention(self, processor: object) -> None:
        """Sets the attention processor of both."""
        for network in (self.network, self._frozen):
            network.set_attn_processor(processor)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The frozen teacher, without gradients."""
        with torch.no_grad(), self.without_adapters() as network:
            yield network

    @contextmanager
    def without_adapters(self) -> Iterator[nn.Module]:
        """The frozen teacher, through which gradients flow to its inputs."""
        if self._adapted is None:
            yield self._frozen
            return
        # The backward pass would recompute activations after the block, and so with adapters.
        recomputes = torch.is_grad_enabled() and self.network.is_gradient_checkpointing
        if recomputes:
            self.network.disable_gradient_checkpointing()
        try:
            with self._adapted.disable_adapter():
                yield self.network
        finally:
            if recomputes:
                self.network.enable_gradient_checkpointing()


def with_lora(network: nn.Module, targets: tuple[str, ...], rank: int, scale: int) -> nn.Module:
    """The network wrapped by peft, its target layers adapted in place: only the adapters take gradients.

    They have the network's dtype, since their master weights are fp32. They begin at 0, so that the network's predictions stay the same.
    """
    return get_peft_model(network, LoraConfig(r=rank, lora_alpha=scale, target_modules=list(targets)), autocast_adapter_dtype=False)


def without_adapters(network: nn.Module) -> nn.Module:
    """The network with each adapted layer replaced by the layer that it adapts, into which the adapter must have been merged."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, module.base_layer)
    return network
