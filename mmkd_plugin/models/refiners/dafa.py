"""DAFA, SoKD's differentiable automatic feature augmentation: a learned policy that refines the teacher.

[0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement
for Knowledge Distillation*, arXiv 2409.18785 (2024).

Letters: S sub-policies of K operations; D policy draws; P positions of all
levels; features are ``(N, C, H, W)``.
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
    """One sub-policy with everything that chance decides about it."""
    index: int  # of the sub-policy
    applied: tuple[bool, ...]  # which of its K operations
    row: Row  # the operations that do something, with their values; none is the identity
    chance: Chance
    offset: tuple[float, ...] = ()  # K, what was added to the policy's magnitudes


class Policy(NamedTuple):
    """The policy's values on the host."""
    probability: list[float]  # S, sum to one
    application: list[list[float]]  # (S, K), probabilities
    magnitude: list[list[float]]  # (S, K), in (0, 1)


@MODELS.register_module()
class DAFA(BaseModule):
    """Refines teacher features by one sub-policy a batch, and learns which suits the student [0].

    A sub-policy is K operations in a row, each applied with a probability and
    at a magnitude of its own. All three parameters are logits: ``alpha`` (S,)
    selects by softmax; ``beta`` (S, K), application probabilities, and
    ``magnitude`` (S, K) go through a sigmoid, so that no optimiser step leaves
    the range and none gets stuck at its end, as it would behind a clamp. A
    magnitude of 0.5 is the identity of a shear, translation or rotation, whose
    direction is learned.

    Usage, in training::

        refined = dafa(t_features)  # one draw for all levels, constants
        loss_aug = dafa.policy_loss(t_features, s_features)  # draws of its own; reaches the policy only

    A policy is waiting (it refines nothing), searching or frozen (sampled, and
    no longer learned). It is made searching.

    **Objectives.** ``similarity`` is the paper's, ``L_aug = 1/2 mean((s(F_T) - F_S)^2)``.
    ``agreement`` scores a draw by :func:`~.agreement.agreement_score`, outside of this module: take
    draws by :meth:`sample`, refine the features by :meth:`refine` and learn from the scores by :meth:`score_loss`.

    **Gradients.** The paper relaxes selection and application at a temperature
    of 0.5. Here both are hard, as the relaxation's straight-through gradient is
    biased towards operations that erase the map. A step draws D sub-policies,
    each at two magnitudes, m + d and m - d, where the signs of the K entries of
    d are random. With s+ and s- the scores of the two and s their mean::

        alpha, beta:  mean over draws of (s - mean s of the other draws) * grad log p(draw)
        magnitude:    mean over draws of (s+ - s-) / (2 d)

    Both are unbiased for the expected score of m + d and m - d. Every operation
    has its exact symmetric difference, hard choices included, and none is
    straight-through. ``similarity`` takes the difference over the positions
    that both maps fill from inside, as the zeros outside would dominate it.

    **Cost.** The draws of ``similarity`` are one batch of ``2 D max(1, N // D)``
    samples, of features alone. The step takes the next ``N // D`` samples of
    the batch, or one sample, and all draws see the same ones.

    **Randomness.** Draws depend on ``seed``, on the number of draws so far and
    on ``alpha`` and ``beta`` alone: they are the same on every rank and go on
    after a resume as if there had been none.

    Args:
        operations: Names from :data:`~.feature_ops.OPERATIONS`; by default all nine.
        sub_policy_size: K.
        num_sub_policies: S; by default all combinations of K operations, else that many of them at random.
        alpha_init: Selection logit; equal ones select uniformly, whatever their value.
        beta_init: Application probability, in (0, 1).
        magnitude_init: Share of each operation's range, in (0, 1).
        objective: What the policy learns from, ``similarity`` or ``agreement``.
        policy_draws: D, at least 2.
        seed: Of the draws; by default torch's seed, which MMEngine's Runner sets from ``randomness.seed`` before it
            builds the model. With ``num_sub_policies``, a stated seed also selects the combinations.

    Raises:
        ValueError: An argument is outside what is stated above.
    """

    OBJECTIVES = ('similarity', 'agreement')
    SYMMETRIC_STEP, STEP = 0.01, 0.05  # d, of operations that move positions and of others

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
            raise ValueError(f'dafa.objective: there is no {objective!r}; {closest(objective, self.OBJECTIVES)}')
        if seed is not None:
            check_number('dafa.seed', seed, 0, 2**63 - 1, whole=True)
        self.sub_policies: list[tuple[str, ...]] = combinations
        self.objective = objective
        self.policy_draws = check_number('dafa.policy_draws', policy_draws, 2, whole=True)
        shape = len(combinations), sub_policy_size
        self.alpha = nn.Parameter(torch.full(shape[:1], float(check_number('dafa.alpha_init', alpha_init))))
        self.beta = nn.Parameter(torch.full(shape, _logit('dafa.beta_init', beta_init)))
        self.magnitude = nn.Parameter(torch.full(shape, _logit('dafa.magnitude_init', magnitude_init)))
        # Tensors, because checkpoints keep nothing else; mirrored on the host, where they are read.
        self.register_buffer('seed', torch.tensor(torch.initial_seed() % 2**63 if seed is None else seed))
        self.register_buffer('num_draws', torch.tensor(0))  # of the student
        self.register_buffer('num_searches', torch.tensor(0))  # calls of `sample`
        self.register_buffer('phase', torch.tensor(SEARCHING))
        self._forget_host()

    def _forget_host(self) -> None:
        self._host: dict[str, int] = {}  # buffers, read when they are needed first
        self._policy: Policy | None = None  # kept while frozen
        self._fetched: tuple[Tensor, torch.cuda.Event, list[int]] | None = None
        self.last_draw: Draw | None = None  # the student's

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _fetched=None)  # a copy fetches its own; an event cannot be copied

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        if f'{prefix}is_frozen' in state_dict:
            raise ValueError(
                f'{prefix[:-1] or "DAFA"}: the checkpoint has a policy of mmkd_plugin 0.1, whose magnitudes had '
                'random signs and mean something else now. Start from its student alone: model.student_ckpt=CHECKPOINT')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._forget_host()

    # State

    @property
    def names(self) -> list[str]:
        """The sub-policies' names, in the order of the parameters: 'ShearX+Rotate'."""
        return ['+'.join(operations) for operations in self.sub_policies]

    def _read(self, buffer: str) -> int:
        if buffer not in self._host:
            self._host[buffer] = int(getattr(self, buffer))
        return self._host[buffer]

    def _random(self, buffer: str) -> random.Random:
        """Returns the generator of the next draw that ``buffer`` counts."""
        if 'seed' not in self._host:
            broadcast(self.seed)  # all ranks draw as the first does
        count = self._read(buffer)
        self._host[buffer] = count + 1
        getattr(self, buffer).add_(1)
        return random.Random(f'{self._read("seed")} {buffer} {count}')

    def _enter(self, phase: int) -> None:
        self.phase.fill_(phase)
        self._host['phase'], self._policy = phase, None

    @property
    def waiting(self) -> bool:
        """Whether the policy neither refines nor learns yet."""
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
        """Refines nothing until :meth:`start_search`."""
        self._enter(WAITING)

    def start_search(self) -> None:
        """Refines and learns from now on."""
        self._enter(SEARCHING)

    def freeze(self) -> None:
        """Ends the search: the policy is still sampled, but its loss is zero.

        The parameters keep getting gradients, exact zeros, so that
        DistributedDataParallel does not miss them. An optimiser with momentum
        or weight decay moves them all the same: stop it.
        """
        self._enter(FROZEN)

    # Values on the host

    def _flat(self) -> Tensor:
        return torch.cat([logits.flatten() for logits in self.parameters()])

    def _versions(self) -> list[int]:
        return [logits._version for logits in self.parameters()]

    @torch.no_grad()
    def fetch(self) -> None:
        """Starts to copy the policy to the host. Call it after an optimiser's step, and no draw waits for a forward."""
        if self.alpha.is_cuda:
            flat = self._flat()
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._fetched = host, event, self._versions()

    def policy(self) -> Policy:
        """Returns the policy's current values: those fetched, if nothing has changed since, or read from the device."""
        if self._policy is not None:
            return self._policy
        if self._fetched is not None and self._fetched[2] == self._versions():
            self._fetched[1].synchronize()
            flat = self._fetched[0]
        else:
            flat = self._flat().detach().cpu()
        flat, size = flat.numpy().astype(np.float64), len(self.alpha)  # the functions run here, alike for any device
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
        """Returns the draw with magnitudes that lie ``offset`` from the policy's."""
        places = zip(self.sub_policies[draw.index], draw.applied, policy.magnitude[draw.index], offset, strict=True)
        row = [(name, OPERATIONS[name].value(m + d)) for name, applied, m, d in places if applied]
        return draw._replace(row=tuple((name, value) for name, value in row if value), offset=offset)

    def draw(self) -> Draw:
        """Returns the student's next draw."""
        rng = self._random('num_draws')
        return self._draw(rng, self.policy(), Chance.draw(rng))

    def sample(self, count: int | None = None) -> list[Draw]:
        """Returns draws to score: ``count`` sub-policies, by default ``policy_draws``, each at m + d and at m - d.

        The two follow each other. A draw whose ``row`` is empty is the identity. What is random about the
        operations is the same for all.
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
        """d, such that m + d and m - d are in the range."""
        return min(self.SYMMETRIC_STEP if OPERATIONS[name].symmetric else self.STEP, magnitude, 1 - magnitude)

    def refine(self, draw: Draw, features: Features) -> Features:
        """Returns the features as a draw refines them, constants, or the input itself where it is the identity."""
        if not draw.row:
            return features
        levels = _levels(features)
        refined = [new[0].to(old.dtype) for new, old in zip(
            apply_operations(levels, [draw.row], draw.chance), levels, strict=True)]
        return refined[0] if isinstance(features, Tensor) else type(features)(refined)

    def forward(self, features: Features) -> Features:
        """In training, draws and refines all levels alike; in evaluation and while waiting, returns the input."""
        if not self.training or self.waiting:
            return features
        self.last_draw = self.draw()
        return self.refine(self.last_draw, features)

    # Learning

    def _zero(self) -> Tensor:
        return self._flat()[:0].sum()

    def policy_loss(self, t_features: Features, s_features: Features) -> Tensor:
        """``1/2 mean((s(F_T) - F_S)^2)``, the mean over levels, over draws of its own.

        Computed in float32 at least. Its gradient reaches the policy only, and all of it at every call. The loss
        and its gradient are zero unless the policy is searching, and with the objective ``agreement``.

        Args:
            t_features: The teacher's features.
            s_features: The student's, of the same shapes.

        Raises:
            ValueError: Number or shapes of the features differ.
        """
        if not self.searching or self.objective != 'similarity':
            return self._zero()
        t_levels, s_levels = _levels(t_features), _levels(s_features)
        shapes = [[tuple(x.shape) for x in levels] for levels in (t_levels, s_levels)]
        if shapes[0] != shapes[1]:
            raise ValueError('s_features: must have the shapes of the teacher\'s features, '
                             f'{shapes[0]}, got {shapes[1]}')
        if not len(t_levels[0]):
            return self._zero()
        draws = self.sample()
        samples = self.next_samples(len(t_levels[0]))
        losses, inner = self._half_errors(draws, [x[samples] for x in t_levels], [x[samples] for x in s_levels])
        return self.score_loss(draws, -losses, -inner)

    def next_samples(self, batch: int) -> slice:
        """Returns the samples that this search step sees, another part of the batch at every step."""
        count = max(1, batch // self.policy_draws)
        start = (self._read('num_searches') - 1) % (batch // count) * count
        return slice(start, start + count)

    @torch.no_grad()
    def _half_errors(self, draws: Sequence[Draw], t_levels: Sequence[Tensor],
                     s_levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns ``L_aug`` of every draw, and the part of it at positions that a pair of draws fills from inside."""
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
        """Returns a loss whose gradient raises the scores that are expected of the policy.

        Its value is the negative mean score. Scores that are not finite, as after an overflow, teach nothing.

        Args:
            draws: From :meth:`sample`, all of a call.
            scores: One number a draw, higher is better.
            magnitude_scores: What the magnitudes learn from instead.

        Raises:
            ValueError: There is not one score a draw, or the draws are no pairs of :meth:`sample`.
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
            raise ValueError(f'scores: must be one number for each of the draws of sample(), at least 2 pairs, '
                             f'got {tuple(scores.shape)} for {len(draws)} draws')
        return scores.detach().to(self.alpha)

    def _derivatives(self, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
        """Returns what each score counts in the gradients of (alpha, beta), (2 D, S + S K), and of m, (2 D, S K)."""
        policy, count = self.policy(), len(draws)
        alpha = np.tile(-np.asarray(policy.probability), (count, 1))
        beta, magnitude = np.zeros((2, *alpha.shape, len(policy.magnitude[0])))
        for i, draw in enumerate(draws):
            alpha[i, draw.index] += 1
            beta[i, draw.index] = np.asarray(draw.applied) - np.asarray(policy.application[draw.index])
            for k, (m, offset) in enumerate(zip(policy.magnitude[draw.index], draw.offset, strict=True)):
                if offset:
                    magnitude[i, draw.index, k] = m * (1 - m) / offset
        # A pair's score less the mean of the other pairs is count / (count - 2) times its score less the mean of all.
        selection = np.concatenate((alpha, beta.reshape(count, -1)), 1) / (count - 2)
        return selection, magnitude.reshape(count, -1) / count

    # Reading it

    def state(self) -> dict[str, float]:
        """For logs: how undecided selection is (1: uniform, 0: certain), and of each operation the chance
        that a batch gets it and its mean value, signed, over the sub-policies as they are selected."""
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
        """A table of the sub-policies, the likeliest first, with values in the operations' units."""
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
            raise ValueError(f'dafa.operations: there is no {name!r}; {closest(name, OPERATIONS)}')
    return list(names)


def _logit(field: str, probability: float) -> float:
    check_number(field, probability, above=0, most=1)
    if probability == 1:
        raise ValueError(f'{field} must lie between 0 and 1, both excluded, got {probability!r}')
    return math.log(probability / (1 - probability))
