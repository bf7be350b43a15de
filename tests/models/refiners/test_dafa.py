"""The policy: its draws, its unbiased gradients against full enumeration, and a search that must succeed."""
import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.runner.checkpoint import load_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd_plugin.models.refiners import DAFA
from mmkd_plugin.models.refiners.dafa import Draw
from mmkd_plugin.models.refiners.feature_ops import OPERATIONS, Chance, apply_operations
from mmkd_plugin.registry import MODELS

MOVING = ['ShearX', 'TranslateY', 'Rotate']


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(dafa, t, s):
    """The gradients of one search step."""
    dafa.zero_grad()
    dafa.policy_loss(t, s).backward()
    return [p.grad.clone() for p in dafa.parameters()]


def small_dafa(operations=('ShearX', 'TranslateY', 'Cutout'), **kwargs):
    """Three sub-policies whose parameters all differ, in float64."""
    dafa = DAFA(operations, **kwargs).double()
    for i, p in enumerate(dafa.parameters()):
        p.data.copy_(features(*p.shape, seed=i))
    return dafa


# Construction

def test_default_is_all_36_pairs_of_nine_operations_at_the_papers_start():
    dafa = MODELS.build(dict(type='DAFA'))
    assert len(dafa.names) == len(set(dafa.names)) == 36 and 'ShearX+Rotate' in dafa.names
    assert {name: p.shape for name, p in dafa.named_parameters()} == {
        'alpha': (36,), 'beta': (36, 2), 'magnitude': (36, 2)}
    policy = dafa.policy()
    assert policy.probability == pytest.approx([1 / 36] * 36)
    assert set(sum(policy.application + policy.magnitude, [])) == {0.5}
    assert dafa.searching and not dafa.waiting and not dafa.frozen


def test_initial_values_are_given_as_probabilities_and_magnitudes():
    policy = DAFA(beta_init=0.9, magnitude_init=0.2).policy()
    assert policy.application[3] == pytest.approx([0.9, 0.9])
    assert policy.magnitude[3] == pytest.approx([0.2, 0.2])


def test_some_of_the_sub_policies_at_random_but_reproducibly():
    first, again, other = (DAFA(num_sub_policies=8, seed=s).names for s in (1, 1, 2))
    assert first == again != other and len(set(first)) == 8
    torch.manual_seed(5)
    unstated = DAFA(num_sub_policies=8).names
    torch.manual_seed(6)
    assert DAFA(num_sub_policies=8).names == unstated  # else a resumed run could have other ones
    assert DAFA(sub_policy_size=3, num_sub_policies=84).magnitude.shape == (84, 3)


@pytest.mark.parametrize('wrong, words', [
    (dict(operations=['Rotat']), ['dafa.operations', "'Rotat'", 'closest are: Rotate']),
    (dict(operations=['zzz']), ['dafa.operations', "'zzz'", 'closest are: ShearX']),
    (dict(operations=[]), ['dafa.operations', r'\[\]']),
    (dict(operations=['Noise', 'Noise']), ['dafa.operations', 'different']),
    (dict(operations='Noise'), ['dafa.operations', 'list']),
    (dict(sub_policy_size=10), ['dafa.sub_policy_size', '<= 9', '10']),
    (dict(sub_policy_size=1.5), ['dafa.sub_policy_size', '1.5']),
    (dict(num_sub_policies=37), ['dafa.num_sub_policies', '<= 36', '37']),
    (dict(beta_init=1.), ['dafa.beta_init', 'between 0 and 1', '1.0']),
    (dict(magnitude_init=-0.1), ['dafa.magnitude_init', '-0.1']),
    (dict(alpha_init=float('nan')), ['dafa.alpha_init', 'nan']),
    (dict(objective='agrement'), ['dafa.objective', "'agrement'", 'agreement']),
    (dict(policy_draws=1), ['dafa.policy_draws', '>= 2', '1']),
    (dict(seed=-1), ['dafa.seed', '>= 0', '-1']),
])
def test_wrong_arguments_are_named(wrong, words):
    for word in words:
        with pytest.raises(ValueError, match=word):
            DAFA(**wrong)


