"""The policy: its draws, its unbiased gradients against full enumeration, and a search that must succeed."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner.checkpoint import load_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd_plugin.models.refiners import DAFA
from mmkd_plugin.models.refiners.dafa import Draw
from mmkd_plugin.models.refiners.feature_ops import OPERATIONS, Dice
from mmkd_plugin.registry import MODELS

SIGNED = ['ShearX', 'TranslateY', 'Rotate']


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(dafa, t, s):
    """One search step's refined features and policy gradients."""
    dafa.zero_grad()
    refined = dafa(t)
    dafa.policy_loss(s).backward()
    return refined, [p.grad.clone() for p in dafa.parameters()]


def small_dafa(**kwargs):
    """Three sub-policies whose parameters all differ, in float64, past the first step of the baseline."""
    dafa = DAFA(SIGNED, **kwargs).double()
    for i, p in enumerate(dafa.parameters()):
        p.data.copy_(features(*p.shape, seed=i))
    dafa.mean_loss.fill_(0.3)
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


def test_initial_values_are_given_as_probabilities_and_magnitudes():
    policy = DAFA(beta_init=0.9, magnitude_init=0.2).policy()
    assert policy.application[3] == pytest.approx([0.9, 0.9])
    assert policy.magnitude[3] == pytest.approx([0.2, 0.2])


def test_some_of_the_sub_policies_at_random_but_reproducibly():
    first, again, other = (DAFA(num_sub_policies=8, seed=s).names for s in (1, 1, 2))
    assert first == again != other and len(set(first)) == 8
    assert DAFA(sub_policy_size=3, num_sub_policies=84).magnitude.shape == (84, 3)


@pytest.mark.parametrize('wrong, words', [
    (dict(operations=['Rotat']), ['operations', "'Rotat'", 'did you mean Rotate']),
    (dict(operations=['zzz']), ['operations', "'zzz'", 'choose from ShearX']),
    (dict(operations=[]), ['operations', r'\[\]']),
    (dict(operations=['Noise', 'Noise']), ['operations', 'different']),
    (dict(operations='Noise'), ['operations', 'list']),
    (dict(sub_policy_size=10), ['sub_policy_size', '1 to 9', '10']),
    (dict(sub_policy_size=1.5), ['sub_policy_size', '1.5']),
    (dict(num_sub_policies=37), ['num_sub_policies', '1 to 36', '37']),
    (dict(beta_init=1.), ['beta_init', 'between 0 and 1', '1.0']),
    (dict(magnitude_init=-0.1), ['magnitude_init', '-0.1']),
])
def test_wrong_arguments_are_named(wrong, words):
    for word in words:
        with pytest.raises(ValueError, match=word):
            DAFA(**wrong)


# Drawing and refining

def test_eval_is_the_identity_and_draws_nothing():
    dafa, x = DAFA().eval(), [features(2, 3, 4, 4)]
    assert dafa(x) is x and dafa.num_draws == 0 and dafa.last_draw is None


@pytest.mark.parametrize('kind', [list, tuple])
def test_all_levels_get_the_same_draw_in_the_same_container(kind):
    dafa, x = DAFA(['TranslateX', 'Cutout', 'ChannelShuffle'], beta_init=0.999), features(2, 6, 8, 8)
    for _ in range(10):
        refined = dafa(kind([x, x.clone()]))
        assert isinstance(refined, kind) and refined[0].equal(refined[1]) and not refined[0].equal(x)
    assert dafa.num_draws == 10
    assert isinstance(dafa(x), torch.Tensor)


def test_only_the_drawn_operations_run_in_order_and_at_their_magnitudes():
    dafa, x = small_dafa(), features(2, 3, 6, 7, dtype=torch.float64)
    for _ in range(20):
        refined, expected = dafa(x), x
        index, applied, dice = dafa.last_draw
        for k, name in enumerate(dafa.sub_policies[index]):
            if applied[k]:
                expected = OPERATIONS[name](expected, float(dafa.magnitude[index, k].sigmoid()), dice[name])
        torch.testing.assert_close(refined, expected)


