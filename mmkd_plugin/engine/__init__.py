from .freeze_policy_hook import FreezePolicyHook
from .policy_optim_wrapper import PolicyOptimWrapper, PolicyOptimWrapperConstructor

__all__ = ['FreezePolicyHook', 'PolicyOptimWrapper', 'PolicyOptimWrapperConstructor']