# The student's draw

@pytest.mark.parametrize('idle', [lambda dafa: dafa.eval(), lambda dafa: dafa.wait()])
def test_eval_and_waiting_are_the_identity_and_draw_nothing(idle):
    dafa, x = DAFA(), [features(2, 3, 4, 4)]
    idle(dafa)
    assert dafa(x) is x and dafa.num_draws == 0 and dafa.last_draw is None


@pytest.mark.parametrize('kind', [list, tuple])
def test_all_levels_get_the_same_draw_in_the_same_container(kind):
    dafa = DAFA(['TranslateX', 'Cutout', 'ChannelShuffle'], beta_init=0.999, magnitude_init=0.8)
    x = features(2, 6, 8, 8)
    for _ in range(10):
        refined = dafa(kind([x, x.clone()]))
        assert isinstance(refined, kind) and refined[0].equal(refined[1]) and not refined[0].equal(x)
    assert dafa.num_draws == 10
    assert isinstance(dafa(x), torch.Tensor)


def test_only_the_drawn_operations_run_in_order_and_at_their_values():
    dafa, x, seen = small_dafa(), features(2, 3, 6, 7, dtype=torch.float64), set()
    for _ in range(60):
        refined, draw = dafa(x), dafa.last_draw
        row = [(name, OPERATIONS[name].value(float(dafa.magnitude[draw.index, k].sigmoid())))
               for k, name in enumerate(dafa.sub_policies[draw.index]) if draw.applied[k]]
        torch.testing.assert_close(refined, apply_operations([x], [row], draw.chance)[0][0])
        seen.add((draw.index, draw.applied))
    assert len(seen) > 4


def test_where_nothing_is_applied_the_very_tensors_come_back():
    x = [features(1, 2, 3, 3)]
    assert DAFA(beta_init=1e-6)(x) is x
    centred = DAFA(MOVING, beta_init=0.999)  # applied, at the value 0
    assert centred(x) is x and centred.last_draw.applied == (True, True)


def test_refined_features_are_constants():
    x = features(2, 3, 6, 7).requires_grad_()
    refined = DAFA(['Noise', 'ChannelDrop'], beta_init=0.999)(x)
    assert not refined.requires_grad and not refined.equal(x)


def test_draws_depend_on_seed_and_counter_alone():
    first, second, other = DAFA(seed=3), DAFA(seed=3), DAFA(seed=4)
    draws = [first.draw() for _ in range(30)]
    torch.manual_seed(99)
    second.sample()  # the policy's draws leave the student's alone
    assert [second.draw() for _ in range(30)] == draws
    assert [other.draw() for _ in range(30)] != draws
    assert len({draw.index for draw in draws}) > 10


def test_the_seed_is_the_runs_unless_it_is_stated():
    def draws(run, **kwargs):
        torch.manual_seed(run)
        dafa = DAFA(**kwargs)
        return [dafa.draw() for _ in range(5)]

    assert draws(1) == draws(1) == draws(7, seed=1) != draws(2)
    assert draws(1, seed=3) == draws(2, seed=3)
    torch.manual_seed(-1)
    assert DAFA().seed >= 0  # torch's has 64 bits


def test_draws_follow_the_probabilities():
    dafa = small_dafa()
    draws, policy = [dafa.draw() for _ in range(4000)], dafa.policy()
    for i, p in enumerate(policy.probability):
        mine = [draw for draw in draws if draw.index == i]
        assert len(mine) / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** .5)
        for k, q in enumerate(policy.application[i]):
            share = sum(draw.applied[k] for draw in mine) / len(mine)
            assert share == pytest.approx(q, abs=4 * (q * (1 - q) / len(mine)) ** .5)


# The policy's draws

