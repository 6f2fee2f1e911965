"""Small networks: what rows tell is learnt, and what they do not is not made up."""

import numpy as np
import pytest

from runtime.policy.training import Loss, train


def squares(goal):
    """Half the squared error."""
    return Loss(
        lambda y, rows: float(((y - goal[rows]) ** 2).mean() / 2),
        lambda y, rows: y - goal[rows],
    )


def learnt(x, goal, seed=0):
    rng = np.random.default_rng(seed)
    return train(lambda rows: x[rows], squares(goal), rows=len(x), outputs=1, hidden=16, rounds=20, rng=rng, rate=1e-2)


def test_what_no_line_tells_is_learnt():
    x = np.random.default_rng(1).standard_normal((8192, 4)).astype(np.float32)
    goal = np.abs(x[:, :1]) - x[:, 1:2] * (x[:, 2:3] > 0)
    net = learnt(x, goal)
    assert net is not None
    assert ((net.answer(x) - goal) ** 2).mean() < 0.1 * goal.var()


def test_the_same_rows_make_the_same_network():
    x = np.random.default_rng(2).standard_normal((2600, 3)).astype(np.float32)
    first, second = learnt(x, x[:, :1]), learnt(x, x[:, :1])
    assert all(map(np.array_equal, first, second))


@pytest.mark.parametrize("rows", [2, 100, 4096])
def test_noise_and_few_rows_are_fitted_by_little_or_nothing(rows):
    rng = np.random.default_rng(3)
    x, goal = (rng.standard_normal((rows, n)).astype(np.float32) for n in (6, 1))
    net = learnt(x, goal)
    fresh = rng.standard_normal((1000, 6)).astype(np.float32)
    assert net is None or (net.answer(fresh) ** 2).mean() < 0.1
    assert net is None or rows == 4096, "nothing could be kept apart"