def test_draws_depend_on_seed_and_counter_alone():
    first, second, other = DAFA(seed=3), DAFA(seed=3), DAFA(seed=4)
    draws = [first.draw() for _ in range(30)]
    torch.manual_seed(99)
    assert [second.draw() for _ in range(30)] == draws
    assert [other.draw() for _ in range(30)] != draws
    assert len({draw.index for draw in draws}) > 10


def test_draws_follow_the_probabilities():
    dafa = small_dafa()
    draws, policy = [dafa.draw() for _ in range(4000)], dafa.policy()
    for i, p in enumerate(policy.probability):
        mine = [draw for draw in draws if draw.index == i]
        assert len(mine) / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** .5)
        for k, q in enumerate(policy.application[i]):
            share = sum(draw.applied[k] for draw in mine) / len(mine)
            assert share == pytest.approx(q, abs=4 * (q * (1 - q) / len(mine)) ** .5)


@pytest.mark.parametrize('load', [lambda dafa, state: dafa.load_state_dict(state), load_state_dict])
@pytest.mark.parametrize('frozen', [False, True])
def test_resume_continues_exactly(load, frozen):
    t, s = features(2, 3, 6, 7), features(2, 3, 6, 7, seed=1)
    dafa = DAFA()
    for _ in range(5):
        step(dafa, t, s)
        for p in dafa.parameters():
            p.data -= 10 * p.grad
    if frozen:
        dafa.freeze()
    resumed = DAFA()
    resumed.freeze(), resumed.draw()  # a stale host copy that loading must replace
    load(resumed, dafa.state_dict())
    assert resumed.frozen == frozen and all(torch.is_tensor(v) for v in dafa.state_dict().values())
    for _ in range(5):
        ours, theirs = step(dafa, t, s), step(resumed, t, s)
        assert dafa.last_draw == resumed.last_draw and ours[0].equal(theirs[0])
        assert all(a.equal(b) for a, b in zip(ours[1], theirs[1], strict=True))


class HostReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_host_read_a_step_in_search_and_none_once_frozen(monkeypatch):
    reads = HostReads()
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda self: (setattr(reads, 'count', reads.count + 1),
                                                           original(self))[1])
    dafa, t = DAFA(), [features(2, 4, 6, 7), features(2, 4, 3, 4)]
    for frozen in (False, True):
        if frozen:
            dafa.freeze(), dafa.draw()
        with reads:
            for _ in range(40):  # enough for every operation
                before = reads.count
                dafa(t), dafa.policy_loss(t)
                assert reads.count - before == (0 if frozen else 1)


