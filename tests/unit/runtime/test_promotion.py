"""Every job is made once, by whoever needs it first."""

import threading
from collections import Counter

from runtime.promotion import Promoter


def test_jobs_are_made_once_by_whoever_comes_first():
    done, lock = Counter(), threading.Lock()

    def perform(job):
        with lock:
            done[job] += 1

    promoter = Promoter(perform, workers=2)
    for start in range(0, 200, 10):
        jobs = list(range(start, start + 10))
        promoter.add(jobs, wake=start % 20 == 0)
        for job in jobs:
            promoter.run(job)
    for thread in threading.enumerate():
        if thread.name == "loads":
            thread.join(5)
    assert promoter.waiting == 0
    assert done == Counter(range(200))


def test_without_threads_only_who_needs_a_job_makes_it():
    done = []
    promoter = Promoter(done.append, workers=0)
    promoter.add(["a", "b"], wake=True)
    assert done == []
    assert promoter.run("b")
    assert not promoter.run("b")
    assert done == ["b"]
    assert promoter.waiting == 1