def test_samples_are_pairs_at_magnitudes_on_both_sides():
    dafa, signs = small_dafa(), set()
    policy = dafa.policy()
    for _ in range(20):
        draws = dafa.sample()
        assert len(draws) == 16 and len({draw.chance for draw in draws}) == 1
        for plus, minus in zip(draws[::2], draws[1::2]):
            assert (plus.index, plus.applied) == (minus.index, minus.applied)
            for k, (name, applied) in enumerate(zip(dafa.sub_policies[plus.index], plus.applied)):
                d, m = plus.offset[k], policy.magnitude[plus.index][k]
                assert d == -minus.offset[k] and bool(d) == applied
                assert abs(d) in (0., 0.01 if name in MOVING else 0.05)
                if applied:
                    assert (name, OPERATIONS[name].value(m + d)) in plus.row
                    assert (name, OPERATIONS[name].value(m - d)) in minus.row
            signs.add(tuple(np.sign(plus.offset)))
    assert signs == set(itertools.product((1, 0, -1), repeat=2))
    assert len(dafa.sample(3)) == 6 and dafa.num_searches == 21 and dafa.num_draws == 0


def test_magnitudes_near_the_ends_stay_in_the_range():
    dafa = DAFA(['Rotate'], sub_policy_size=1, magnitude_init=0.996, beta_init=0.999)
    values = {round(value, 4) for draw in dafa.sample() for _, value in draw.row}
    assert values == {30., 30 * (2 * 0.992 - 1)}


# Resuming

@pytest.mark.parametrize('load', [lambda dafa, state: dafa.load_state_dict(state), load_state_dict])
@pytest.mark.parametrize('phase', ['wait', 'start_search', 'freeze'])
def test_resume_continues_exactly(load, phase):
    t, s = features(2, 3, 6, 7), features(2, 3, 6, 7, seed=1)
    dafa = DAFA(seed=3)
    for _ in range(5):
        dafa(t)
        for p, gradient in zip(dafa.parameters(), step(dafa, t, s)):
            p.data -= 10 * gradient
    getattr(dafa, phase)()
    torch.manual_seed(77)
    resumed = DAFA()
    resumed.freeze(), resumed.draw()  # a stale host copy that loading must replace
    load(resumed, dafa.state_dict())
    assert all(getattr(resumed, state) == getattr(dafa, state) for state in ('waiting', 'searching', 'frozen'))
    assert all(torch.is_tensor(v) for v in dafa.state_dict().values())
    for _ in range(5):
        assert dafa(t).equal(resumed(t)) and (dafa.waiting or dafa.last_draw == resumed.last_draw)
        assert all(a.equal(b) for a, b in zip(step(dafa, t, s), step(resumed, t, s), strict=True))


def test_a_checkpoint_of_the_old_policy_is_refused_in_a_sentence():
    state = {name: torch.zeros(36, 2) for name in ('alpha', 'beta', 'magnitude')}
    state |= dict(num_draws=torch.tensor(3), is_frozen=torch.tensor(True), mean_loss=torch.tensor(.1))
    outer = torch.nn.ModuleDict(dict(dafa=DAFA()))
    with pytest.raises(ValueError, match='^dafa: .* 0.1, .*random signs.*student_ckpt'):
        outer.load_state_dict({f'dafa.{name}': value for name, value in state.items()})


def test_copies_draw_alike():
    dafa, x = DAFA(), features(2, 3, 4, 4)
    dafa(x), step(dafa, x, x)
    assert copy.deepcopy(dafa).draw() == dafa.draw()


# What a step costs

class Operations(TorchDispatchMode):
    """Counts tensor operations that are not views, and reads of a tensor's value."""

    VIEWS = {'view', 'expand', 'unsqueeze', 'split', 'split_with_sizes', 'select', 'slice', 'unbind', 'detach',
             'alias', 'transpose', 'lift_fresh', 'promote_types'}

    def __init__(self):
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name not in self.VIEWS
        self.reads += name == '_local_scalar_dense'
        return func(*args, **(kwargs or {}))


def pyramid(seed=0, samples=2):
    return [features(samples, 6, size, size + 1, seed=seed) for size in (16, 8, 4, 2, 1)]


