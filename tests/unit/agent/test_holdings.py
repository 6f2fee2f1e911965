import hashlib

import pytest

from agent.errors import CannotPrepare
from agent.holdings import Holdings
from runtime.errors import InvalidInput
from runtime.precision import pack_record, packed_layout
from runtime.slots import Caching, Residency
from schemas.messages import AssignedReplica, Record
from schemas.outcome import ExitCode
from tests.families import make_checkpoint, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("holdings")
    return make_store(make_checkpoint("qwen3_moe", directory / "model"), directory / "store")


def replica(store, layer, expert, tier):
    name = store.by_key[layer, expert].sha256
    record = Record(layer=layer, expert=expert, sha256=name, bytes=store.manifest.layout.bytes)
    return AssignedReplica(record=record, tier=tier), store.read(name)


def wanted_of(*replicas):
    return {(r.record.layer, r.record.expert, r.tier): r for r, _ in replicas}


def make_holdings(store, data, *, device, disk):
    size = store.manifest.layout.bytes
    budgets = {"device": device * size, "disk": disk * size}
    holdings = Holdings(
        Residency(store.manifest.layout, budgets, data / "records"), None, data, disk_budget=disk * size
    )
    holdings.open({})
    return holdings


def disk_bytes(data):
    return sum(file.stat().st_size for file in data.rglob("*") if file.is_file())


def test_backing_copies_leave_room_for_replicas_of_the_disk_tier(store, tmp_path):
    """Found on the quickstart: device replicas came first, and their copies took what disk replicas needed."""
    on_device = [replica(store, 0, expert, "device") for expert in range(3)]
    on_disk = [replica(store, 1, expert, "disk") for expert in range(2)]
    holdings = make_holdings(store, tmp_path, device=3, disk=3)
    wanted = wanted_of(*on_device, *on_disk)
    holdings.require_room(wanted, wanted.values())
    for each, record in (*on_device, *on_disk):
        holdings.hold(each, record)
    assert disk_bytes(tmp_path) <= 3 * store.manifest.layout.bytes
    assert holdings.backing_bytes == store.manifest.layout.bytes


def test_what_is_held_is_found_again_and_damage_is_noticed(store, tmp_path):
    (each, record), holdings = replica(store, 0, 1, "device"), make_holdings(store, tmp_path, device=1, disk=1)
    holdings.hold(each, record)
    assert hashlib.sha256(holdings.find(each)).hexdigest() == each.record.sha256
    again = make_holdings(store, tmp_path / "other", device=1, disk=1)
    assert again.find(each) is None
    copy = next((tmp_path / "backing").iterdir())
    copy.write_bytes(b"\0" * each.record.bytes)
    holdings.keep({})
    assert holdings.find(each) is None
    assert disk_bytes(tmp_path) == 0


@pytest.mark.parametrize("precision", [None, "int8"])
def test_packed_records_of_the_store_are_known_and_weights_are_told(tmp_path_factory, tmp_path, precision):
    directory = tmp_path_factory.mktemp("packed")
    store = make_store(make_checkpoint("olmoe", directory / "model"), directory / "store", precisions=("int8",))
    size = store.manifest.packed[0].layout.bytes if precision else store.manifest.layout.bytes
    residency = Residency(store.manifest.layout, {"device": size}, caching=Caching(4, 8), precision=precision)
    holdings = Holdings(residency, store, tmp_path, disk_budget=0)
    holdings.open({})
    each, record = replica(store, 1, 2, "device")
    holdings.hold(each, record)
    assert residency.precision_of((1, 2)) == (precision or "checkpoint")
    assert residency.low_precisions((1, 2)) == ([] if precision else ["int8"])
    assert holdings.find(each) == holdings.read(each.record.sha256, 0, len(record)) == record
    if precision is None:
        return
    residency.set_budget("device", 0)
    assert residency.tier_of((1, 2)) == "device"  # the plan gave it
    with residency.borrow(1, [2]):
        assert sum(residency.counts.load_bytes) == size  # read as it is held
    alone = Holdings(
        Residency(store.manifest.layout, {"device": size}, precision=precision), None, tmp_path, disk_budget=0
    )
    alone.hold(each, record)
    assert alone.find(each) is None
    with pytest.raises(KeyError):
        alone.read(each.record.sha256, 0, 8)


