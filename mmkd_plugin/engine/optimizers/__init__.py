from .autocast_optim_wrapper import AutocastOptimWrapper
from .policy_optim_wrapper import PolicyOptimWrapper, PolicyOptimWrapperConstructor

__all__ = ['AutocastOptimWrapper', 'PolicyOptimWrapper', 'PolicyOptimWrapperConstructor']
