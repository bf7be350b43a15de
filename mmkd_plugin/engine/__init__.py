from .distill_visualization_hook import DistillVisualizationHook
from .freeze_policy_hook import FreezePolicyHook
from .policy_optim_wrapper import PolicyOptimWrapper, PolicyOptimWrapperConstructor

__all__ = ['DistillVisualizationHook', 'FreezePolicyHook', 'PolicyOptimWrapper', 'PolicyOptimWrapperConstructor']
