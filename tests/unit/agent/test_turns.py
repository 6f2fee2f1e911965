"""The turn is handed over: to those who ask in their order, then to the idle; nobody has it twice."""

import threading

from agent.turns import Turn


def test_those_who_ask_come_before_the_idle_and_wake_whoever_has_it():
    woken, order = threading.Event(), []
    turn = Turn(woken.set)
    turn.take()

    def act(name, asks):
        taken = turn.take() is None if asks else turn.take_when_free(10)
        assert taken
        order.append(name)
        turn.give()

    idle = threading.Thread(target=act, args=("idle", False))
    idle.start()
    while not turn._idle:
        pass
    assert not woken.is_set()
    assert not turn.is_wanted
    asking = []
    for name in ("first", "second"):
        asking.append(threading.Thread(target=act, args=(name, True)))
        asking[-1].start()
        while len(turn._asking) < len(asking):
            pass
    assert woken.wait(10)
    assert turn.is_wanted
    turn.give()
    for thread in (*asking, idle):
        thread.join(10)
    assert order == ["first", "second", "idle"]
    assert turn.take_when_free(0)


def test_a_listener_has_the_turn_while_nobody_else_would():
    turn = Turn(lambda: None)
    assert turn.listen_when_free(0)
    assert not turn.is_better_placed
    idle = threading.Thread(target=turn.take_when_free, args=(10,))
    idle.start()
    while not turn.is_better_placed:
        pass
    turn.give()
    idle.join(10)  # it has the turn now
    assert not turn.listen_when_free(0.01)
    turn.give()
    assert turn.listen_when_free(0)


def test_waiting_for_a_turn_that_is_not_given_ends():
    turn = Turn(lambda: None)
    turn.take()
    assert not turn.take_when_free(0.01)
    turn.give()
    assert turn.take_when_free(0.01)


def test_one_at_a_time_has_it():
    turn, inside, most = Turn(lambda: None), [0], [0]

    def work(asks):
        for _ in range(300):
            if asks:
                turn.take()
            elif not turn.take_when_free(0.001):
                continue
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            turn.give()

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1]
    assert turn.take_when_free(0)
