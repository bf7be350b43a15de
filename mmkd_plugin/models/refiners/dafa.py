"""DAFA, SoKD's differentiable automatic feature augmentation.

[0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement
for Knowledge Distillation*, arXiv 2409.18785 (2024).

Letters: S sub-policies of K operations; D policy draws; P positions of all levels; features are ``(N, C, H, W)``.
"""
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import broadcast
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmkd_plugin.registry import MODELS
from mmkd_plugin.utils import check_number, closest

from .feature_ops import OPERATIONS, Chance, Row, apply_operations, inside, position_weights, send

Features = Tensor | Sequence[Tensor]

WAITING, SEARCHING, FROZEN = range(3)


class Draw(NamedTuple):
    """One sub-policy with all its random choices."""
    index: int  # index of the sub-policy
    applied: tuple[bool, ...]  # whether each of its K operations is applied
    row: Row  # the operations that change something, with their values; empty for the identity
    chance: Chance
    offset: tuple[float, ...] = ()  # K, offsets from the policy's magnitudes


class Policy(NamedTuple):
    """The policy's values on the host."""
    probability: list[float]  # S, sum to one
    application: list[list[float]]  # (S, K), probabilities
    magnitude: list[list[float]]  # (S, K), in (0, 1)


@MODELS.register_module()
class DAFA(BaseModule):
    """Refines teacher features with one sub-policy per batch, and learns which sub-policies suit the student [0].

    A sub-policy is a sequence of K operations. Each is applied with its own probability and magnitude. All three
    parameters are logits: ``alpha`` (S,) selects by softmax. ``beta`` (S, K), the application probabilities, and
    ``magnitude`` (S, K) pass through a sigmoid, so that optimizer steps stay in the range and do not get stuck at its
    ends, as with a clamp. A magnitude of 0.5 is the identity of a shear, translation or rotation. Their direction is
    learned.

    Usage, in training::

        refined = dafa(t_features)  # one draw for all levels, constants
        loss_aug = dafa.policy_loss(t_features, s_features)  # separate draws; only the policy gets a gradient

    A policy is waiting (it does not refine), searching or frozen (it is sampled but no longer learns). It starts in the
    state searching.

    **Objectives.** ``similarity`` is the paper's, ``L_aug = 1/2 mean((s(F_T) - F_S)^2)``. ``agreement`` scores a draw
    by :func:`~.agreement.agreement_score`, outside of this module: get draws from :meth:`sample`, refine the features
    with :meth:`refine` and learn from the scores with :meth:`score_loss`.

    **Gradients.** The paper relaxes selection and application at a temperature of 0.5. Here both are hard, because the
    relaxation's straight-through gradient is biased towards operations that erase the map. A step draws D
    sub-policies, each at two magnitudes, m + d and m - d, where the signs of the K entries of d are random. With s+
    and s- the scores of the two and s their mean::

        alpha, beta:  mean over draws of (s - mean s of the other draws) * grad log p(draw)
        magnitude:    mean over draws of (s+ - s-) / (2 d)

    Both are unbiased for the expected score of m + d and m - d. Every operation has its exact symmetric difference,
    with hard choices and without straight-through gradients. ``similarity`` takes the difference over positions that
    both maps fill from inside, because the zeros outside would dominate it.

    **Cost.** The draws of ``similarity`` are one batch of ``2 D max(1, N // D)`` samples of features. A step uses the
    next ``N // D`` samples of the batch, or one sample, the same for all draws.

    **Randomness.** Draws depend only on ``seed``, on the number of draws so far and on ``alpha`` and ``beta``. They are
    the same on every rank, and a resumed run continues with the same draws as an uninterrupted one.

    Args:
        operations: Names from :data:`~.feature_ops.OPERATIONS`; all nine by default.
        sub_policy_size: K.
        num_sub_policies: S. By default, all combinations of K operations are used, otherwise that many at random.
        alpha_init: Initial selection logit. Equal logits select uniformly, whatever their value.
        beta_init: Initial application probability, in (0, 1).
        magnitude_init: Initial share of each operation's range, in (0, 1).
        objective: Objective of the policy, ``similarity`` or ``agreement``.
        policy_draws: D, at least 2.
        seed: Seed of the draws. The default is torch's seed, which MMEngine's Runner sets from ``randomness.seed``
            before it builds the model. With ``num_sub_policies``, a given seed also selects the combinations.

    Raises:
        ValueError: An argument is out of its range.
    """

    OBJECTIVES = ('similarity', 'agreement')
    SYMMETRIC_STEP, STEP = 0.01, 0.05  # d of operations that move positions, and of the others

    def __init__(self,
                 operations: Sequence[str] | None = None,
                 sub_policy_size: int = 2,
                 num_sub_policies: int | None = None,
                 alpha_init: float = 1e-3,
                 beta_init: float = 0.5,
                 magnitude_init: float = 0.5,
                 objective: str = 'similarity',
                 policy_draws: int = 8,
                 seed: int | None = None,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.operations = _check_operations(list(OPERATIONS) if operations is None else operations)
        check_number('dafa.sub_policy_size', sub_policy_size, 1, len(self.operations), whole=True)
        combinations = list(itertools.combinations(self.operations, sub_policy_size))
        if num_sub_policies is not None:
            check_number('dafa.num_sub_policies', num_sub_policies, 1, len(combinations), whole=True)
            chosen = random.Random(f'{seed} sub-policies').sample(range(len(combinations)), num_sub_policies)
            combinations = [combinations[i] for i in sorted(chosen)]
        if objective not in self.OBJECTIVES:
            raise ValueError(f'dafa.objective: unknown objective {objective!r}; {closest(objective, self.OBJECTIVES)}')
        if seed is not None:
            check_number('dafa.seed', seed, 0, 2**63 - 1, whole=True)
        self.sub_policies: list[tuple[str, ...]] = combinations
        self.objective = objective
        self.policy_draws = check_number('dafa.policy_draws', policy_draws, 2, whole=True)
        shape = len(combinations), sub_policy_size
        self.alpha = nn.Parameter(torch.full(shape[:1], float(check_number('dafa.alpha_init', alpha_init))))
        self.beta = nn.Parameter(torch.full(shape, _logit('dafa.beta_init', beta_init)))
        self.magnitude = nn.Parameter(torch.full(shape, _logit('dafa.magnitude_init', magnitude_init)))
        # Tensors, because checkpoints only have tensors. They are read from copies on the host.
        self.register_buffer('seed', torch.tensor(torch.initial_seed() % 2**63 if seed is None else seed))
        self.register_buffer('num_draws', torch.tensor(0))  # draws for the student
        self.register_buffer('num_searches', torch.tensor(0))  # calls of `sample`
        self.register_buffer('phase', torch.tensor(SEARCHING))
        self._forget_host()

    def _forget_host(self) -> None:
        self._host: dict[str, int] = {}  # buffers, copied at first use
        self._policy: Policy | None = None  # kept while frozen
        self._fetched: tuple[Tensor, torch.cuda.Event, list[int]] | None = None
        self.last_draw: Draw | None = None  # the student's

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _fetched=None)  # an event cannot be copied; the copy fetches again

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        if f'{prefix}is_frozen' in state_dict:
            raise ValueError(
                f'{prefix[:-1] or "DAFA"}: the checkpoint has a policy of mmkd_plugin 0.1, whose magnitudes had '
                'random signs and have another meaning now. Start from its student: model.student_ckpt=CHECKPOINT '
                'model.inherit=[]')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._forget_host()

    # State

    @property
    def names(self) -> list[str]:
        """Names of the sub-policies in the order of the parameters, such as 'ShearX+Rotate'."""
        return ['+'.join(operations) for operations in self.sub_policies]

    def _read(self, buffer: str) -> int:
        if buffer not in self._host:
            self._host[buffer] = int(getattr(self, buffer))
        return self._host[buffer]

    def _random(self, buffer: str) -> random.Random:
        """Returns the generator of the next draw and increments the counter ``buffer``."""
        if 'seed' not in self._host:
            broadcast(self.seed)  # all ranks make the same draws
        count = self._read(buffer)
        self._host[buffer] = count + 1
        getattr(self, buffer).add_(1)
        return random.Random(f'{self._read("seed")} {buffer} {count}')

    def _enter(self, phase: int) -> None:
        self.phase.fill_(phase)
        self._host['phase'], self._policy = phase, None

    @property
    def waiting(self) -> bool:
        """Whether the policy does not refine or learn yet."""
        return self._read('phase') == WAITING

    @property
    def searching(self) -> bool:
        """Whether the policy learns."""
        return self._read('phase') == SEARCHING

    @property
    def frozen(self) -> bool:
        """Whether the search is over."""
        return self._read('phase') == FROZEN

    def wait(self) -> None:
        """Stops refining until :meth:`start_search`."""
        self._enter(WAITING)

    def start_search(self) -> None:
        """Starts to refine and learn."""
        self._enter(SEARCHING)

    def freeze(self) -> None:
        """Ends the search. The policy is still sampled, but its loss is zero.

        The parameters still get gradients of exactly zero, because DistributedDataParallel needs them. An optimizer
        with momentum or weight decay would still change the parameters, so stop it.
        """
        self._enter(FROZEN)

    # Values on the host

    def _flat(self) -> Tensor:
        return torch.cat([logits.flatten() for logits in self.parameters()])

    def _versions(self) -> list[int]:
        return [logits._version for logits in self.parameters()]

    @torch.no_grad()
    def fetch(self) -> None:
        """Starts to copy the policy to the host. After an optimizer step, this saves draws the wait for a forward."""
        if self.alpha.is_cuda:
            flat = self._flat()
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._fetched = host, event, self._versions()

    def policy(self) -> Policy:
        """Returns the policy's current values, from the fetched copy if it is up to date, or else from the device."""
        if self._policy is not None:
            return self._policy
        if self._fetched is not None and self._fetched[2] == self._versions():
            self._fetched[1].synchronize()
            flat = self._fetched[0]
        else:
            flat = self._flat().detach().cpu()
        flat, size = flat.numpy().astype(np.float64), len(self.alpha)  # computed on the host, equal for all devices
        probability = np.exp(flat[:size] - flat[:size].max())
        beta, magnitude = (.5 * (1 + np.tanh(flat[size:] / 2))).reshape(2, size, -1)  # sigmoids that do not overflow
        policy = Policy((probability / probability.sum()).tolist(), beta.tolist(), magnitude.tolist())
        if not self.searching:
            self._policy = policy
        return policy

    # Drawing and refining

    def _draw(self, rng: random.Random, policy: Policy, chance: Chance) -> Draw:
        index = rng.choices(range(len(policy.probability)), policy.probability)[0]
        applied = tuple(rng.random() < p for p in policy.application[index])
        return self._at(Draw(index, applied, (), chance), policy, (0., ) * len(applied))

    def _at(self, draw: Draw, policy: Policy, offset: tuple[float, ...]) -> Draw:
        """Returns the draw with the policy's magnitudes plus ``offset``."""
        places = zip(self.sub_policies[draw.index], draw.applied, policy.magnitude[draw.index], offset, strict=True)
        row = [(name, OPERATIONS[name].value(m + d)) for name, applied, m, d in places if applied]
        return draw._replace(row=tuple((name, value) for name, value in row if value), offset=offset)

    def draw(self) -> Draw:
        """Returns the student's next draw."""
        rng = self._random('num_draws')
        return self._draw(rng, self.policy(), Chance.draw(rng))

    def sample(self, count: int | None = None) -> list[Draw]:
        """Returns draws to score: ``count`` sub-policies, by default ``policy_draws``, each at m + d and then at m - d.

        A draw with an empty ``row`` is the identity. The random values of the operations are the same for all draws.
        """
        rng, policy = self._random('num_searches'), self.policy()
        chance, draws = Chance.draw(rng), []
        for _ in range(self.policy_draws if count is None else count):
            draw = self._draw(rng, policy, chance)
            steps = [rng.choice((1, -1)) * self._step(name, m) if applied else 0. for name, m, applied in zip(
                self.sub_policies[draw.index], policy.magnitude[draw.index], draw.applied, strict=True)]
            draws += [self._at(draw, policy, tuple(sign * step for step in steps)) for sign in (1, -1)]
        return draws

    def _step(self, name: str, magnitude: float) -> float:
        """Returns d, such that m + d and m - d are in the range."""
        return min(self.SYMMETRIC_STEP if OPERATIONS[name].symmetric else self.STEP, magnitude, 1 - magnitude)

    def refine(self, draw: Draw, features: Features) -> Features:
        """Returns the features refined by a draw, without gradient. If the draw is the identity, returns the input."""
        if not draw.row:
            return features
        levels = _levels(features)
        refined = [new[0].to(old.dtype) for new, old in zip(
            apply_operations(levels, [draw.row], draw.chance), levels, strict=True)]
        return refined[0] if isinstance(features, Tensor) else type(features)(refined)

    def forward(self, features: Features) -> Features:
        """Refines all levels with one draw in training. In evaluation and while waiting, returns the input."""
        if not self.training or self.waiting:
            return features
        self.last_draw = self.draw()
        return self.refine(self.last_draw, features)

    # Learning

    def _zero(self) -> Tensor:
        return self._flat()[:0].sum()

    def policy_loss(self, t_features: Features, s_features: Features) -> Tensor:
        """Returns ``1/2 mean((s(F_T) - F_S)^2)``, the mean over levels, for separate draws.

        It is computed at least in float32. Only the policy gets a gradient, all parameters at every call. The loss and
        its gradient are zero if the policy is not searching, or with the objective ``agreement``.

        Args:
            t_features: The teacher's features.
            s_features: The student's features, of the same shapes.

        Raises:
            ValueError: The number or shapes of the features differ.
        """
        if not self.searching or self.objective != 'similarity':
            return self._zero()
        t_levels, s_levels = _levels(t_features), _levels(s_features)
        shapes = [[tuple(x.shape) for x in levels] for levels in (t_levels, s_levels)]
        if shapes[0] != shapes[1]:
            raise ValueError('s_features: must have the shapes of the teacher\'s features, '
                             f'expected {shapes[0]}, got {shapes[1]}')
        if not len(t_levels[0]):
            return self._zero()
        draws = self.sample()
        samples = self.next_samples(len(t_levels[0]))
        losses, inner = self._half_errors(draws, [x[samples] for x in t_levels], [x[samples] for x in s_levels])
        return self.score_loss(draws, -losses, -inner)

    def next_samples(self, batch: int) -> slice:
        """Returns the samples of this search step, another part of the batch at every step."""
        count = max(1, batch // self.policy_draws)
        start = (self._read('num_searches') - 1) % (batch // count) * count
        return slice(start, start + count)

    @torch.no_grad()
    def _half_errors(self, draws: Sequence[Draw], t_levels: Sequence[Tensor],
                     s_levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns ``L_aug`` of each draw, and its part at positions that both draws of a pair fill from inside."""
        rows = [draw.row for draw in draws]
        refined = apply_operations(t_levels, rows, draws[0].chance)
        errors = torch.cat([F.mse_loss(t, s.to(t.dtype).expand_as(t), reduction='none').mean((1, 2)).flatten(1)
                            for t, s in zip(refined, s_levels, strict=True)], 1)  # (2 D, P)
        errors = errors * (position_weights(t_levels) / 2)
        both = inside(t_levels, rows).unflatten(0, (-1, 2)).all(1, keepdim=True)  # (D, 1, P)
        inner = (errors.unflatten(0, (-1, 2)) * both).flatten(0, 1)
        return errors.sum(1), inner.sum(1)

    def score_loss(self, draws: Sequence[Draw], scores: Sequence[float | Tensor] | Tensor,
                   magnitude_scores: Sequence[float | Tensor] | Tensor | None = None) -> Tensor:
        """Returns a loss whose gradient increases the policy's expected score.

        Its value is the negative mean score. Scores that are not finite, as after an overflow, give no gradient.

        Args:
            draws: All draws of one call of :meth:`sample`.
            scores: One number per draw; higher is better.
            magnitude_scores: Scores for the magnitudes, if they differ.

        Raises:
            ValueError: The number of scores is not that of the draws, or the draws are not pairs of :meth:`sample`.
        """
        scores = self._scores(draws, scores)
        mean = scores.mean()
        selection, magnitudes = self._derivatives(draws)
        gradient = torch.cat([
            (send(selection, scores) * (scores - mean)[:, None]).sum(0),
            (send(magnitudes, scores) * (
                scores if magnitude_scores is None else self._scores(draws, magnitude_scores))[:, None]).sum(0)])
        surrogate = (self._flat() * gradient.nan_to_num(0., 0., 0.)).sum()
        return surrogate.detach() - surrogate - mean

    def _scores(self, draws: Sequence[Draw], scores: Sequence[float | Tensor] | Tensor) -> Tensor:
        if not isinstance(scores, Tensor):
            scores = torch.stack([torch.as_tensor(score, device=self.alpha.device) for score in scores])
        if scores.shape != (len(draws), ) or len(draws) % 2 or len(draws) < 4:
            raise ValueError(f'scores: expected one number for each draw of sample(), at least 2 pairs, '
                             f'got {tuple(scores.shape)} for {len(draws)} draws')
        return scores.detach().to(self.alpha)

    def _derivatives(self, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the factors of each score in the gradients of (alpha, beta), (2 D, S + S K), and of m, (2 D, S K)."""
        policy, count = self.policy(), len(draws)
        alpha = np.tile(-np.asarray(policy.probability), (count, 1))
        beta, magnitude = np.zeros((2, *alpha.shape, len(policy.magnitude[0])))
        for i, draw in enumerate(draws):
            alpha[i, draw.index] += 1
            beta[i, draw.index] = np.asarray(draw.applied) - np.asarray(policy.application[draw.index])
            for k, (m, offset) in enumerate(zip(policy.magnitude[draw.index], draw.offset, strict=True)):
                if offset:
                    magnitude[i, draw.index, k] = m * (1 - m) / offset
        # A pair's score minus the mean of the other pairs is count / (count - 2) times its score minus the mean of all.
        selection = np.concatenate((alpha, beta.reshape(count, -1)), 1) / (count - 2)
        return selection, magnitude.reshape(count, -1) / count

    # Logs

    def state(self) -> dict[str, float]:
        """Returns the entropy of the selection (1: uniform, 0: certain), and for each operation the probability that it
        is applied to a batch and its mean signed value over the selected sub-policies, for logs."""
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
                state |= {f'p/{operation}': p, f'value/{operation}': OPERATIONS[operation].value(m / share)}
        return state

    def summary(self) -> str:
        """Returns a table of the sub-policies by falling probability, with values in the operations' units."""
        policy, width = self.policy(), max(map(len, self.names))
        rows = [f'{"sub-policy":{width}}  selected  operations: applied, value']
        for s in sorted(range(len(self.names)), key=lambda s: -policy.probability[s]):
            parts = (f'{name} {p:.0%}, {_value(name, m)} {OPERATIONS[name].unit}'
                     for name, p, m in zip(self.sub_policies[s], policy.application[s], policy.magnitude[s],
                                           strict=True))
            rows.append(f'{self.names[s]:{width}}  {policy.probability[s]:8.2%}  {"; ".join(parts)}')
        return '\n'.join(rows)


def _value(name: str, magnitude: float) -> str:
    operation = OPERATIONS[name]
    return format(operation.value(magnitude), '+.3g' if operation.symmetric else '.3g')


def _levels(features: Features) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _check_operations(names: Sequence[str]) -> list[str]:
    strings = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not strings or not names or len(set(names)) < len(names):
        raise ValueError(f'dafa.operations: must be a list of one or more different names, got {names!r}')
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f'dafa.operations: unknown operation {name!r}; {closest(name, OPERATIONS)}')
    return list(names)


def _logit(field: str, probability: float) -> float:
    check_number(field, probability, above=0, most=1)
    if probability == 1:
        raise ValueError(f'{field} must lie between 0 and 1, both excluded, got {probability!r}')
    return math.log(probability / (1 - probability))