def test_a_search_step_on_five_levels_takes_at_most_100_operations():
    dafa, t, s = DAFA(seed=0), pyramid(), pyramid(1)
    dafa.policy_loss(t, s)  # makes the grid of these sizes
    worst = 0
    for _ in range(20):
        with Operations() as operations:
            dafa.policy_loss(t, s).backward()
        worst = max(worst, operations.count)
    assert 80 < worst <= 100  # 98: draws with every kind of operation are among them


def test_the_students_draw_takes_few_operations_and_the_identity_only_its_count():
    dafa, t, counts = DAFA(seed=0), pyramid(), {}
    dafa.freeze()
    dafa(t)
    for _ in range(300):
        with Operations() as operations:
            dafa(t)
        counts.setdefault(len(dafa.last_draw.row), set()).add(operations.count)
    assert counts[0] == {1} and max(counts[2]) <= 32 and set(counts) == {0, 1, 2}


def test_no_value_is_read_from_the_device_in_a_step(monkeypatch):
    """The parameters are read from there on the CPU alone; elsewhere, `fetch` gets them ahead."""
    dafa, t, s = DAFA(), pyramid(), pyramid(1)
    dafa(t), dafa.policy_loss(t, s)  # reads the buffers, once
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda self: pytest.fail('read from the device'))
    values = dafa._flat().detach()
    for frozen in (False, True):
        dafa._fetched = (values, Done(), dafa._versions())
        if frozen:
            dafa.freeze()
        with Operations() as operations:
            for _ in range(20):
                dafa(t), dafa.policy_loss(t, s)
        assert operations.reads == 0 and operations.count > 100


class Done:
    """Of an event, that it has passed."""

    def synchronize(self):
        pass


def test_fetched_values_count_until_an_optimizer_changes_the_parameters():
    dafa = DAFA()
    dafa._fetched = (torch.arange(180.) / 180, Done(), dafa._versions())
    assert dafa.policy().probability[35] == pytest.approx(dafa.policy().probability[0] * np.exp(35 / 180))
    optimizer = torch.optim.SGD(dafa.parameters(), lr=1.)
    step(dafa, features(2, 3, 6, 7), features(2, 3, 6, 7, seed=1))
    optimizer.step()
    assert dafa.policy() == DAFA.policy(copy.deepcopy(dafa)) and dafa.policy().magnitude[0][0] < 0.6


