"""DAFA, SoKD's differentiable automatic feature augmentation: a learned policy that refines the teacher.

Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement
for Knowledge Distillation*, arXiv 2409.18785 (2024).

Letters: S sub-policies of K operations; features are ``(N, C, H, W)``.
"""
import difflib
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmkd_plugin.registry import MODELS

from .feature_ops import OPERATIONS, Dice

Features = Tensor | Sequence[Tensor]


class Draw(NamedTuple):
    """What one batch gets."""
    index: int  # of the sub-policy
    applied: tuple[bool, ...]  # which of its K operations
    dice: dict[str, Dice]  # the randomness inside every operation, by its name


class Policy(NamedTuple):
    """The policy's values on the host."""
    probability: list[float]  # S, sum to one
    application: list[list[float]]  # (S, K), probabilities
    magnitude: list[list[float]]  # (S, K), in (0, 1)


@MODELS.register_module()
class DAFA(BaseModule):
    """Refines teacher features by one sub-policy per batch, and learns which suits the student.

    A sub-policy is K operations in a row, each applied with a probability and
    at a magnitude of its own. All three parameters are logits: ``alpha`` (S,)
    selects by softmax; ``beta`` (S, K), application probabilities, and
    ``magnitude`` (S, K) go through a sigmoid, so that no optimiser step leaves
    the range and none gets stuck at its end, as it would behind a clamp.

    Usage, in training::

        refined = dafa(t_features)            # one draw for all levels; carries no gradient
        loss_aug = dafa.policy_loss(s_features)  # of the same draw; reaches the policy only

    The paper relaxes selection and application at a temperature of 0.5. Here
    both are hard and there is no temperature: the relaxation's straight-through
    gradient of ``alpha`` and ``beta`` is biased towards operations that erase
    the map, so theirs is the score function of the scalar loss less its running
    mean, which is unbiased and needs no relaxation. Selection is the same as by
    the Gumbel trick, whose hard choice does not depend on its temperature.

    Draws depend on ``seed``, on the number of draws so far and on ``alpha`` and
    ``beta`` alone: they are the same on every rank and go on after a resume as
    if there had been none. Drawing reads ``alpha`` and ``beta`` from the device
    once a batch, never once frozen.

    Args:
        operations: Names from :data:`~.feature_ops.OPERATIONS`; by default all nine.
        sub_policy_size: K.
        num_sub_policies: S; by default all combinations of K operations, else that many of them at random.
        alpha_init: Selection logit; equal ones select uniformly, whatever their value.
        beta_init: Application probability, in (0, 1).
        magnitude_init: Share of each operation's range, in (0, 1).
        seed: Of everything random.

    Raises:
        ValueError: An argument is outside what is stated above.
    """

    MOMENTUM = 0.95  # of the running mean of the loss

    def __init__(self,
                 operations: Sequence[str] | None = None,
                 sub_policy_size: int = 2,
                 num_sub_policies: int | None = None,
                 alpha_init: float = 1e-3,
                 beta_init: float = 0.5,
                 magnitude_init: float = 0.5,
                 seed: int = 0,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.operations = _check_operations(list(OPERATIONS) if operations is None else operations)
        _check('sub_policy_size', sub_policy_size, 1, len(self.operations))
        combinations = list(itertools.combinations(self.operations, sub_policy_size))
        if num_sub_policies is not None:
            _check('num_sub_policies', num_sub_policies, 1, len(combinations))
            chosen = random.Random(f'{seed} sub-policies').sample(range(len(combinations)), num_sub_policies)
            combinations = [combinations[i] for i in sorted(chosen)]
        self.sub_policies: list[tuple[str, ...]] = combinations
        self.seed = seed
        shape = len(combinations), sub_policy_size
        self.alpha = nn.Parameter(torch.full(shape[:1], float(alpha_init)))
        self.beta = nn.Parameter(torch.full(shape, _logit('beta_init', beta_init)))
        self.magnitude = nn.Parameter(torch.full(shape, _logit('magnitude_init', magnitude_init)))
        # Tensors, because checkpoints keep nothing else; mirrored on the host, where they are read.
        self.register_buffer('num_draws', torch.tensor(0))
        self.register_buffer('is_frozen', torch.tensor(False))
        self.register_buffer('mean_loss', torch.tensor(0.))  # zero: none yet
        self._mirror()

    def _mirror(self) -> None:
        self._num_draws, self._frozen = int(self.num_draws), bool(self.is_frozen)
        self._policy: Policy | None = None  # kept while frozen
        self.last_draw: Draw | None = None
        self._refined: list[Tensor] | None = None  # with their graph, until the policy loss takes them

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mirror()

    @property
    def names(self) -> list[str]:
        """The sub-policies' names, in the order of the parameters: 'ShearX+Rotate'."""
        return ['+'.join(operations) for operations in self.sub_policies]

    @property
    def frozen(self) -> bool:
        """Whether the search is over."""
        return self._frozen

    def freeze(self) -> None:
        """Ends the search: the policy is still sampled, but its loss is zero.

        The parameters keep getting gradients, exact zeros, so that
        DistributedDataParallel does not miss them. An optimiser with momentum
        or weight decay moves them all the same: stop it.
        """
        self.is_frozen.fill_(True)
        self._mirror()

    def policy(self) -> Policy:
        """The policy's current values, by one read from the device."""
        if self._policy is not None:
            return self._policy
        size = len(self.alpha)
        flat = torch.cat([logits.detach().flatten() for logits in (self.alpha, self.beta, self.magnitude)])
        flat = flat.cpu().double()  # the functions run here, the same for any device the logits came from
        beta, magnitude = flat[size:].sigmoid().view(2, size, -1)
        policy = Policy(flat[:size].softmax(0).tolist(), beta.tolist(), magnitude.tolist())
        if self._frozen:
            self._policy = policy
        return policy

    def draw(self) -> Draw:
        """The next draw; advances the counter."""
        policy, rng = self.policy(), random.Random(f'{self.seed} {self._num_draws}')
        self.num_draws += 1
        self._num_draws += 1
        dice = {name: Dice.roll(rng) for name in self.operations}
        index = rng.choices(range(len(self.alpha)), policy.probability)[0]
        return Draw(index, tuple(rng.random() < p for p in policy.application[index]), dice)

    def forward(self, features: Features) -> Features:
        """In training, draws and refines all levels alike, as constants; in evaluation, returns the input.

        Raises:
            ValueError: A feature is not floating or not (N, C, H, W).
        """
        if not self.training:
            return features
        draw = self.last_draw = self.draw()
        levels = _levels(features)
        with torch.set_grad_enabled(not self._frozen):  # also for a caller inside no_grad
            magnitude = self.magnitude[draw.index].sigmoid()
            refined = [self._refine(level.detach(), draw, magnitude) for level in levels]
        self._refined = None if self._frozen else refined
        refined = [new.detach().to(old.dtype) for new, old in zip(refined, levels, strict=True)]
        return refined[0] if isinstance(features, Tensor) else type(features)(refined)

    def _refine(self, x: Tensor, draw: Draw, magnitude: Tensor) -> Tensor:
        """One level, in float32 from the first operation on: half precision would lose small gradients."""
        for name, applied, m in zip(self.sub_policies[draw.index], draw.applied, magnitude, strict=True):
            if applied:
                x = OPERATIONS[name](x.to(torch.promote_types(x.dtype, torch.float32)), m, draw.dice[name])
        return x

    def policy_loss(self, s_features: Features) -> Tensor:
        """``1/2 mean((s(F_T) - F_S)^2)``, the mean over levels, for the features last refined.

        Computed in float32 at least. Its gradient reaches the policy only, and
        all of it at every call: the magnitudes by the path through the
        operations, ``alpha`` and ``beta`` by the score function. The very first
        call only starts the running mean: ``alpha`` and ``beta`` get zeros.
        Once frozen, the loss and all its gradients are zero.

        Args:
            s_features: The student's features, shaped like the teacher's.

        Raises:
            RuntimeError: No features were refined since the last call.
            ValueError: Number or shapes of the features differ from the refined ones.
        """
        zero = 0 * (self.alpha.sum() + self.beta.sum() + self.magnitude.sum())
        if self._frozen:
            return zero
        if self._refined is None:
            raise RuntimeError('policy_loss needs refined features: call the DAFA module in train() first')
        refined, self._refined = self._refined, None
        shapes, s_features = [tuple(x.shape) for x in refined], _levels(s_features)
        if shapes != [tuple(x.shape) for x in s_features]:
            raise ValueError(f's_features must have the shapes of the refined features, {shapes}, '
                             f'but got {[tuple(x.shape) for x in s_features]}')
        wide = torch.promote_types(refined[0].dtype, torch.float32)
        loss = torch.stack([F.mse_loss(t.to(wide), s.detach().to(wide))
                            for t, s in zip(refined, s_features, strict=True)]).mean() / 2
        log_p = self._log_probability(self.last_draw)
        return loss + (log_p - log_p.detach()) * self._advantage(loss.detach()) + zero

    def _log_probability(self, draw: Draw) -> Tensor:
        logits = zip(self.beta[draw.index], draw.applied, strict=True)
        applications = sum(F.logsigmoid(b if applied else -b) for b, applied in logits)
        return self.alpha.log_softmax(0)[draw.index] + applications

    @torch.no_grad()
    def _advantage(self, loss: Tensor) -> Tensor:
        """The loss less the mean of those before it, which it then joins unless it overflowed."""
        mean = torch.where(self.mean_loss == 0, loss, self.mean_loss)
        self.mean_loss.copy_(torch.where(loss.isfinite(), mean.lerp(loss, 1 - self.MOMENTUM), self.mean_loss))
        return loss - mean

    def state(self) -> dict[str, float]:
        """For logs: how undecided selection is (1: uniform, 0: certain), and of each operation the chance
        that a batch gets it and its mean magnitude, over the sub-policies as they are selected."""
        policy = self.policy()
        entropy = -sum(p * math.log(p) for p in policy.probability if p > 0)
        state = {'entropy': entropy / math.log(max(2, len(policy.probability)))}
        for operation in self.operations:
            places = [(s, names.index(operation)) for s, names in enumerate(self.sub_policies)
                      if operation in names]
            share = sum(policy.probability[s] for s, _ in places)
            if share > 0:
                p, m = (sum(policy.probability[s] * values[s][k] for s, k in places)
                        for values in (policy.application, policy.magnitude))
                state |= {f'p/{operation}': p, f'm/{operation}': m / share}
        return state

    def summary(self) -> str:
        """A table of the sub-policies, the likeliest first, with values in the operations' units."""
        policy, width = self.policy(), max(map(len, self.names))
        rows = [f'{"sub-policy":{width}}  selected  operations: applied, value']
        for s in sorted(range(len(self.names)), key=lambda s: -policy.probability[s]):
            parts = (f'{name} {p:.0%}, {m * OPERATIONS[name].limit:.3g} {OPERATIONS[name].unit}'
                     for name, p, m in zip(self.sub_policies[s], policy.application[s], policy.magnitude[s],
                                           strict=True))
            rows.append(f'{self.names[s]:{width}}  {policy.probability[s]:8.2%}  {"; ".join(parts)}')
        return '\n'.join(rows)


def _levels(features: Features) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _check(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'{field} must be an integer from {low} to {high}, but got {value!r}')


def _check_operations(names: Sequence[str]) -> list[str]:
    strings = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not strings or not names or len(set(names)) < len(names):
        raise ValueError(f'operations must be a list of one or more different names, but got {names!r}')
    for name in names:
        if name not in OPERATIONS:
            near = difflib.get_close_matches(str(name), OPERATIONS, n=3)
            raise ValueError(f'operations has an unknown name {name!r}: '
                             f'{"did you mean " if near else "choose from "}{", ".join(near or OPERATIONS)}')
    return list(names)


def _logit(field: str, probability: float) -> float:
    if not isinstance(probability, (int, float)) or not 0 < probability < 1:
        raise ValueError(f'{field} must lie strictly between 0 and 1, but got {probability!r}')
    return math.log(probability / (1 - probability))
