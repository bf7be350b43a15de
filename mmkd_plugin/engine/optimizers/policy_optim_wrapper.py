"""Two optimisers, one backward: the student's, as its config has it, and the policy's."""
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from ...models.refiners import DAFA
from ...registry import OPTIM_WRAPPER_CONSTRUCTORS


class PolicyOptimWrapper(OptimWrapperDict):
    """The wrappers ``student`` and ``policy``, which MMEngine's stock ``train_step`` takes for one.

    The student's wrapper rules: autocast, loss scaling, gradient accumulation and synchronisation are
    its own, for one backward of the sum of all losses. The policy's optimiser steps whenever the
    student's does, until every policy is frozen; then it rests, as its momentum and weight decay would
    move a policy that gets zeros. Clipping is the student's alone.

    Learning rate schedules and ``auto_scale_lr`` go by :meth:`items` and :meth:`values`, which hold the
    student's wrapper only: what is made for the student leaves the policy alone.

    Args:
        student: of all parameters but the policies'.
        policy: of the policies' parameters.
        policies: the modules that own them.
    """

    def __init__(self, student: OptimWrapper, policy: OptimWrapper, policies: Sequence[DAFA]) -> None:
        super().__init__(student=student, policy=policy)
        self.policies = list(policies)

    @property
    def student(self) -> OptimWrapper:
        return self.optim_wrappers['student']

    @property
    def policy(self) -> OptimWrapper:
        return self.optim_wrappers['policy']

    def items(self) -> Iterator[tuple[str, OptimWrapper]]:
        yield 'student', self.student

    def values(self) -> Iterator[OptimWrapper]:
        yield self.student

    def optim_context(self, model: nn.Module) -> AbstractContextManager:
        return self.student.optim_context(model)

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        self.student.initialize_count_status(model, cur_iter, max_iters)

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        self.backward(self.student.scale_loss(loss))
        if self.student.should_update():
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss: Tensor, **kwargs) -> None:
        self.student.backward(loss, **kwargs)

    def step(self, **kwargs) -> None:
        if not all(policy.frozen for policy in self.policies):
            scaler = getattr(self.student, 'loss_scaler', None)  # its update() is in the student's step
            if scaler is None:
                self.policy.optimizer.step()
            else:
                scaler.step(self.policy.optimizer)
        self.student.step(**kwargs)

    def zero_grad(self, **kwargs) -> None:
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad(**kwargs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PolicyOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds the student's wrapper as MMEngine would without a policy, and the policy's beside it.

    Usage, in a config whose ``optim_wrapper`` stays as it is otherwise::

        optim_wrapper = dict(
            constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
            policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999)))

    Without this constructor, an ``OptimWrapper`` would train the policy with the student's optimiser.

    Args:
        optim_wrapper_cfg: of the student's wrapper; ``policy`` is the policy's optimiser, by default as above.
        paramwise_cfg: of the student.

    Raises:
        ValueError: the model has no :class:`DAFA` to optimise.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        optim_wrapper_cfg = dict(optim_wrapper_cfg)
        self.policy_cfg = optim_wrapper_cfg.pop('policy', None) or dict(type='Adam', lr=1e-3, betas=(0.5, 0.999))
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def __call__(self, model: nn.Module) -> PolicyOptimWrapper:
        model = model.module if is_model_wrapper(model) else model
        policies = [module for module in model.modules() if isinstance(module, DAFA)]
        if not policies:
            raise ValueError(f'optim_wrapper.constructor is {type(self).__name__}, but {type(model).__name__} has no '
                             'DAFA: give the distiller dafa=dict(...), or take constructor and policy out')
        parameters = [parameter for policy in policies for parameter in policy.parameters()]
        with _without_parameters(policies):
            student = super().__call__(model)
        optimizer = OPTIMIZERS.build(dict(self.policy_cfg, params=parameters))
        return PolicyOptimWrapper(student, OptimWrapper(optimizer), policies)


@contextmanager
def _without_parameters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hides the modules' parameters from whoever lists those of the model."""
    hidden: list[tuple[nn.Module, dict[str, torch.nn.Parameter]]] = [
        (module, dict(module._parameters)) for module in modules]
    for module, _ in hidden:
        module._parameters.clear()
    try:
        yield
    finally:
        for module, parameters in hidden:
            module._parameters.update(parameters)
