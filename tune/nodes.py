"""Ray's nodes: started here or joined, what of them one trial takes, and what each prepares for all trials.

Takes the sweep's own settings; gives what a trial takes and how many run at a time. Does not know trials.
"""

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sft.config import TrainConfig
from sft.ranks import processors, rank_environ
from sft.settings import UserError
from tune.fork_server import ForkSource
from tune.options import ROOT, SweepConfig
from tune.trial_run import limit_gpu_memory

ANSWERS_S = 10.0  # a cluster's head; Ray itself would ask for minutes, and warn all the while
ENVIRONMENT = {  # of the driver
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials' own logs hold all of it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails before its first validation has no Dice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # otherwise Tune prints a table of its own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",  # instead of 30: a machine may be busy
}

OF_TRIALS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",  # a trial that is stopped gives its GPU back before the next one starts
}


def start_ray(address: str | None, gpus: Sequence[str]) -> None:
    """Starts Ray on this machine, or joins a cluster.

    Args:
        address: of a cluster, or None.
        gpus: devices of this machine that trials may use; empty without any.

    Raises:
        UserError: no cluster there.
    """
    os.environ.update(ENVIRONMENT)
    for name in (*rank_environ(0, 1), "MASTER_ADDR", "MASTER_PORT"):  # a trial finds a rank and a port of its own
        os.environ.pop(name, None)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"env_vars": OF_TRIALS | {"PYTHONPATH": os.pathsep.join(paths)}}
    options = {"runtime_env": told, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address:
        try:
            _reach(address)
            ray.init(address=address, **options)
        except (OSError, OverflowError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"address {address}: no Ray cluster answers ({reason}); ray start --head first") from None
        return
    cores = processors()
    try:
        ray.init(address="local", num_cpus=cores, num_gpus=len(gpus), include_dashboard=False, **options)
    except Exception as error:  # Ray has no class for it
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Ray did not start on this machine ({reason}); start again when it is less busy") from error


def _reach(address: str) -> None:
    """Raises OSError or OverflowError where an address names a host and a port at which nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_S).close()


def resources(sweep: SweepConfig) -> tuple[dict[str, float], int]:
    """What one trial takes (`CPU`, `GPU`) and how many run at a time.

    Raises:
        UserError: the cluster has less than one trial needs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    per_trial = sweep.gpus_per_trial if gpus else 0.0
    ranks = sweep.ranks(per_trial)
    if per_trial > gpus:
        raise UserError(f"gpus_per_trial = {per_trial:g}, but there are {gpus:g} GPUs; give at most {gpus:g}")
    if gpus and ranks > max(1, per_trial):
        raise UserError(f"ranks_per_trial = {ranks} needs a GPU for each rank: give --gpus_per_trial {ranks}")
    # A rank lies whole on a node; the cores of a node without GPUs are no help to a trial that has one.
    hosts = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes if not gpus or node.get("GPU", 0) >= 1]
    if ranks > 1:  # they may lie on several
        hosts = [tuple(map(sum, zip(*hosts, strict=True)))]
    # Trials that share a GPU: as many as lie whole on each.
    rooms = [int(own // per_trial) if per_trial >= 1 else int(own) * int(1 / per_trial) for _, own in hosts if gpus]
    share = min((int(cpus // room) for (cpus, _), room in zip(hosts, rooms, strict=False)), default=0)
    cores = max(ranks, sweep.cpus_per_trial or share)  # a rank has one at the least
    fits = [int(cpus // cores) for cpus, _ in hosts]
    room = sum(map(min, fits, rooms) if gpus else fits)
    if room < 1:
        most = max((cpus for cpus, _ in hosts), default=0)
        raise UserError(
            f"a trial of {ranks} ranks takes {cores} cores, but there are {most:g}; give fewer --cpus_per_trial or "
            "--ranks_per_trial"
        )
    return {"CPU": cores, "GPU": per_trial}, min(room, sweep.max_concurrent or room)


class Forks:
    """A process on each node that imports, beside the preparation, what trials are forked from; ends with the sweep.

    Args:
        needs: what one trial takes.
        ranks: of one trial; several are processes of Ray's own.
    """

    def __init__(self, needs: dict[str, float], ranks: int) -> None:
        self._sources = {}
        if ranks == 1:
            source = ray.remote(num_cpus=0)(ForkSource)
            for node in _nodes_for(needs):
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                actor = source.options(scheduling_strategy=place).remote(needs["GPU"] > 0)
                self._sources[node["NodeID"]] = actor, actor.address.remote()

    def addresses(self) -> dict[str, str]:
        """Where trials ask, by node; a node that has lost its process has none: its trials import for themselves."""
        found = {}
        for node, (_, address) in self._sources.items():
            with contextlib.suppress(ray.exceptions.RayError):
                found[node] = ray.get(address)
        return found


def prepare_nodes(config: TrainConfig, needs: dict[str, float]) -> list[Any]:
    """Computes the frozen features once on each node, before any trial.

    Args:
        config: what the trials have in common, with their highest rank.
        needs: what one trial takes.

    Returns:
        What `sft.train.prepare` gave on each node.

    Raises:
        UserError: a mistake in data, checkpoint or settings.
    """
    nodes = _nodes_for(needs)
    cores = min(int(node["Resources"]["CPU"]) for node in nodes)
    # One call per process: a trial in the same process would count its seconds as its own.
    options = {"num_cpus": cores, "num_gpus": 1 if needs["GPU"] else 0, "max_retries": 1, "max_calls": 1}
    task = ray.remote(**options)(_prepare)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    found = ray.get([task.options(scheduling_strategy=place).remote(config, needs["GPU"]) for place in places])
    for one in found:
        if isinstance(one, str):
            raise UserError(one)
    return found


def _nodes_for(needs: dict[str, float]) -> list[dict[str, Any]]:
    """The nodes on which trials may run."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if needs["GPU"]:
        nodes = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1] or nodes
    return nodes


def _prepare(config: TrainConfig, gpus_per_trial: float) -> Any:
    """Runs on a node; a mistake comes back as text, since Ray would wrap it."""
    from sft.train import prepare

    try:
        limit_gpu_memory(gpus_per_trial)
        return prepare(config)
    except UserError as error:
        return str(error)