def test_a_disk_without_room_is_told_before_anything_is_written(store, tmp_path, monkeypatch):
    (each, _), holdings = replica(store, 0, 0, "disk"), make_holdings(store, tmp_path, device=0, disk=1)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("agent.holdings.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CannotPrepare, match=r"the disk is full: records need .* 10 B are free") as caught:
        holdings.require_room(wanted_of((each, None)), [each])
    assert caught.value.exit_code is ExitCode.INFEASIBLE
    assert disk_bytes(tmp_path) == 0


def test_packed_records_are_held_served_found_again_and_checked(store, tmp_path):
    """What travels packed is named by its own sha256; damage in memory's copy or on disk is noticed as ever."""
    whole, plain = replica(store, 0, 1, "device")
    packed = packed_layout(store.manifest.layout, "int8")
    record = bytes(pack_record(plain, packed))
    name = hashlib.sha256(record).hexdigest()
    each = whole.model_copy(update={"packed": Record(layer=0, expert=1, sha256=name, bytes=packed.bytes)})

    def holdings(data, disk):
        budgets = {"device": 3 * packed.bytes, "disk": disk * packed.bytes}
        residency = Residency(store.manifest.layout, budgets, data / "records", precision="int8")
        made = Holdings(residency, None, data, disk_budget=disk * packed.bytes)
        made.open({(0, 1, "device"): each})
        return made

    first = holdings(tmp_path / "a", 0)  # memory alone
    first.hold(each, record)
    assert first.residency.used()["device"] == packed.bytes
    assert (first.size(name), first.read(name, 0, packed.bytes)) == (packed.bytes, record)
    assert first.read(name, 16, 8) == record[16:24]
    assert first.find(each) == record
    with pytest.raises(KeyError):
        first.read(whole.record.sha256, 0, 8)
    with pytest.raises(InvalidInput, match=f"record of {packed.bytes} bytes, the layout says {len(plain)}"):
        first.residency.put((0, 2), "device", record)
    again = holdings(tmp_path / "b", 2)  # and a backing copy, in as many bytes
    again.hold(each, record)
    assert again.backing_bytes == packed.bytes
    back = holdings(tmp_path / "b", 2)
    assert back.find(each) == record
    with again.residency.borrow(0, [1]) as (lent,), first.residency.borrow(0, [1]) as (other,):
        assert lent.precision == "int8"
        assert lent.weights.gate_up.equal(other.weights.gate_up)
    (tmp_path / "b" / "backing" / name).write_bytes(b"\0" * packed.bytes)
    assert holdings(tmp_path / "b", 2).find(each) is None
    again.keep({})
    with pytest.raises(KeyError):
        again.size(name)


def test_what_is_held_already_gets_the_name_by_which_peers_ask_for_it(store, tmp_path):
    """Found by hand: a node that had packed whole records itself said of the packed ones that it had none."""
    whole, plain = replica(store, 0, 1, "device")
    packed = packed_layout(store.manifest.layout, "int8")
    record = bytes(pack_record(plain, packed))
    named = Record(layer=0, expert=1, sha256=hashlib.sha256(record).hexdigest(), bytes=packed.bytes)
    each = whole.model_copy(update={"packed": named})
    budgets = {"device": packed.bytes, "disk": packed.bytes}
    residency = Residency(store.manifest.layout, budgets, tmp_path / "records", precision="int8")
    holdings = Holdings(residency, None, tmp_path, disk_budget=packed.bytes)
    holdings.open({})
    holdings.hold(whole, plain)
    wanted = {(0, 1, "device"): each}
    assert holdings.missing(wanted) == [each]
    holdings.hold(each, holdings.find(each))
    assert holdings.missing(wanted) == []
    holdings.keep(wanted)
    assert holdings.read(named.sha256, 0, packed.bytes) == record
    assert holdings.backing_bytes == packed.bytes, "a restart finds it"