@pytest.mark.parametrize('shape', [(2, 3, 1, 1), (1, 1, 1, 1), (2, 5, 3, 17)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_any_size_and_precision(shape, dtype):
    dafa, t, s = DAFA(beta_init=0.8), features(*shape).to(dtype), features(*shape, seed=1).to(dtype)
    for _ in range(60):
        dafa.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            refined, loss = dafa(t), dafa.policy_loss(s)
        loss.backward()
        assert refined.dtype == dtype and refined.shape == t.shape and refined.isfinite().all()
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in dafa.parameters())


# Who sees which gradient

def test_value_is_half_the_mean_square_averaged_over_levels():
    dafa = DAFA()
    t = [features(2, 3, 6, 7), features(2, 3, 3, 4)]
    s = [features(2, 3, 6, 7, seed=1), features(2, 3, 3, 4, seed=2)]
    for _ in range(10):
        refined = dafa(t)
        expected = sum(0.5 * ((r - x) ** 2).mean() for r, x in zip(refined, s, strict=True)) / 2
        torch.testing.assert_close(dafa.policy_loss(s), expected)


def test_policy_sees_its_own_loss_only_and_nobody_else_sees_that():
    dafa = DAFA(beta_init=0.999)
    t, s = features(2, 3, 6, 7).requires_grad_(), features(2, 3, 6, 7, seed=1).requires_grad_()
    for _ in range(10):
        with torch.no_grad():  # the caller's, around the teacher: the policy's path is its own
            refined = dafa(t)
        assert not refined.requires_grad
        (refined - s).square().sum().backward()
        assert all(p.grad is None for p in dafa.parameters())
        s.grad = None
        dafa.policy_loss(s).backward()
        assert t.grad is None and s.grad is None
        assert dafa.magnitude.grad[dafa.last_draw.index].abs().min() > 0
        dafa.zero_grad()


def test_every_parameter_has_a_gradient_even_if_nothing_is_applied():
    dafa, x = DAFA(beta_init=1e-6), features(1, 2, 3, 3)
    for _ in range(3):
        refined, gradients = step(dafa, x, x + 1)
        assert refined.equal(x)
        assert all(g.isfinite().all() for g in gradients) and not gradients[2].any()
        assert gradients[0].abs().max() < 1e-6  # the loss is always its own running mean: nothing to learn


def test_frozen_policy_is_still_sampled_and_gets_exact_zeros():
    dafa, t, s = DAFA(), features(2, 3, 6, 7), features(2, 3, 6, 7, seed=1)
    step(dafa, t, s)
    dafa.freeze()
    indices = set()
    for _ in range(20):
        _, gradients = step(dafa, t, s)
        assert len(gradients) == 3 and not any(g.any() for g in gradients)
        indices.add(dafa.last_draw.index)
    assert dafa.policy_loss(s) == 0 and len(indices) > 5


def test_an_overflown_loss_does_not_enter_the_running_mean():
    dafa, x = DAFA(), features(1, 2, 3, 3)
    step(dafa, x, x + 1)
    mean = dafa.mean_loss.clone()
    step(dafa, x, x + float('inf'))
    assert mean > 0 and dafa.mean_loss.equal(mean)


def test_misuse_is_refused_and_copies_can_be_made():
    dafa, x = DAFA(), features(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match='call the DAFA module'):
        dafa.policy_loss(x)
    dafa([x])
    with pytest.raises(ValueError, match=r'\[\(2, 3, 4, 4\)\].*\[\(1, 3, 4, 4\)\]'):
        dafa.policy_loss([x[:1]])
    step(dafa, x, x)
    assert copy.deepcopy(dafa).draw() == dafa.draw()


# The gradient of alpha and beta is unbiased

def every_draw(dafa):
    """All draws and their probabilities, as a differentiable function of the parameters."""
    probability, application = dafa.alpha.softmax(0), dafa.beta.sigmoid()
    for index, names in enumerate(dafa.sub_policies):
        for applied in itertools.product((False, True), repeat=2):
            p = probability[index]
            for k in range(2):
                p = p * (application[index, k] if applied[k] else 1 - application[index, k])
            for signs in itertools.product((1., -1.), repeat=2):
                dice = {name: Dice(sign, (0., 0.), 0) for name, sign in zip(names, signs, strict=True)}
                yield p / 4, Draw(index, applied, dice)


def exact_gradients(dafa, t, s):
    """Of the expected loss, by autograd through the full enumeration."""
    expected = 0
    for p, (index, applied, dice) in every_draw(dafa):
        x = t
        for k, name in enumerate(dafa.sub_policies[index]):
            if applied[k]:
                x = OPERATIONS[name](x, dafa.magnitude[index, k].sigmoid(), dice[name])
        expected = expected + p * 0.5 * (x - s).square().mean()
    return torch.autograd.grad(expected, list(dafa.parameters()))


def test_estimate_weighted_by_enumeration_is_the_exact_gradient(monkeypatch):
    dafa = small_dafa()
    t, s = (features(1, 2, 4, 5, seed=i, dtype=torch.float64) for i in (5, 6))
    total = [torch.zeros_like(p) for p in dafa.parameters()]
    for p, draw in list(every_draw(dafa)):
        monkeypatch.setattr(dafa, 'draw', lambda draw=draw: draw)
        dafa.mean_loss.fill_(0.3)  # unbiased whatever the baseline, if it does not depend on the draw
        for sum_, gradient in zip(total, step(dafa, t, s)[1], strict=True):
            sum_ += p.detach() * gradient
    for ours, exact in zip(total, exact_gradients(dafa, t, s), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_mean_of_many_estimates_is_the_exact_gradient():
    dafa, count = small_dafa(), 3000
    t, s = (features(1, 2, 4, 5, seed=i, dtype=torch.float64) for i in (5, 6))
    samples = [torch.cat([g.flatten() for g in step(dafa, t, s)[1]]) for _ in range(count)]
    samples = torch.stack(samples)
    exact = torch.cat([g.flatten() for g in exact_gradients(dafa, t, s)])
    error = samples.std(0) / count ** .5
    assert ((samples.mean(0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 8 * error).sum() >= 4  # the test tells these gradients from zero


# Search

def blobs(generator):
    return F.interpolate(torch.randn(2, 8, 4, 5, generator=generator), (8, 10), mode='bicubic')


def planted(t, draw, plant):
    for name, m in plant.items():
        t = OPERATIONS[name](t, m, draw.dice[name])
    return t


def mean_loss(dafa, plant, steps=200):
    generator, losses = torch.Generator().manual_seed(77), []
    for _ in range(steps):
        t = blobs(generator)
        refined = dafa(t)
        losses.append(float((refined - planted(t, dafa.last_draw, plant)).square().mean() / 2))
    return sum(losses) / steps


@pytest.mark.parametrize('plant', [
    {'TranslateX': 0.7, 'Rotate': 0.6},  # exact gradients
    {'ShearY': 0.7, 'ChannelShuffle': 0.5},  # one straight-through
])
def test_search_finds_the_planted_sub_policy_and_its_magnitudes(plant):
    """Among all 36; the student shares the batch's signs and permutations, else nothing could match it."""
    name, generator = '+'.join(plant), torch.Generator().manual_seed(0)
    dafa, unlearned = DAFA(seed=1), DAFA(seed=1)
    optimizer = torch.optim.Adam(dafa.parameters(), lr=1e-2, betas=(0.5, 0.999))
    for _ in range(1500):
        t = blobs(generator)
        dafa(t)
        optimizer.zero_grad()
        dafa.policy_loss(planted(t, dafa.last_draw, plant)).backward()
        optimizer.step()
    found, start = dafa.names.index(name), unlearned.policy()
    policy = dafa.policy()
    assert policy.probability[found] == max(policy.probability) > 0.5
    assert min(policy.application[found]) > 0.75
    assert policy.magnitude[found] == pytest.approx(list(plant.values()), abs=0.07)
    assert dafa.summary().split('\n')[1].startswith(name)
    assert start.probability[found] < 0.05 and mean_loss(dafa, plant) < 0.35 * mean_loss(unlearned, plant)


# Reading it

def test_summary_and_state_tell_the_policy_by_name():
    dafa = DAFA(['ShearX', 'Rotate', 'Noise'])
    dafa.alpha.data[dafa.names.index('Rotate+Noise')] = 3.
    dafa.magnitude.data[dafa.names.index('Rotate+Noise')] = torch.tensor([100., 0.])
    lines = dafa.summary().split('\n')
    assert len(lines) == 4 and lines[1].split() == [
        'Rotate+Noise', '90.94%', 'Rotate', '50%,', '30', 'degrees;', 'Noise', '50%,', '0.05', 'standard',
        'deviations']
    state = dafa.state()
    assert set(state) == {'entropy'} | {f'{key}/{name}' for key in 'pm' for name in dafa.operations}
    assert state['p/Noise'] == pytest.approx(0.5 * (0.9093 + 0.0453), abs=1e-3)
    assert state['m/Rotate'] == pytest.approx((0.9093 + 0.5 * 0.0453) / 0.9546, abs=1e-3)
    assert DAFA().state()['entropy'] == pytest.approx(1)