@pytest.mark.parametrize('batch, expected', [(1, [0, 0, 0]), (3, [0, 1, 2]), (8, [0, 1, 2]), (17, [0, 2, 4])])
def test_every_step_sees_other_samples_and_as_many_as_one_batch_in_all(batch, expected, monkeypatch):
    dafa, t, seen = DAFA(), torch.arange(float(batch)).view(-1, 1, 1, 1), []
    monkeypatch.setattr(dafa, '_half_errors', lambda draws, t, s: (seen.append(t[0].flatten().tolist()),
                                                                   (torch.zeros(16), torch.zeros(16)))[1])
    for _ in range(3):
        dafa.policy_loss(t, t)
    assert [samples[0] for samples in seen] == expected
    assert {len(samples) for samples in seen} == {max(1, batch // 8)}


# The loss of the paper

def enumerated(dafa, t, s, draws):
    return [0.5 * sum(((apply_operations([a], [draw.row], draw.chance)[0][0] - b) ** 2).mean()
                      for a, b in zip(t, s)) / len(t) for draw in draws]


def test_value_is_half_the_mean_square_over_levels_and_draws():
    dafa = DAFA([name for name in OPERATIONS if name != 'Noise'])  # whose random numbers depend on all levels
    t, s = pyramid(samples=1), pyramid(1, samples=1)
    for _ in range(5):
        draws = copy.deepcopy(dafa).sample()
        torch.testing.assert_close(dafa.policy_loss(t, s), sum(enumerated(dafa, t, s, draws)) / len(draws))


def test_its_gradient_reaches_the_policy_and_nobody_else():
    dafa = DAFA()
    t, s = features(2, 3, 6, 7).requires_grad_(), features(2, 3, 6, 7, seed=1).requires_grad_()
    assert all(gradient.any() for gradient in step(dafa, t, s))
    assert t.grad is None and s.grad is None
    with torch.no_grad():  # whatever the caller records, the draw is no part of it
        assert not dafa.policy_loss(t, s).requires_grad


@pytest.mark.parametrize('idle', ['wait', 'freeze', 'agreement'])
def test_all_parameters_have_exact_zeros_where_nothing_is_learned(idle):
    dafa, x = DAFA(objective='agreement' if idle == 'agreement' else 'similarity'), features(2, 3, 6, 7)
    if idle != 'agreement':
        getattr(dafa, idle)()
    gradients = step(dafa, x, x + 1)
    assert len(gradients) == 3 and not any(g.any() for g in gradients)
    assert dafa.policy_loss(x, x + 1) == 0 and dafa.num_searches == 0


def test_a_frozen_policy_is_still_sampled():
    dafa, x = DAFA(), features(2, 3, 6, 7)
    dafa.freeze()
    assert len({dafa(x) is not None and dafa.last_draw.index for _ in range(20)}) > 5


@pytest.mark.parametrize('shape', [(2, 3, 1, 1), (1, 1, 1, 1), (2, 5, 3, 17), (20, 2, 2, 2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_any_size_and_precision(shape, dtype):
    dafa, t, s = DAFA(beta_init=0.8), features(*shape).to(dtype), features(*shape, seed=1).to(dtype)
    for _ in range(10):
        with torch.autocast('cpu', torch.bfloat16):
            refined, loss = dafa(t), dafa.policy_loss(t, s)
        loss.backward()
        assert refined.dtype == dtype and refined.shape == t.shape and refined.isfinite().all()
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in dafa.parameters())


def test_constant_huge_and_empty_features():
    dafa = DAFA(beta_init=0.9)
    for x in (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 1e18), torch.zeros(0, 3, 4, 4)):
        assert dafa(x).isfinite().all()
        assert all(g.isfinite().all() for g in step(dafa, x, 0.5 * x))


def test_an_overflow_teaches_nothing():
    dafa, x = DAFA(), features(1, 2, 3, 3)
    assert not any(g.any() for g in step(dafa, x, x + float('inf')))


def test_wrong_features_and_scores_are_refused():
    dafa, x = DAFA(), features(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r'\[\(2, 3, 4, 4\)\].*\[\(1, 3, 4, 4\)\]'):
        dafa.policy_loss([x], [x[:1]])
    draws = dafa.sample(2)
    for wrong_draws, scores in ((draws, [1., 2.]), (draws[:2], [1., 2.]), (draws[:3], [1.] * 3)):
        with pytest.raises(ValueError, match='one number for each draw'):
            dafa.score_loss(wrong_draws, scores)


# Its gradient

def every_pair(dafa, chance):
    """All pairs of draws and their probabilities, as a differentiable function of the parameters."""
    probability, application, policy = dafa.alpha.softmax(0), dafa.beta.sigmoid(), dafa.policy()
    for index, names in enumerate(dafa.sub_policies):
        for applied in itertools.product((False, True), repeat=2):
            p = probability[index]
            for k in range(2):
                p = p * (application[index, k] if applied[k] else 1 - application[index, k])
            for signs in itertools.product(*((1, -1) if on else (1, ) for on in applied)):
                steps = [sign * dafa._step(name, m) * on for sign, name, m, on in
                         zip(signs, names, policy.magnitude[index], applied)]
                draw = Draw(index, applied, (), chance)
                yield p / 2**sum(applied), [dafa._at(draw, policy, tuple(way * d for d in steps)) for way in (1, -1)]


def test_the_estimate_averaged_over_all_draws_is_the_exact_gradient(monkeypatch):
    """Of alpha and beta; that of the magnitudes is each place's symmetric difference, as likely as it is drawn."""
    dafa, chance = small_dafa(policy_draws=2), Chance((0.3, 0.6), 5)
    t, s = ([features(1, 2, 4, 5, seed=i, dtype=torch.float64)] for i in (5, 6))
    pairs = list(every_pair(dafa, chance))
    loss = {draw: float(enumerated(dafa, t, s, [draw])[0]) for _, pair in pairs for draw in pair}
    expected = torch.autograd.grad(sum(p * (loss[a] + loss[b]) / 2 for p, (a, b) in pairs), (dafa.alpha, dafa.beta))
    total = [torch.zeros_like(p) for p in dafa.parameters()]
    for (p, first), (q, second) in itertools.product(pairs, repeat=2):
        monkeypatch.setattr(dafa, 'sample', lambda draws=tuple(first + second): list(draws))
        monkeypatch.setattr(dafa, 'next_samples', lambda batch: slice(None))
        for sum_, gradient in zip(total, step(dafa, t, s), strict=True):
            sum_ += (p * q).detach() * gradient
    for ours, exact in zip(total, expected):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total[2], magnitude_gradient(dafa, t, s, pairs), rtol=1e-9, atol=1e-12)


def magnitude_gradient(dafa, t, s, pairs):
    """By the definition: differences of losses over the cells that are filled from inside on both sides."""
    total = torch.zeros_like(dafa.magnitude)
    for p, pair in pairs:
        maps = [apply_operations(t, [draw.row], draw.chance)[0][0] for draw in pair]
        ones = [apply_operations([torch.ones_like(t[0])], [[one for one in draw.row if one[0] != 'Cutout']],
                                 draw.chance)[0][0] for draw in pair]
        valid = (ones[0] > 1 - 1e-4) & (ones[1] > 1 - 1e-4)
        plus, minus = (0.5 * ((x - s[0]) ** 2 * valid).mean() for x in maps)
        for k, d in enumerate(pair[0].offset):
            if d:
                m = dafa.magnitude[pair[0].index, k].sigmoid()
                total[pair[0].index, k] += (p * (plus - minus) / (2 * d) * m * (1 - m)).detach()
    return total


def test_score_loss_is_the_same_estimate_for_any_score():
    """Against autograd through the log-probabilities, with the other pairs' mean as the baseline."""
    dafa = small_dafa()
    draws, scores = dafa.sample(5), features(10, seed=9, dtype=torch.float64)
    by_pair, surrogate = scores.view(5, 2).mean(1), 0
    for i, draw in enumerate(draws[::2]):
        logits = dafa.beta[draw.index]
        log_p = dafa.alpha.log_softmax(0)[draw.index] + sum(
            F.logsigmoid(b if applied else -b) for b, applied in zip(logits, draw.applied))
        surrogate += log_p * (by_pair[i] - (by_pair.sum() - by_pair[i]) / 4) / 5
        for k, d in enumerate(draw.offset):
            if d:
                surrogate += dafa.magnitude[draw.index, k].sigmoid() * (scores[2 * i] - scores[2 * i + 1]) / (2 * d) / 5
    expected = torch.autograd.grad(-surrogate, list(dafa.parameters()))
    loss = dafa.score_loss(draws, list(scores))
    torch.testing.assert_close(loss, -scores.mean())
    for ours, exact in zip(torch.autograd.grad(loss, list(dafa.parameters())), expected):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize('name', MOVING)
def test_mirroring_both_maps_flips_the_gradient_at_the_identity(name):
    dafa = DAFA([name], sub_policy_size=1, beta_init=0.999, policy_draws=2).double()
    t, s = (features(1, 3, 7, 9, seed=i, dtype=torch.float64) for i in (0, 1))
    mirrored = [x.flip(-2 if name == 'TranslateY' else -1) for x in (t, s)]
    there, back = step(dafa, t, s)[2], step(dafa, *mirrored)[2]
    assert there.abs() > 1e-5
    torch.testing.assert_close(there, -back)


@pytest.mark.parametrize('cell', range(9))
def test_the_gradient_of_a_translation_is_the_slope_of_the_map_and_nothing_at_its_border(cell):
    """0, 1, 4, ... 64 in steps of a cell: the one-sided derivative with zeros outside ends in 15, -64."""
    dafa = DAFA(['TranslateX'], sub_policy_size=1, beta_init=0.999999, policy_draws=2).double()
    t = torch.arange(9., dtype=torch.float64).square().view(1, 1, 1, 9)
    s = t.clone()
    s[..., cell] -= 1.  # L is 1/2 (s(t) - (t - 1))^2 / 9 there: its derivative is that of s(t) at the cell over 9
    got = step(dafa, t, s)[2] - step(dafa, t, t)[2]
    cells_per_magnitude = -2 * 0.45 * 9
    slope = 2. * cell if 0 < cell < 8 else 0.
    assert float(got) == pytest.approx(0.25 * cells_per_magnitude * slope / 9, abs=1e-9)  # 0.25: of the sigmoid


@pytest.mark.parametrize('name, sign', [('Cutout', 1), ('ChannelDrop', 1), ('ChannelShuffle', 1), ('Noise', 1)])
def test_what_cannot_be_moved_back_shrinks_where_the_student_is_the_teacher(name, sign):
    dafa, x = DAFA([name], sub_policy_size=1, beta_init=0.999), features(1, 32, 16, 16) + 1
    total = sum(step(dafa, x, x)[2] for _ in range(20))
    assert total * sign > 0  # descent lowers the magnitude


# Search

def blobs(generator):
    return F.interpolate(torch.randn(2, 8, 4, 5, generator=generator), (8, 10), mode='bicubic')


@pytest.mark.parametrize('name, value', [('TranslateX', 0.2), ('ShearY', -0.2)])
def test_search_finds_the_planted_operation_its_value_and_its_sign(name, value):
    """Among all nine, from the identity. The others move nothing in that direction."""
    generator, dafa = torch.Generator().manual_seed(0), DAFA(sub_policy_size=1, seed=1)
    optimizer = torch.optim.Adam(dafa.parameters(), lr=3e-2, betas=(0.5, 0.999))
    for _ in range(250):
        t = blobs(generator)
        optimizer.zero_grad()
        dafa.policy_loss(t, apply_operations([t], [[(name, value)]], Chance((0., 0.), 0))[0][0]).backward()
        optimizer.step()
    found, policy = dafa.names.index(name), dafa.policy()
    assert policy.probability[found] == max(policy.probability) > 0.5, dafa.summary()
    assert policy.application[found][0] > 0.75
    assert OPERATIONS[name].value(policy.magnitude[found][0]) == pytest.approx(value, abs=0.1 * OPERATIONS[name].limit)


# Reading it

def test_summary_and_state_show_the_policy_by_name_with_signed_values():
    dafa = DAFA(['ShearX', 'Rotate', 'Noise'])
    dafa.alpha.data[dafa.names.index('Rotate+Noise')] = 3.
    dafa.magnitude.data[dafa.names.index('Rotate+Noise')] = torch.tensor([-100., 0.])
    lines = dafa.summary().split('\n')
    assert len(lines) == 4 and lines[1].split() == [
        'Rotate+Noise', '90.94%', 'Rotate', '50%,', '-30', 'degrees;', 'Noise', '50%,', '0.05', 'standard',
        'deviations']
    assert '+0 cells per cell' in lines[2]
    state = dafa.state()
    assert set(state) == {'entropy'} | {f'{key}/{name}' for key in ('p', 'value') for name in dafa.operations}
    assert state['p/Noise'] == pytest.approx(0.5 * (0.9093 + 0.0453), abs=1e-3)
    assert state['value/Rotate'] == pytest.approx(-30 * 0.9093 / 0.9546, abs=0.05)
    assert DAFA().state()['entropy'] == pytest.approx(1)


def test_large_logits_stay_probabilities():
    dafa = DAFA()
    dafa.alpha.data[0], dafa.beta.data[0, 0] = 1e4, -1e4
    policy = dafa.policy()
    assert policy.probability[0] == 1 and policy.application[0] == [0., 0.5]
    assert random.Random(0).choices(range(36), policy.probability) == [0]
