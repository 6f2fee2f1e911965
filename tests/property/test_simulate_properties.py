import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.objective import nearest
from planner.simulate import Arrivals, build_network, simulate
from planner.simulate.arrivals import draw_requests
from planner.simulate.clock import run
from planner.simulate.outcome import _times_run
from planner.simulate.script import build_script
from schemas.topology import Compute
from tests.small_clusters import make_model, make_problem, make_topology, own_favourites

seeds = st.integers(0, 2**16)


def one_server(seed, rate_scale):
    topology = make_topology([8], [50.0], compute=Compute(expert_us=5000))
    problem = make_problem(topology, make_model(layers=1), seed=seed)
    routing = nearest(problem, own_favourites(problem), "additive-latency")
    script = build_script(problem, routing, build_network(topology), problem.events)
    arrivals = Arrivals(tokens=300, pattern="tokens", rate_scale=rate_scale, seed=seed)
    requests = draw_requests(problem.tokens_per_s, [200], arrivals)
    times = run(script, requests)
    return times.latency_s[np.argsort(times.request)]


@settings(max_examples=25, deadline=None)
@given(seed=seeds, rate=st.floats(0.1, 3), more=st.floats(1, 3))
def test_more_load_never_makes_a_token_of_one_server_quicker(seed, rate, more):
    assert (one_server(seed, rate * more) >= one_server(seed, rate) - 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, pattern=st.sampled_from(["requests", "tokens", "closed"]), tokens=st.integers(3, 900))
def test_every_token_runs_once_and_every_figure_is_conserved(seed, pattern, tokens):
    topology = make_topology([8, 9, 13], [20.0, 0.0, 30.0], links=[(0, 1), (1, 2)])
    problem = make_problem(topology, make_model(), seed=seed, tokens=50)
    routing = nearest(problem, own_favourites(problem), "additive-latency")
    script = build_script(problem, routing, build_network(topology), problem.events)
    requests = draw_requests(problem.tokens_per_s, [50, 50], Arrivals(tokens=tokens, pattern=pattern, seed=seed))
    times = run(script, requests)
    assert len(times.end_s) == requests.num_tokens.sum()
    assert (np.diff(times.end_s) >= 0).all()
    assert (times.queue_s > -1e-9).all()
    walked = np.concatenate(
        [
            script.work_of[ingress][(first + np.arange(length)) % 50].ravel()
            for ingress, first, length in zip(requests.ingress, requests.first_token, requests.num_tokens, strict=True)
        ]
    )
    np.testing.assert_array_equal(_times_run(script, requests), np.bincount(walked, minlength=len(script.works)))


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_slower_links_never_shorten_a_lone_token(seed):
    def mean(latency):
        topology = make_topology([8, 9, 13], [1.0, 2.0, 3.0], latency=latency)
        problem = dataclasses.replace(make_problem(topology, make_model(), seed=seed, tokens=60))
        routing = nearest(problem, own_favourites(problem), "additive-latency")
        arrivals = Arrivals(tokens=200, pattern="tokens", spacing="fixed", rate_scale=1e-3)
        return simulate(problem, routing, build_network(topology), arrivals).total.mean_s

    assert mean(1e-3) <= mean(4e-3)
