"""Optimizer wrapper with one optimizer for the student and one for SoKD's policy."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from mmengine.dist import all_reduce
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_CONSTRUCTORS
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from ...models.refiners import DAFA
from ...registry import OPTIM_WRAPPER_CONSTRUCTORS
from ...utils import unwrapped


class PolicyOptimWrapper(OptimWrapperDict):
    """The wrappers ``student`` and ``policy`` as one wrapper for MMEngine's standard ``train_step``.

    One backward pass runs on the sum of all losses. Autocast, loss scaling, gradient accumulation and
    synchronisation are those of the student's wrapper. During the search, the policy's optimizer steps
    whenever the student's does. Otherwise it does not step, because momentum and weight decay would change a
    policy with zero gradients. Gradient clipping applies to the student alone.

    With the objective ``agreement``, a policy learns from ``search_policy()`` of the distiller. This method is
    called after the student's backward pass and before any step, in every iteration of the search. It reads the
    gradients that the backward pass recorded, and calls ``backward()`` on a loss of the policy alone, such as
    :meth:`DAFA.score_loss`. These gradients accumulate with the student's. Before the step they are averaged
    over the processes, because the parallel wrapper does not synchronise this backward pass. Scores are linear
    in the recorded gradients, so the policy's gradients have the loss scale of mixed precision like all others,
    and are unscaled with them.

    Learning rate schedules and ``auto_scale_lr`` use :meth:`items` and :meth:`values`, which contain the
    student's wrapper alone. So they do not change the policy.

    Args:
        student: the wrapper of all parameters except the policies'.
        policy: the wrapper of the policies' parameters.
        policies: the modules with these parameters.
        search_policy: method of the distiller, needed only for the objective ``agreement``.
    """

    def __init__(self, student: OptimWrapper, policy: OptimWrapper, policies: Sequence[DAFA],
                 search_policy: Callable[[], None] | None = None) -> None:
        super().__init__(student=student, policy=policy)
        self.policies = list(policies)
        self.search_policy = search_policy

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
        if self.agreeing:
            self.search_policy()
        if self.student.should_update():
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss: Tensor, **kwargs) -> None:
        self.student.backward(loss, **kwargs)

    @property
    def searching(self) -> bool:
        """Whether a policy is searched."""
        return any(policy.searching for policy in self.policies)

    @property
    def agreeing(self) -> list[DAFA]:
        """The policies that currently learn from ``search_policy()``."""
        return [policy for policy in self.policies if policy.searching and policy.objective == 'agreement']

    def step(self, **kwargs) -> None:
        if self.searching:
            for parameter in (parameter for policy in self.agreeing for parameter in policy.parameters()):
                if parameter.grad is not None:
                    all_reduce(parameter.grad, 'mean')
            scaler = getattr(self.student, 'loss_scaler', None)  # its update() is in the student's step
            if scaler is None:
                self.policy.optimizer.step()
            else:
                scaler.step(self.policy.optimizer)
            for policy in self.policies:
                policy.fetch()
        self.student.step(**kwargs)

    def zero_grad(self, **kwargs) -> None:
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad(**kwargs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PolicyOptimWrapperConstructor:
    """Builds the student's wrapper as without a policy, and a second wrapper for the policy.

    Usage, added to the ``optim_wrapper`` of a config::

        optim_wrapper = dict(
            constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
            policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999)))

    If the config already has a constructor, such as MMPretrain's for layer-wise learning rates, put it into
    ``student_constructor``. Without this constructor, an ``OptimWrapper`` would train the policy with the student's
    optimizer.

    Args:
        optim_wrapper_cfg: config of the student's wrapper. Its field ``policy`` is the policy's optimizer, by default
            as above. Its field ``student_constructor`` is the student's constructor, by default
            ``DefaultOptimWrapperConstructor``.
        paramwise_cfg: ``paramwise_cfg`` of the student.

    Raises:
        ValueError: the model has no :class:`DAFA`, or its distiller does not support the objective.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        optim_wrapper_cfg = dict(optim_wrapper_cfg)
        self.policy_cfg = optim_wrapper_cfg.pop('policy', None) or dict(type='Adam', lr=1e-3, betas=(0.5, 0.999))
        constructor = optim_wrapper_cfg.pop('student_constructor', None) or 'DefaultOptimWrapperConstructor'
        self.student_constructor = ROOT_CONSTRUCTORS.build(
            dict(type=constructor, optim_wrapper_cfg=optim_wrapper_cfg, paramwise_cfg=paramwise_cfg))

    def __call__(self, model: nn.Module) -> PolicyOptimWrapper:
        model = unwrapped(model)
        policies = [module for module in model.modules() if isinstance(module, DAFA)]
        if not policies:
            raise ValueError(f'optim_wrapper.constructor: is {type(self).__name__}, but {type(model).__name__} has no '
                             'DAFA. Set dafa=dict(...) in the distiller, or remove constructor and policy')
        search_policy = getattr(getattr(model, 'distiller', None), 'search_policy', None)
        if search_policy is None and any(policy.objective == 'agreement' for policy in policies):
            raise ValueError("dafa.objective: is 'agreement', but the distiller of "
                             f"{type(model).__name__} has no search_policy() that scores draws. Use 'similarity'")
        parameters = [parameter for policy in policies for parameter in policy.parameters()]
        with _without_parameters(policies):
            student = self.student_constructor(model)
        optimizer = OPTIMIZERS.build(dict(self.policy_cfg, params=parameters))
        return PolicyOptimWrapper(student, OptimWrapper(optimizer), policies, search_policy)


@contextmanager
def _without_parameters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context that hides the parameters of these modules from ``parameters()`` of the model."""
    hidden: list[tuple[nn.Module, dict[str, torch.nn.Parameter]]] = [
        (module, dict(module._parameters)) for module in modules]
    for module, _ in hidden:
        module._parameters.clear()
    try:
        yield
    finally:
        for module, parameters in hidden:
            module._parameters.update(parameters)
