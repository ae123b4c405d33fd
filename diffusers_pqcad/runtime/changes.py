"""Whether somebody changed what a module does when it is called."""

from torch import nn


def is_changed(module: nn.Module) -> bool:
    """Return whether `module` has hooks, or another forward than its class."""
    state = module.__dict__  # with what `compile()` made of it, for a chosen backend
    is_replaced = "forward" in state or state.get("_compiled_call_impl") is not None
    return bool(is_replaced or module._forward_hooks or module._forward_pre_hooks)
