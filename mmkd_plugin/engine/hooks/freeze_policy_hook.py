"""Hook that starts and ends SoKD's policy search and logs the policy."""
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from ...models.refiners import DAFA
from ...registry import HOOKS
from ...utils import check_number, unwrapped
from ..optimizers.policy_optim_wrapper import PolicyOptimWrapper


@HOOKS.register_module()
class FreezePolicyHook(Hook):
    """Runs the policy search of every :class:`DAFA` of the model for some epochs or iterations, then freezes it.

    Before the search, the teacher is not refined. After it, the policy is still sampled, but no longer trained. The
    state of a policy is in checkpoints, and a frozen policy stays frozen. During the search, the hook logs the policy
    at the end of every epoch (in iteration-based loops, of every pass over the data): as a table in the log, and as
    scalars ``policy/...`` in the visualizer and the message hub.

    Args:
        search_epochs: Number of epochs to search.
        search_iters: Number of iterations to search. Give either this or ``search_epochs``.
        begin: Epoch or iteration at which the search starts, counted from 0.

    Raises:
        ValueError: Not exactly one of ``search_epochs`` and ``search_iters`` is given; before training: the model
            has no policy, a policy that is not frozen has no optimizer, or ``search_epochs`` is used with an
            iteration-based loop, which does not count epochs.
    """

    def __init__(self, search_epochs: int | None = None, search_iters: int | None = None, begin: int = 0) -> None:
        if (search_epochs is None) == (search_iters is None):
            raise ValueError('FreezePolicyHook: expected either search_epochs or search_iters, '
                             f'got {search_epochs} and {search_iters}')
        self.by_epoch = search_epochs is not None
        self.begin = check_number('FreezePolicyHook.begin', begin, least=0, whole=True)
        self.end = begin + check_number('FreezePolicyHook.search_epochs' if self.by_epoch else
                                        'FreezePolicyHook.search_iters',
                                        search_epochs if self.by_epoch else search_iters, least=0, whole=True)
        self.policies: dict[str, DAFA] = {}

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        policies = [module for module in model.modules() if isinstance(module, DAFA)]
        self.policies = {'policy' if len(policies) == 1 else f'policy_{i}': policy
                         for i, policy in enumerate(policies)}
        if not policies:
            raise ValueError(f'FreezePolicyHook: {type(model).__name__} has no DAFA. Set dafa=dict(...) in the '
                             'distiller, or remove the hook')
        if not isinstance(runner.optim_wrapper, PolicyOptimWrapper) and not self.frozen:
            raise ValueError('FreezePolicyHook: the policy would be trained by the optimizer of the student. Set '
                             "optim_wrapper.constructor='mmkd_plugin.PolicyOptimWrapperConstructor'")

        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(f'FreezePolicyHook.search_epochs: {type(runner.train_loop).__name__} does not count '
                             'epochs, so the search would never end. Use search_iters; begin is then in iterations')

        length = runner.max_epochs if self.by_epoch else runner.max_iters
        if self.end >= length:
            unit = 'epochs' if self.by_epoch else 'iterations'
            runner.logger.warning(f'FreezePolicyHook: the search would end after {self.end} {unit}, and the run has '
                                  f'{length}, so the policy is never frozen. A sixth of the run is usual: search_'
                                  f'{"epochs" if self.by_epoch else "iters"}={max(1, round(length / 6))}')

    @property
    def frozen(self) -> bool:
        """Whether the search is over."""
        return all(policy.frozen for policy in self.policies.values())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        now = runner.epoch if self.by_epoch else runner.iter
        for name, policy in self.policies.items():
            if policy.frozen:
                continue
            if now >= self.end:
                policy.freeze()
                runner.logger.info(f'The search of {name} ended after {runner.iter} iterations. It is frozen:\n'
                                   f'{policy.summary()}')
            elif now < self.begin and not policy.waiting:
                policy.wait()
                runner.logger.info(f'The search of {name} starts at {"epoch" if self.by_epoch else "iteration"} '
                                   f'{self.begin}, counted from 0. Until then, the teacher is not refined')
            elif now >= self.begin and policy.waiting:
                policy.start_search()
                runner.logger.info(f'The search of {name} starts after {runner.iter} iterations')

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if (runner.iter + 1) % len(runner.train_dataloader):
            return
        for name, policy in self.policies.items():
            if not policy.searching:
                continue
            runner.logger.info(f'{name} after {runner.iter + 1} iterations:\n{policy.summary()}')
            scalars = {f'{name}/{key}': value for key, value in policy.state().items()}
            for key, value in scalars.items():
                runner.message_hub.update_scalar(key, value)
            runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
