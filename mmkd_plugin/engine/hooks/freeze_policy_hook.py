"""Begins and ends SoKD's policy search, and shows how it went."""
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ...models.refiners import DAFA
from ...registry import HOOKS
from ...utils import check_number
from ..optimizers.policy_optim_wrapper import PolicyOptimWrapper


@HOOKS.register_module()
class FreezePolicyHook(Hook):
    """Searches with every :class:`DAFA` of the model for so many epochs or iterations, and then freezes it.

    Before the search, the teacher is not refined. After it, the policy is sampled and no longer learned. What a
    policy does is in its checkpoint, and a frozen one stays frozen. During the search, every epoch (in loops by
    iteration: every pass over the data) ends with the policy as a table in the log and as scalars ``policy/...``
    in the visualizer and the message hub.

    Args:
        search_epochs: How many epochs to search.
        search_iters: How many iterations to search, instead.
        begin: The epoch or iteration, counted from 0, with which the search begins.

    Raises:
        ValueError: Not exactly one of ``search_epochs`` and ``search_iters`` is given; before training: the model
            has no policy, or an unfrozen one has no optimiser of its own.
    """

    priority = 'NORMAL'

    def __init__(self, search_epochs: int | None = None, search_iters: int | None = None, begin: int = 0) -> None:
        if (search_epochs is None) == (search_iters is None):
            raise ValueError('FreezePolicyHook takes either search_epochs or search_iters, '
                             f'got {search_epochs} and {search_iters}')
        self.by_epoch = search_epochs is not None
        self.begin = check_number('FreezePolicyHook.begin', begin, least=0, whole=True)
        self.end = begin + check_number('FreezePolicyHook.search_epochs' if self.by_epoch else
                                        'FreezePolicyHook.search_iters',
                                        search_epochs if self.by_epoch else search_iters, least=0, whole=True)
        self.policies: dict[str, DAFA] = {}

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        policies = [module for module in model.modules() if isinstance(module, DAFA)]
        self.policies = {'policy' if len(policies) == 1 else f'policy_{i}': policy
                         for i, policy in enumerate(policies)}
        if not policies:
            raise ValueError(f'FreezePolicyHook: {type(model).__name__} has no DAFA: give the distiller '
                             'dafa=dict(...), or take the hook out')
        if not isinstance(runner.optim_wrapper, PolicyOptimWrapper) and not self.frozen:
            raise ValueError('FreezePolicyHook: the policy would be trained by the optimizer of the student; set '
                             "optim_wrapper.constructor='mmkd_plugin.PolicyOptimWrapperConstructor'")

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
                runner.logger.info(f'The search of {name} is over after {runner.iter} iterations; it is frozen:\n'
                                   f'{policy.summary()}')
            elif now < self.begin and not policy.waiting:
                policy.wait()
                runner.logger.info(f'The search of {name} begins with {"epoch" if self.by_epoch else "iteration"} '
                                   f'{self.begin}, counted from 0; until then, the teacher is not refined')
            elif now >= self.begin and policy.waiting:
                policy.start_search()
                runner.logger.info(f'The search of {name} begins after {runner.iter} iterations')

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
