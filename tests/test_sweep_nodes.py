"""Ray's nodes without a cluster: what a trial takes of them, how they are started or joined."""

import io
import os
import socket
from types import SimpleNamespace

import pytest
import ray
from ray.tune.execution.tune_controller import TuneController

from sft.ranks import rank_environ
from sft.settings import UserError
from tune import nodes
from tune.nodes import resources
from tune.options import SweepConfig


def machines(*sizes: tuple[int, int]) -> list[dict]:
    """What Ray tells of machines with so many cores and GPUs, and of one that is gone."""
    told = [{"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) for cpus, gpus in sizes]
    return [{"Alive": True, "Resources": one} for one in told] + [{"Alive": False, "Resources": {"CPU": 99.0}}]


@pytest.mark.parametrize(
    ("cluster", "settings", "needs", "concurrent"),
    [
        ((8, 0), {}, (1, 0), 8),
        ((8, 0), {"gpus_per_trial": 2}, (1, 0), 8),  # without GPUs of no effect
        ((8, 0), {"cpus_per_trial": 3}, (3, 0), 2),
        ((8, 0), {"ranks_per_trial": 2}, (2, 0), 4),
        ((8, 0), {"ranks_per_trial": 2, "cpus_per_trial": 1}, (2, 0), 4),  # a core for each rank
        ((8, 0), {"max_concurrent": 3}, (1, 0), 3),
        ((8, 0), {"max_concurrent": 99}, (1, 0), 8),
        ((16, 4), {}, (4, 1), 4),
        ((16, 3), {"gpus_per_trial": 2}, (16, 2), 1),
        ((16, 4), {"gpus_per_trial": 2, "ranks_per_trial": 2}, (8, 2), 2),
        ((32, 4), {"gpus_per_trial": 0.5}, (4, 0.5), 8),
        ((32, 2), {"gpus_per_trial": 0.3}, (5, 0.3), 6),  # three lie whole on each
        ((32, 5), {"gpus_per_trial": 0.4}, (3, 0.4), 10),  # two on each, not 12 of 5 / 0.4
        ((32, 2), {"gpus_per_trial": 0.75}, (16, 0.75), 2),
        ((32, 1), {"gpus_per_trial": 0.1}, (3, 0.1), 10),
        ((2, 4), {}, (1, 1), 2),  # cores are short
    ],
)
def test_what_a_trial_takes_and_how_many_run_at_a_time(monkeypatch, cluster, settings, needs, concurrent):
    monkeypatch.setattr(ray, "nodes", lambda: machines(cluster))
    assert resources(SweepConfig(**settings)) == ({"CPU": needs[0], "GPU": needs[1]}, concurrent)


@pytest.mark.parametrize(
    ("cluster", "settings", "message"),
    [
        ((8, 1), {"gpus_per_trial": 2}, "gpus_per_trial = 2, but there are 1 GPUs; give at most 1"),
        ((8, 4), {"ranks_per_trial": 2}, "ranks_per_trial = 2 needs a GPU for each rank: give --gpus_per_trial 2"),
        (
            (2, 0),
            {"cpus_per_trial": 3},
            "a trial of 1 ranks takes 3 cores, but there are 2; give fewer --cpus_per_trial",
        ),
        ((2, 0), {"ranks_per_trial": 4}, "a trial of 4 ranks takes 4 cores, but there are 2"),
    ],
)
def test_what_does_not_fit_is_told(monkeypatch, cluster, settings, message):
    monkeypatch.setattr(ray, "nodes", lambda: machines(cluster))
    with pytest.raises(UserError, match=message):
        resources(SweepConfig(**settings))


@pytest.mark.parametrize(
    ("cluster", "settings", "needs", "concurrent"),
    [
        (((96, 0), (8, 4)), {}, (2, 1), 4),  # a head without GPUs: its cores are no trial's
        (((64, 4), (8, 4)), {}, (2, 1), 8),  # what the smaller one can give
        (((64, 4), (8, 4)), {"cpus_per_trial": 4}, (4, 1), 6),
        (((16, 1), (16, 1)), {"gpus_per_trial": 2}, (32, 2), 1),  # ranks may lie on two machines
        (((3, 0), (3, 0)), {"cpus_per_trial": 2}, (2, 0), 2),
        (((2, 0), (2, 0)), {"ranks_per_trial": 4}, (4, 0), 1),
    ],
)
def test_a_trial_lies_on_one_machine_of_several_and_its_ranks_on_any(monkeypatch, cluster, settings, needs, concurrent):
    monkeypatch.setattr(ray, "nodes", lambda: machines(*cluster))
    assert resources(SweepConfig(**settings)) == ({"CPU": needs[0], "GPU": needs[1]}, concurrent)


def test_a_trial_for_which_no_machine_has_the_cores_is_told(monkeypatch):
    """Ray would wait for such a machine forever."""
    monkeypatch.setattr(ray, "nodes", lambda: machines((2, 0), (2, 0)))
    with pytest.raises(UserError, match="a trial of 1 ranks takes 3 cores, but there are 2"):
        resources(SweepConfig(cpus_per_trial=3))


def test_trials_inherit_neither_rank_nor_port_of_the_driver(monkeypatch):
    started = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append((options, dict(os.environ))))
    monkeypatch.setattr(
        os, "environ", dict(os.environ) | rank_environ(1, 2) | {"MASTER_PORT": "1234", "PYTHONPATH": "/mine"}
    )
    nodes.start_ray(None, ["3", "5"])
    ((options, environ),) = started
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & environ.keys()
    assert options["num_gpus"] == 2 and options["address"] == "local"
    assert options["runtime_env"]["env_vars"]["PYTHONPATH"].split(os.pathsep) == [str(nodes.ROOT), "/mine"]


def test_ray_lets_a_trial_end_without_a_dice(monkeypatch):
    """Otherwise the first trial that fails before its first validation ends the sweep."""
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    nodes.start_ray(None, [])
    asks = SimpleNamespace(metric="dice_so_far")
    controller = SimpleNamespace(_metric=None, _search_alg=asks, _scheduler_alg=asks)
    TuneController._validate_result_metrics(controller, {"done": True, "config/number": 3, "config/ranks": 1})


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    def refuse(**_):
        raise ConnectionError("could not\nconnect")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(nodes.socket, "create_connection", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(
        UserError, match="address head:6379: no Ray cluster answers .could not connect.; ray start --head"
    ):
        nodes.start_ray("head:6379", [])


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_where_nobody_listens_ray_is_not_asked(monkeypatch, form):
    """It would ask for minutes."""
    with socket.socket() as holder:  # bound, so that nobody else is given the port, but it does not listen
        holder.bind(("127.0.0.1", 0))
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("asked"))
        monkeypatch.setattr(os, "environ", dict(os.environ))
        with pytest.raises(UserError, match="no Ray cluster answers .*refused.*; ray start --head first"):
            nodes.start_ray(form.format(holder.getsockname()[1]), [])
    with pytest.raises(UserError, match=f"address localhost:{10**30}: no Ray cluster answers"):
        nodes.start_ray(f"localhost:{10**30}", [])


def test_a_node_whose_process_is_lost_gives_no_address_and_several_ranks_need_none(monkeypatch):
    """Its trials import for themselves; Ray Train starts processes of its own."""
    started, lost = [], ray.exceptions.ActorDiedError()

    def actor(node: str, with_gpus: bool) -> SimpleNamespace:
        started.append((node, with_gpus))
        return SimpleNamespace(address=SimpleNamespace(remote=lambda: node))

    def options(scheduling_strategy):
        return SimpleNamespace(remote=lambda with_gpus: actor(scheduling_strategy.node_id, with_gpus))

    def get(address: str) -> str:
        if address == "b":
            raise lost
        return f"at {address}"

    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(ray, "get", get)
    told = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}} for name in "ab"]
    monkeypatch.setattr(ray, "nodes", lambda: told)
    monkeypatch.setattr(nodes, "NodeAffinitySchedulingStrategy", lambda node, soft: SimpleNamespace(node_id=node))
    assert nodes.Forks({"CPU": 1, "GPU": 0.5}, 1).addresses() == {"a": "at a"}
    assert started == [("a", True), ("b", True)]
    assert nodes.Forks({"CPU": 2, "GPU": 2}, 2).addresses() == {} and len(started) == 2
